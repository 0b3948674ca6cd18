"""Where experts start and what of the trunk they keep, over whole runs of the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from s3 import Store
from support import (
    PREPARATION,
    copied_run,
    invoke,
    payload,
    real_images,
    records,
    refusal,
    run_here,
    write_photos,
    write_recipe,
)

from hardmoe.mixture import Mixture
from hardmoe.models.backbones import build_backbone
from hardmoe.storage import open_storage

EVERYTHING = (
    "experts.decoder=fixed",
    "experts.distill={weight: 0.5, temperature: 2.0}",
    "experts.early_stop=1",
    "experts.keep=best",
    "experts.epochs=4",
)
"""All that the K = 1 theorem must survive at once."""


def sets(*changes: str) -> list[str]:
    """`--set` before each."""
    return [word for change in changes for word in ("--set", change)]


def weights(artifact: Path) -> dict[str, torch.Tensor]:
    """A network's tensors, also where it was taken over from another root."""
    reused = json.loads((artifact / "artifact.json").read_bytes()).get("reused_from")
    return safetensors.torch.load_file((Path(reused) if reused else artifact) / "model.safetensors")


@pytest.fixture
def prepared(finished: Path, tmp_path: Path) -> Path:
    """The small run up to its partition; returns its root."""
    return copied_run(finished, tmp_path, keep=PREPARATION)


def test_fixed_decoder_is_the_trunks_to_the_bit_and_the_rest_moves(prepared: Path, tmp_path: Path) -> None:
    run_here(tmp_path, "train-experts", "--only", "expert-0001", *sets("experts.decoder=fixed"))
    expert, trunk = weights(prepared / "experts/expert-0001"), weights(prepared / "trunk")
    same = {name for name in trunk if torch.equal(expert[name], trunk[name])}
    assert {name for name in same if "decoder" in name} == {"decoder.weight", "decoder.bias"}
    assert not any(name.endswith("conv1.weight") for name in same)
    told = payload(prepared, "experts/expert-0001")
    decoder = trunk["decoder.weight"].numel() + trunk["decoder.bias"].numel()
    assert told["trained_parameters"] == told["parameters"] - decoder


def test_fixed_decoder_holds_for_a_random_start_too(prepared: Path, tmp_path: Path) -> None:
    run_here(tmp_path, "train-experts", "--only", "expert-0001", *sets("experts.decoder=fixed", "experts.init=random"))
    expert, trunk = weights(prepared / "experts/expert-0001"), weights(prepared / "trunk")
    assert torch.equal(expert["decoder.weight"], trunk["decoder.weight"])
    assert not torch.equal(expert["backbone.network.stem.0.weight"], trunk["backbone.network.stem.0.weight"])


def test_fixed_decoder_of_another_width_is_refused_before_anything_is_built(prepared: Path, tmp_path: Path) -> None:
    changes = sets("experts.decoder=fixed", "experts.init=random", "experts.backbone=quicknet_w6")
    said = refusal(invoke(tmp_path, "train-experts", "--backend", "inline", *changes))
    assert said == (
        "experts.decoder is 'fixed', but 'quicknet_w6' has features of width 48, where the trunk's decoder reads 32; "
        "choose an experts.backbone of that width, or set experts.decoder: own"
    )
    assert not (prepared / "experts").exists()


def test_a_single_expert_is_the_dense_baseline_whatever_it_starts_from_and_learns_from(
    root_of_one_expert: Path, tmp_path: Path
) -> None:
    root = copied_run(root_of_one_expert.parents[1], tmp_path, keep=PREPARATION)
    run_here(tmp_path, "evaluate", *sets(*EVERYTHING))
    expert, dense = root / "experts/expert-0000", root / "baselines/dense"
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (expert / name).read_bytes() == (dense / name).read_bytes(), name
    told = payload(root, "experts/expert-0000")
    assert told["selection"] == payload(root, "baselines/dense")["selection"]
    assert told["selection"]["planned_steps"] >= told["steps"] >= told["selection"]["kept_step"]
    results = json.loads((root / "evaluation/metrics.json").read_text())["systems"]
    assert results["mixture"] == results["dense_refit"]


def test_unequal_costs_after_early_stops_are_said(prepared: Path, tmp_path: Path) -> None:
    changes = sets("experts.early_stop=1", "experts.epochs=8", "evaluation.map_replicates=2")
    result = invoke(tmp_path, "evaluate", "--backend", "inline", *changes)
    assert result.returncode == 0, result.stderr
    experts = [payload(prepared, f"experts/expert-{expert:04d}") for expert in range(3)]
    dense = payload(prepared, "baselines/dense")
    seen = sum(told["examples_seen"] for told in experts)
    assert seen != dense["examples_seen"], "the stops came at equal cost by chance: the test shows nothing"
    assert f"the experts were shown {seen:,} images together, the dense baseline {dense['examples_seen']:,}" in result.stdout
    for told in (*experts, dense):
        assert sum(told["samples_per_epoch"]) == told["examples_seen"]


def test_start_from_the_trunks_own_file_is_the_start_from_the_trunk(prepared: Path, root: Path, tmp_path: Path) -> None:
    """The file counts by its content: moved and renamed it is the same, and its going does not matter to what is finished."""
    (tmp_path / "w").mkdir()
    shutil.copy(prepared / "trunk/model.safetensors", tmp_path / "w/first.safetensors")
    run_here(tmp_path, "train-experts", "--only", "expert-0001", *sets("experts.init=w/first.safetensors"))
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (prepared / "experts/expert-0001" / name).read_bytes() == (root / "experts/expert-0001" / name).read_bytes()
    before = (prepared / "experts/expert-0001/artifact.json").read_bytes()
    (tmp_path / "w/first.safetensors").rename(tmp_path / "w/second.safetensors")
    for place in ("w/second.safetensors", "w/gone.safetensors"):
        run_here(tmp_path, "train-experts", "--only", "expert-0001", *sets(f"experts.init={place}"))
    assert (prepared / "experts/expert-0001/artifact.json").read_bytes() == before
    (tmp_path / "w/second.safetensors").write_bytes(safetensors.torch.save({"x": torch.ones(1)}))
    changed = ("train-experts", "--only", "expert-0001", "--backend", "inline", *sets("experts.init=w/second.safetensors"))
    assert "was built from another recipe (start.sha256: " in refusal(invoke(tmp_path, *changed))


def test_larger_backbone_starts_from_a_file_of_its_own(prepared: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_backbone("resnet20_w8", image_size=16, seed=9).network
    safetensors.torch.save_file(network.state_dict(), tmp_path / "large.safetensors")
    changes = sets("experts.backbone=resnet20_w8", "experts.init=large.safetensors", "experts.learning_rate=1.0e-12")
    run_here(tmp_path, "train-experts", "--only", "expert-0000", *changes)
    trained = weights(prepared / "experts/expert-0000")
    for name, tensor in network.named_parameters():
        torch.testing.assert_close(trained[f"backbone.network.{name}"], tensor.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("init", "remedy"),
    [
        ("trnk", "correct the word, or give a file that ends in .safetensors"),
        ("weights.pt", "give a file that ends in .safetensors"),
        ("nowhere.safetensors", "experts.init"),
        ("other.safetensors", "stem.0.weight has the shape [6, 3, 3, 3] and not [4, 3, 3, 3]"),
    ],
)
def test_start_that_cannot_be_is_refused_before_anything_is_built(prepared: Path, tmp_path: Path, init: str, remedy: str) -> None:
    other = build_backbone("quicknet_w6", image_size=16, seed=9).network
    safetensors.torch.save_file(other.state_dict(), tmp_path / "other.safetensors")
    said = refusal(invoke(tmp_path, "train-experts", "--backend", "inline", *sets(f"experts.init={init}")))
    assert remedy in said
    assert not list((prepared / "experts").glob("*/model.safetensors"))


def test_experts_that_branch_off_are_the_trunk_up_to_there(branched: Path) -> None:
    trunk = weights(branched / "trunk")
    shared = {name for name in trunk if name.startswith(tuple(f"backbone.network.{n}" for n in ("stem", "blocks.0", "blocks.1")))}
    for expert in ("experts/expert-0000", "experts/expert-0002", "baselines/dense"):
        own = weights(branched / expert)
        assert {name for name in trunk if torch.equal(own[name], trunk[name])} == shared
        parameters = sum(tensor.numel() for name, tensor in trunk.items() if name in shared and "running" not in name)
        counters = sum(name.endswith("num_batches_tracked") for name in shared)
        told = payload(branched, expert)
        assert told["trained_parameters"] == told["parameters"] - parameters + counters


def test_image_passes_the_shared_stages_once_and_comes_out_as_it_was_stored(branched: Path) -> None:
    mixture = Mixture.load(str(branched))
    rows = [row for path in sorted(branched.glob("dataset/split=test/*.parquet")) for row in pq.read_table(path).to_pylist()]
    images = [row["image"] for row in rows]
    stored = {
        row["example_id"]: (row["expert"], row["embedding"])
        for path in branched.glob("embeddings/split=test/*.parquet")
        for row in pq.read_table(path).to_pylist()
    }
    seen: list[int] = []
    stem = mixture.trunk.backbone.network.get_submodule("stem")
    stem.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    found = mixture.embed(images)
    assert len(seen) == -(-len(images) // seen[0]), "one pass of the shared stages for each batch, and no more"
    for number in mixture.experts.numbers:
        expert = mixture.experts.get(number)
        expert.backbone.network.get_submodule("stem").register_forward_hook(lambda *_: pytest.fail("an expert ran its own stem"))
    assert np.array_equal(mixture.embed(images), found)
    experts = torch.tensor([stored[row["example_id"]][0] for row in rows])
    embeddings = torch.tensor(np.array([stored[row["example_id"]][1] for row in rows], np.float32))
    with torch.inference_mode():
        # What is stored was rounded to float16.
        np.testing.assert_allclose(mixture.decoder.align(embeddings, experts).numpy(), found, rtol=2e-3, atol=2e-3)
    assert [each.expert for each in mixture.predict(images[:5])] == experts[:5].tolist()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["experts.branch_at=layer4"], "it can branch at image, stem, layer1, layer2, layer3"),
        (["experts.branch_at=layer2", "experts.init=random"], "set init: trunk and backbone: null, or branch_at: image"),
    ],
)
def test_branch_that_cannot_be_is_refused_before_anything_is_built(
    prepared: Path, tmp_path: Path, changes: list[str], said: str
) -> None:
    assert said in refusal(invoke(tmp_path, "train-experts", "--backend", "inline", *sets(*changes)))
    assert not (prepared / "experts").exists()


STILL = ("experts.learning_rate=1.0e-12", "experts.weight_decay=0", "experts.epochs=1")
"""A training that leaves the weights where they start."""


def test_part_starts_from_the_expert_to_which_its_images_went(prepared: Path, root: Path, tmp_path: Path) -> None:
    """From the run that this one is a copy of: every image goes to its own part's expert; the dense baseline has its own."""
    run_here(tmp_path, "evaluate", *sets(f"experts.init=run:{root}", "evaluation.map_replicates=2", *STILL))
    told = payload(prepared, "matches")
    sizes = payload(prepared, "partition")["sizes"]["train"]
    assert told == {"experts": [0, 1, 2], "images": np.diag(sizes).tolist()}
    for name in ("experts/expert-0002", "baselines/dense"):
        start, trained = weights(root / name), weights(prepared / name)
        for key in ("backbone.network.blocks.2.conv1.weight", "decoder.weight", "decoder.bias"):
            torch.testing.assert_close(trained[key], start[key], atol=1e-6, rtol=0)
        assert not torch.equal(start["decoder.weight"], weights(root / "trunk")["decoder.weight"])


def test_refreshed_images_and_hashtags_start_from_the_earlier_runs_experts(root: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", real_images(700)[1::2])
    write_recipe(tmp_path, hashtags={"min_count": 8}, partition={"experts": 2})
    run_here(tmp_path, "train-experts", *sets(f"experts.init=run:{root}", "evaluation.dense_baseline=false", *STILL))
    here = tmp_path / "runs" / "small"
    told, sizes = payload(here, "matches"), payload(here, "partition")["sizes"]["train"]
    assert [sum(row) for row in told["images"]] == sizes
    assert told["experts"] == [int(np.argmax(row)) for row in told["images"]]
    names = [pq.read_table(each / "vocabulary/tags.parquet").column("tag").to_pylist() for each in (root, here)]
    assert names[0] != names[1]
    trained, start = weights(here / "experts/expert-0001"), weights(root / f"experts/expert-{told['experts'][1]:04d}")
    torch.testing.assert_close(
        trained["backbone.network.stem.0.weight"], start["backbone.network.stem.0.weight"], atol=1e-6, rtol=0
    )
    common = [(names[1].index(name), old) for old, name in enumerate(names[0]) if name in names[1]]
    assert common
    new, old = (list(rows) for rows in zip(*common, strict=True))
    torch.testing.assert_close(trained["decoder.weight"][new], start["decoder.weight"][old], atol=1e-6, rtol=0)


def test_run_from_which_nothing_can_start_is_refused_before_anything_is_built(prepared: Path, root: Path, tmp_path: Path) -> None:
    def said(*changes: str) -> str:
        return refusal(invoke(tmp_path, "evaluate", "--backend", "inline", *sets(*changes)))

    assert "there is no run in" in said("experts.init=run:nowhere")
    assert "'run:' names no run" in said("experts.init='run:'")
    assert "finish it, or name another" in said(f"experts.init=run:{prepared}")
    other = "set experts.backbone and trunk.image_size to theirs"
    assert other in said(f"experts.init=run:{root}", "experts.backbone=quicknet_w6")
    assert "set experts.loss: softmax" in said(f"experts.init=run:{root}", "experts.loss=sigmoid")
    shutil.copytree(root, tmp_path / "without", ignore=shutil.ignore_patterns("baselines"))
    assert "has no dense baseline for this run's to start from" in said(f"experts.init=run:{tmp_path / 'without'}")
    assert not (prepared / "experts").exists()


def test_finished_run_outlives_the_run_it_started_from(prepared: Path, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "earlier")
    arguments = ("train-experts", "--only", "expert-0001", *sets(f"experts.init=run:{tmp_path / 'earlier'}", *STILL))
    run_here(tmp_path, *arguments)
    before = records(prepared)
    shutil.rmtree(tmp_path / "earlier")
    run_here(tmp_path, *arguments)
    assert records(prepared) == before


def test_start_from_a_file_in_a_bucket_is_the_start_from_that_file(
    prepared: Path, root: Path, tmp_path: Path, s3_store: Store
) -> None:
    uri = s3_store.root("weights")
    folder, _, options = uri.partition("?")
    open_storage(uri).write_bytes("first.safetensors", (prepared / "trunk/model.safetensors").read_bytes())
    place = f"{folder}/first.safetensors?{options}"
    run_here(tmp_path, "train-experts", "--only", "expert-0001", *sets(f"experts.init={place}"))
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (prepared / "experts/expert-0001" / name).read_bytes() == (root / "experts/expert-0001" / name).read_bytes()
    recorded = (prepared / "experts/expert-0001/artifact.json").read_text()
    assert "etag:" in recorded
    assert "s3://" not in recorded, "where the file lies bears no identity"
