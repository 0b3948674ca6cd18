"""A rival network beside a finished mixture: trained, refitted, judged, priced and shown, and nothing of the run built anew.

Shape letters: N examples, Z unified dims.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support import copied_run, invoke, metrics, payload, records, refusal, run_here

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.models.shared_decoder import load_shared_decoder
from hardmoe.storage import open_storage

RIVAL = "evaluation.rivals={dense_tiny: {backbone: quicknet_w4, epochs: 1}}"


@pytest.fixture(scope="module")
def root(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, evaluated and reported once more, with a rival."""
    directory = tmp_path_factory.mktemp("rivals")
    kept = [path.name for path in (finished / "runs/small").iterdir() if path.name not in ("evaluation", "report")]
    root = copied_run(finished, directory, keep=kept)
    run_here(directory, "report", "--set", RIVAL)
    return root


def test_only_the_rival_is_built(root: Path, finished: Path) -> None:
    before, after = records(finished / "runs/small"), records(root)
    new = {Path(name).parent.as_posix() for name in after.keys() - before.keys()}
    assert new == {"rivals/dense_tiny/network", "rivals/dense_tiny/embeddings", "rivals/dense_tiny/decoder"}
    changed = {Path(name).parent.as_posix() for name in before if before[name] != after[name]}
    assert changed == {"evaluation", "report"}


def test_the_rival_is_judged_with_its_refitted_decoder_and_the_report_shows_it(root: Path) -> None:
    found, network = metrics(root), payload(root, "rivals/dense_tiny/network")
    assert network["architecture"]["backbone"] == "quicknet_w4"
    assert found["differences"]["mixture - dense_tiny"]["precision@1"]["value"] is not None
    page = (root / "report/index.html").read_text()
    assert "<code>dense_tiny</code>" in page
    assert "operations of training" in page
    assert "among those of other parts" in page


def test_costs_agree_with_the_records(root: Path) -> None:
    costs, told = (
        metrics(root)["costs"],
        {name: payload(root, name) for name in ("trunk", "decoder", "rivals/dense_tiny/network")},
    )
    assert costs.keys() == metrics(root)["systems"].keys()
    assert costs["trunk"]["parameters"] == costs["trunk"]["active_parameters"] == told["trunk"]["parameters"]
    assert costs["dense_tiny"]["images_seen"] == told["rivals/dense_tiny/network"]["examples_seen"]
    experts = [payload(root, f"experts/expert-{expert:04d}") for expert in range(3)]
    head = (told["trunk"]["num_features"] + 1) * told["decoder"]["num_tags"]
    backbones = [each["parameters"] - head for each in (told["trunk"], *experts)]
    assert costs["mixture"]["parameters"] == sum(backbones) + told["decoder"]["parameters"]
    assert costs["mixture"]["images_seen"] == told["trunk"]["examples_seen"] + sum(each["examples_seen"] for each in experts)
    assert costs["dense_refit"]["images_seen"] == costs["mixture"]["images_seen"]
    # Gate and expert are one network each of the same shape.
    assert costs["mixture"]["flops"] == pytest.approx(2 * costs["dense_refit"]["flops"], rel=0.05)


def test_neighbours_in_the_unified_space_are_those_of_brute_force(root: Path) -> None:
    tables = [pq.read_table(path, partitioning=None) for path in sorted(root.glob("embeddings/split=test/*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    labels = [pq.read_table(path, partitioning=None) for path in root.glob("vocabulary/labels/*.parquet")]
    tags = {row["example_id"]: set(row["tags"]) for table in labels for row in table.to_pylist()}
    rows = sorted((row for row in rows if tags[row["example_id"]]), key=lambda row: row["example_id"])
    model = load_shared_decoder(ArtifactStore(open_storage(str(root))).get("decoder"))
    experts_N = np.array([row["expert"] for row in rows])
    with torch.inference_mode():
        found = model.align(torch.tensor([row["embedding"] for row in rows]), torch.from_numpy(experts_N))
        unified_NZ = torch.nn.functional.normalize(found.double(), dim=1).numpy()
    hits = dict.fromkeys(("all", "own", "other"), 0)
    totals = dict.fromkeys(hits, 0)
    for row, similar_N in enumerate(unified_NZ @ unified_NZ.T):
        order = [int(other) for other in np.argsort(-similar_N, kind="stable") if other != row]
        same = experts_N == experts_N[row]
        chosen = {"all": order, "own": [o for o in order if same[o]], "other": [o for o in order if not same[o]]}
        for among, nearest in chosen.items():
            totals[among] += len(nearest[:10])
            hits[among] += sum(bool(tags[rows[row]["example_id"]] & tags[rows[o]["example_id"]]) for o in nearest[:10])
    for among in hits:
        share = metrics(root)["retrieval"]["mixture"][f"neighbours@10:{among}"]["value"]
        assert share == pytest.approx(hits[among] / totals[among], abs=1.01 / totals[among])  # float32 may swap equal ones
    assert metrics(root)["retrieval_differences"]["mixture - trunk"]["neighbours@10:all"]["low"] is not None


def test_a_sample_of_the_test_images_is_the_same_for_all_systems(finished: Path, tmp_path: Path) -> None:
    kept = [path.name for path in (finished / "runs/small").iterdir() if path.name not in ("evaluation", "report")]
    root = copied_run(finished, tmp_path, keep=kept)
    run_here(tmp_path, "evaluate", "--set", "evaluation.retrieval_sample=20")
    whole, some = json.loads((finished / "runs/small/evaluation/metrics.json").read_bytes()), metrics(root)
    assert whole["systems"] == some["systems"]
    assert whole["retrieval"] != some["retrieval"]
    assert some["retrieval"].keys() == whole["systems"].keys()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("evaluation.rivals={mixture: {backbone: resnet18}}", "'mixture' is the name of a system that there is anyway"),
        ("evaluation.rivals={2x: {backbone: resnet18}}", "rivals: '2x' is no name; use at most 40 of a to z"),
        (
            "evaluation.rivals={big: {backbone: resnet19}}",
            "evaluation.rivals.big: unknown backbone 'resnet19'; did you mean resnet18",
        ),
        ("evaluation.rivals={big: {epochs: 2}}", "evaluation.rivals.big.backbone"),
    ],
)
def test_rivals_that_cannot_be_are_refused(finished: Path, tmp_path: Path, setting: str, sentence: str) -> None:
    kept = [path.name for path in (finished / "runs/small").iterdir() if path.name not in ("evaluation", "report")]
    copied_run(finished, tmp_path, keep=kept)
    assert sentence in refusal(invoke(tmp_path, "evaluate", "--set", setting))
