"""What a finished mixture is held against when it is asked for later: a rival network, one expert alone, the best of each image.

All of it is built beside the run, judged, priced and shown, and nothing of the run is built anew.

Shape letters: N examples, Z unified dims, V tags, K experts.
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
    """The finished run, evaluated and reported once more, with a rival and all experts."""
    directory = tmp_path_factory.mktemp("controls")
    kept = [path.name for path in (finished / "runs/small").iterdir() if path.name not in ("evaluation", "report")]
    root = copied_run(finished, directory, keep=kept)
    run_here(directory, "report", "--set", RIVAL, "--set", "evaluation.all_experts=true")
    return root


def test_only_what_was_asked_for_is_built(root: Path, finished: Path) -> None:
    before, after = records(finished / "runs/small"), records(root)
    new = {Path(name).parent.as_posix() for name in after.keys() - before.keys()}
    rival = {f"rivals/dense_tiny/{part}" for part in ("network", "embeddings", "decoder")}
    assert new == rival | {f"all_experts/{part}" for part in ("nearest", "embeddings", "losses")}
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
    assert costs.keys() == metrics(root)["systems"].keys() - {"best_single_expert", "oracle_expert"}
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


def test_one_expert_for_all_and_the_best_of_each_are_those_of_brute_force(root: Path) -> None:
    labels = [pq.read_table(path, partitioning=None) for path in root.glob("vocabulary/labels/*.parquet")]
    tags = {row["example_id"]: row["tags"] for table in labels for row in table.to_pylist()}
    weights = load_shared_decoder(ArtifactStore(open_storage(str(root))).get("decoder")).state_dict()
    p = {name: value.double().numpy() for name, value in weights.items()}

    def said(split: str) -> dict[bytes, dict[int, np.ndarray]]:
        """By image and expert, the log-probabilities of all tags."""
        found: dict[bytes, dict[int, np.ndarray]] = {}
        for path in sorted(root.glob(f"all_experts/embeddings/split={split}/*.parquet")):
            for row in pq.read_table(path, partitioning=None).to_pylist():
                expert, hidden = row["expert"], np.array(row["embedding"], float)
                unified = p["alignment.weight"][expert] @ hidden + p["alignment.bias"][expert]
                logits = p["decoder.weight"] @ unified + p["decoder.bias"]
                if tags.get(row["example_id"]):
                    found.setdefault(row["example_id"], {})[expert] = logits - np.logaddexp.reduce(logits)
        return found

    validation, test = said("validation"), said("test")
    losses = [-sum(by[expert][tags[key]].mean() for key, by in validation.items()) for expert in range(3)]
    assert payload(root, "all_experts/losses")["loss_units"] == pytest.approx([loss * 2**24 for loss in losses], rel=1e-5)
    assert payload(root, "all_experts/losses")["examples"] == len(validation)
    single = [int(by[int(np.argmin(losses))].argmax()) in tags[key] for key, by in test.items()]
    best = {key: max(by.values(), key=lambda log_p: log_p[tags[key]].mean()) for key, by in test.items()}
    oracle = [int(log_p.argmax()) in tags[key] for key, log_p in best.items()]
    found = metrics(root)["systems"]
    assert found["best_single_expert"]["precision@1"]["value"] == pytest.approx(np.mean(single), abs=1.5 / len(test))
    assert found["oracle_expert"]["precision@1"]["value"] == pytest.approx(np.mean(oracle), abs=1.5 / len(test))
    assert len(test) == metrics(root)["num_test_examples"]
    assert found["oracle_expert"]["precision@1"]["value"] >= found["mixture"]["precision@1"]["value"]


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
        ("evaluation.rivals={big: {epochs: 2}}", "evaluation.rivals.big.backbone is missing; give it a value"),
        ("partition.method=random", "evaluation.all_experts: true goes by the distance to the experts' centroids"),
    ],
)
def test_controls_that_cannot_be_are_refused(finished: Path, tmp_path: Path, setting: str, sentence: str) -> None:
    kept = [path.name for path in (finished / "runs/small").iterdir() if path.name not in ("evaluation", "report")]
    copied_run(finished, tmp_path, keep=kept)
    assert sentence in refusal(invoke(tmp_path, "evaluate", "--set", setting, "--set", "evaluation.all_experts=true"))
