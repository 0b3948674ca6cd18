"""`decoder.rounds`: experts that go on against what was fitted, at the cost that they have without."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from support import PREPARATION, copied_run, invoke, metrics, payload, records, refusal, run_here

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.models.shared_decoder import load_shared_decoder
from hardmoe.storage import open_storage


@pytest.fixture(scope="module")
def root(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run, its experts' second epoch trained against the decoder of the first."""
    directory = tmp_path_factory.mktemp("rounds")
    root = copied_run(finished, directory, keep=[*PREPARATION, "baselines"])
    run_here(directory, "report", "--set", "decoder.rounds=1")
    return root


def test_each_round_is_a_mixture_of_its_own_and_the_last_has_the_usual_names(root: Path, finished: Path) -> None:
    before, after = records(finished / "runs/small"), records(root)
    new = {Path(name).parent.as_posix() for name in after.keys() - before.keys()}
    experts = {f"rounds/0/experts/expert-{expert:04d}" for expert in range(3)}
    assert new == experts | {"rounds/0/embeddings", "rounds/0/decoder"}
    unchanged = {Path(name).parent.as_posix() for name in before if before[name] == after[name]}
    assert {"baselines/dense", "baselines/dense_refit", *PREPARATION} <= unchanged
    assert "rounds/0/experts" in (root / "report/index.html").read_text()


def test_an_expert_starts_where_it_was_and_holds_the_decoder_behind_its_own_alignment(root: Path) -> None:
    shared = load_shared_decoder(ArtifactStore(open_storage(str(root))).get("rounds/0/decoder")).state_dict()
    for expert in range(3):
        files = (root / f"{place}/expert-{expert:04d}/model.safetensors" for place in ("rounds/0/experts", "experts"))
        before, after = (safetensors.torch.load_file(path) for path in files)
        weight_ZE, bias_Z = shared["alignment.weight"][expert].double(), shared["alignment.bias"][expert].double()
        layer_VE = shared["decoder.weight"].double() @ weight_ZE
        offset_V = shared["decoder.weight"].double() @ bias_Z + shared["decoder.bias"].double()
        torch.testing.assert_close(after["decoder.weight"].double(), layer_VE, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(after["decoder.bias"].double(), offset_V, rtol=1e-5, atol=1e-6)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert any(name.endswith("conv1.weight") for name in moved)
        assert not torch.equal(before["decoder.weight"], after["decoder.weight"])


def test_all_rounds_together_show_as_many_images_as_there_would_be_without(root: Path, finished: Path) -> None:
    for expert in range(3):
        name = f"expert-{expert:04d}"
        rounds = [payload(root, f"{place}/{name}")["examples_seen"] for place in ("rounds/0/experts", "experts")]
        assert sum(rounds) == payload(finished / "runs/small", f"experts/{name}")["examples_seen"]
        assert rounds[0] == rounds[1]
    costs, without = metrics(root)["costs"], metrics(finished / "runs/small")["costs"]
    for system in ("mixture", "dense_refit"):
        assert costs[system]["images_seen"] == without[system]["images_seen"]
        assert costs[system]["parameters"] == without[system]["parameters"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("decoder.rounds=2",), "decoder.rounds: 2 takes the last 2 epochs of experts.epochs: 2, which leaves none before"),
        (("decoder.rounds=1", "decoder.temperature=0.05"), "rounds: 1 holds the decoder as a part of each expert"),
        (("decoder.round_epochs=2",), "round_epochs: 2 is read with rounds only"),
        (("decoder.rounds=1", "experts.loss=one_tag"), "whose loss 'softmax' is not their 'one_tag'"),
    ],
)
def test_rounds_that_cannot_be_are_refused(finished: Path, settings: tuple[str, ...], sentence: str) -> None:
    changes = [word for setting in settings for word in ("--set", setting)]
    assert sentence in refusal(invoke(finished, "run", "--dry-run", *changes))
