"""Networks with layers of experts as trunk, experts, dense baseline and rival of one run, and what the run says about them."""

import json
from pathlib import Path

import pytest
import safetensors.torch
from support import copied_run, invoke, metrics, payload, records, refusal, run_here

from hardmoe.mixture import Mixture

MOE = "{num_experts: 4, placement: last2, k: 2, priority: true, loss_weight: 0.01}"
SETTINGS = [
    "trunk.backbone=vmoe_xs8",
    f"trunk.moe={MOE}",
    "trunk.optimizer=adamw",
    "trunk.learning_rate=0.001",
    "experts.learning_rate=0.01",
    "evaluation.rivals={soft: {backbone: vmoe_xs8, epochs: 1, moe: {num_experts: 2, router: soft, constraint: none}}}",
]
OPTIONS = [part for setting in SETTINGS for part in ("--set", setting)]


@pytest.fixture(scope="module")
def directory(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with experts in all of its networks."""
    directory = tmp_path_factory.mktemp("moe")
    copied_run(finished, directory, keep=["dataset", "vocabulary"])
    run_here(directory, "report", *OPTIONS)
    return directory


def test_every_network_has_its_layers_of_experts_and_their_record(directory: Path) -> None:
    root = directory / "runs/small"
    expected = {"num_experts": 4, "placement": "last2", "k": 2, "priority": True, "loss_weight": 0.01}
    for name in ("trunk", "experts/expert-0001", "baselines/dense"):
        assert payload(root, name)["architecture"]["moe"] == expected
        tensors = safetensors.torch.load_file(root / name / "model.safetensors")
        weights = tensors["backbone.network.encoder.layers.encoder_layer_5.mlp.experts.weight1_EDF"]
        assert list(weights.shape) == [4, 192, 768]
        assert not (weights[0] == weights[1]).all(), "experts that began alike have drifted apart"
    assert payload(root, "rivals/soft/network")["architecture"]["moe"] == {
        "num_experts": 2,
        "router": "soft",
        "constraint": "none",
    }


def test_costs_count_the_active_part_of_each(directory: Path) -> None:
    costs = metrics(directory / "runs/small")["costs"]
    per_expert = 2 * 192 * 768 + 768 + 192
    assert costs["trunk"]["parameters"] - costs["trunk"]["active_parameters"] == 2 * 2 * per_expert
    assert costs["soft"]["parameters"] == costs["soft"]["active_parameters"]
    # Five items, two experts each, in two layers, of the rival in three; a mixture passes gate and expert.
    routed = 2 * 5 * 2 * 2 * 2 * 192 * 768
    assert costs["trunk"]["routed_flops"] == routed
    assert costs["soft"]["routed_flops"] == 3 * routed // 2
    assert costs["mixture"]["routed_flops"] == 2 * routed
    assert "% routed" in (directory / "runs/small/report/index.html").read_text()


def test_evaluate_prints_the_routed_share(directory: Path) -> None:
    result = invoke(directory, "evaluate", *OPTIONS)
    assert result.returncode == 0, result.stderr
    assert "routed of it" in result.stdout


def test_mixture_of_such_networks_predicts(directory: Path, finished: Path) -> None:
    import pyarrow.parquet as pq

    images = pq.read_table(finished / "photos/0.parquet", columns=["image"]).column("image").to_pylist()[:6]
    mixture = Mixture.load(str(directory / "runs/small"))
    together = mixture.predict(images, k=3)
    assert [mixture.predict([image], k=3)[0].tags for image in images] == [found.tags for found in together]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["trunk.moe={k: 2}"], "the backbone 'quicknet_w4' has no layers of experts for `moe` to describe; take `moe` out"),
        (["experts.moe={k: 2}"], "experts: moe describes experts.backbone, which is null; set it too"),
        (["trunk.moe={k: 9, num_experts: 8}"], "trunk.moe: k: 9 is more than there are experts; set num_experts: 9"),
        (["trunk.backbone=vmoe_xs8", "trunk.moe={placement: last9}"], "moe.placement: 'last9' names no blocks"),
        (["trunk.moe={expert: 8}"], "unknown key 'trunk.moe.expert'; did you mean"),
        (
            ["evaluation.rivals={big: {backbone: moe_resnet18, moe: {router: linear}}}"],
            "evaluation.rivals.big: moe.router: linear is one of patches or pixels",
        ),
    ],
)
def test_experts_that_cannot_be_are_refused(finished: Path, tmp_path: Path, settings: list[str], sentence: str) -> None:
    copied_run(finished, tmp_path, keep=["dataset", "vocabulary"])
    options = [part for setting in settings for part in ("--set", setting)]
    assert sentence in refusal(invoke(tmp_path, "evaluate", *options))


def test_runs_without_experts_are_what_they_were(finished: Path) -> None:
    """Neither the recipe's identity nor a record says anything of layers of experts where there are none."""
    for record in (finished / "runs/small").rglob("artifact.json"):
        assert '"moe"' not in record.read_text()
    assert "routed_flops" not in (finished / "runs/small/evaluation/metrics.json").read_text()


def test_sweep_prints_every_setting_of_every_network_with_experts(directory: Path) -> None:
    """Few slots drop choices and cost less, more experts an item cost more; what is as it was gives what the evaluation has."""
    sweep = ("evaluate", "--sweep-k", "1,2", "--sweep-capacity", "0.25,0", "--no-priority", *OPTIONS)
    result = invoke(directory, *sweep)
    assert result.returncode == 0, result.stderr
    lines = [
        line.split() for line in result.stdout.splitlines()[1:] if line.startswith(("trunk", "dense", "soft", "experts_own"))
    ]
    assert len(lines) == 4 * 2 * 2
    found = {}
    for path in sorted((directory / "runs/small/moe_sweep").glob("trunk-*/artifact.json")):
        record = json.loads(path.read_text())
        setting = record["config"]["setting"]
        found[setting["k"], setting["capacity_factor"]] = record["payload"]
    assert found.keys() == {(1, 0.0), (1, 0.25), (2, 0.0), (2, 0.25)}
    assert found[2, 0.0]["usage"]["dropped"] == found[1, 0.0]["usage"]["dropped"] == 0
    # Eight images are 40 items with 80 choices: ceil(80 / 4 / 4) = 5, so 8 slots of four experts.
    assert found[2, 0.25]["usage"]["dropped"] >= 1 - 32 / 80
    assert found[1, 0.0]["flops"] == found[2, 0.0]["flops"] - 2 * 5 * 2 * 2 * 192 * 768
    own = metrics(directory / "runs/small")["systems"]["trunk"]["precision@1"]["value"]
    assert found[2, 0.0]["metrics"]["precision@1"]["value"] == pytest.approx(own, abs=0.02)
    before = records(directory / "runs/small")
    again = invoke(directory, *sweep)
    assert again.stdout == result.stdout
    assert records(directory / "runs/small") == before


def test_sweep_says_what_it_cannot_do(finished: Path, directory: Path) -> None:
    assert "which the recipe has none; set trunk.backbone" in refusal(invoke(finished, "evaluate", "--sweep-k", "1"))
    result = invoke(directory, "evaluate", "--sweep-k", "1,9", *OPTIONS)
    assert "--sweep-k 9: the layers of 'vmoe_xs8' (trunk) have 4 experts; ask for as many at most" in refusal(result)
    for arguments, sentence in (
        (("--sweep-k", "0"), "'0' is not a list of numbers of experts; write it like 1,2,4"),
        (("--sweep-capacity", "x"), "'x' is not a list of capacity factors; write it like 0.25,0.5,1"),
        (("--priority",), "--priority and --no-priority go with --sweep-k or --sweep-capacity"),
    ):
        result = invoke(finished, "evaluate", *arguments)
        assert result.returncode == 2
        assert sentence in " ".join(result.stderr.split())
