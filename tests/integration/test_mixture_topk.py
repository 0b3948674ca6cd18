"""`mixture_topk` over a finished run, against NumPy: who is near, what the experts say, how it is mixed.

Shape letters: N examples, D trunk features, V tags, k experts.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import copied_run, invoke, run_here

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.errors import DataError
from hardmoe.evaluation.topk import TEMPERATURES_T, log_weights
from hardmoe.mixture import Mixture
from hardmoe.models.shared_decoder import load_shared_decoder
from hardmoe.partitioning.regroup import load_router
from hardmoe.storage import open_storage

K = 2


@pytest.fixture(scope="module")
def root(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, evaluated and reported once more, with the two nearest experts."""
    directory = tmp_path_factory.mktemp("topk")
    kept = [path.name for path in (finished / "runs/small").iterdir() if path.name not in ("evaluation", "report")]
    root = copied_run(finished, directory, keep=kept)
    run_here(directory, "report", "--set", f"evaluation.top_k={K}")
    return root


def rows(root: Path, name: str, split: str) -> dict[bytes, list[dict]]:
    """The rows of a table by example, in their order."""
    found: dict[bytes, list[dict]] = {}
    for path in sorted(root.glob(f"{name}/split={split}/**/*.parquet")):
        for row in pq.read_table(path, partitioning=None).to_pylist():
            found.setdefault(row["example_id"], []).append(row)
    return found


def labels(root: Path) -> dict[bytes, list[int]]:
    tables = [pq.read_table(path, partitioning=None) for path in root.glob("vocabulary/labels/*.parquet")]
    return {row["example_id"]: row["tags"] for table in tables for row in table.to_pylist()}


def probabilities(root: Path, mixed: list[dict]) -> np.ndarray:
    """Of one example's experts, float64 [k, V], from the decoder's weights."""
    model = load_shared_decoder(ArtifactStore(open_storage(str(root))).get("decoder"))
    p = {name: value.double().numpy() for name, value in model.state_dict().items()}
    said = []
    for row in mixed:
        z = p["alignment.weight"][row["expert"]] @ np.array(row["embedding"], float) + p["alignment.bias"][row["expert"]]
        logits = p["decoder.weight"] @ z + p["decoder.bias"]
        said.append(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
    return np.stack(said)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_nearest_experts_are_those_by_brute_force_and_the_first_is_the_examples_own(root: Path, split: str) -> None:
    router = load_router(ArtifactStore(open_storage(str(root))).get("router"))
    own, features = rows(root, "embeddings", split), rows(root, "features", split)
    found = rows(root, "topk/embeddings", split)
    assert found.keys() == features.keys() == own.keys()
    for example_id, pairs in found.items():
        transformed = router.transformed(np.array([features[example_id][0]["feature"]], np.float32))[0].astype(float)
        squared = ((router.centroids_KD.astype(float) - transformed) ** 2).sum(axis=1)
        assert [row["expert"] for row in pairs] == np.argsort(squared)[:K].tolist()
        assert [row["squared_distance"] for row in pairs] == pytest.approx(np.sort(squared)[:K].tolist())
        assert pairs[0]["expert"] == own[example_id][0]["expert"]
        # Another batch of the same images: equal up to what float16 rounds.
        np.testing.assert_allclose(pairs[0]["embedding"], own[example_id][0]["embedding"], rtol=2e-3, atol=2e-3)


def test_temperature_is_the_best_on_the_validation_split_of_those_tried(root: Path) -> None:
    told, losses = json.loads((root / "topk/temperature/artifact.json").read_bytes())["payload"], []
    tags = labels(root)
    mixed = {key: pairs for key, pairs in rows(root, "topk/embeddings", "validation").items() if tags.get(key)}
    said = {key: probabilities(root, pairs) for key, pairs in mixed.items()}
    for temperature in TEMPERATURES_T:
        total = 0.0
        for key, pairs in mixed.items():
            squared = np.array([row["squared_distance"] for row in pairs])
            weights = np.exp(-(squared - squared.min()) / temperature)
            total -= np.log((weights / weights.sum()) @ said[key])[tags[key]].mean()
        losses.append(total / len(mixed))
    assert told["temperature"] == TEMPERATURES_T[int(np.argmin(losses))]
    assert told["validation_loss"] == pytest.approx(min(losses), rel=1e-5)
    assert told["validation_loss_top1"] == pytest.approx(losses[0], rel=1e-5)
    assert told["validation_loss"] <= told["validation_loss_top1"]


def test_metrics_are_those_of_the_mixed_probabilities(root: Path) -> None:
    metrics = json.loads((root / "evaluation/metrics.json").read_bytes())
    temperature = json.loads((root / "topk/temperature/artifact.json").read_bytes())["payload"]["temperature"]
    tags, hits = labels(root), []
    for key, pairs in rows(root, "topk/embeddings", "test").items():
        if tags.get(key):
            weights = np.exp(log_weights(np.array([[row["squared_distance"] for row in pairs]]), temperature)[0])
            hits.append(int((weights @ probabilities(root, pairs)).argmax()) in tags[key])
    assert metrics["systems"]["mixture_topk"]["precision@1"]["value"] == pytest.approx(np.mean(hits))
    assert metrics["differences"]["mixture - mixture_topk"]["map"]["value"] is not None
    assert metrics["num_test_examples"] == len(hits)
    assert "several of the nearest experts, mixed" in (root / "report/index.html").read_text()


def test_a_mixture_in_use_says_what_was_judged(root: Path) -> None:
    mixture = Mixture.load(str(root))
    temperature = json.loads((root / "topk/temperature/artifact.json").read_bytes())["payload"]["temperature"]
    images = {key: found[0]["image"] for key, found in list(rows(root, "dataset", "test").items())[:12]}
    judged = rows(root, "topk/embeddings", "test")
    for key, prediction in zip(images, mixture.predict(list(images.values()), k=3, experts=K), strict=True):
        weights = np.exp(log_weights(np.array([[row["squared_distance"] for row in judged[key]]]), temperature)[0])
        expected = weights @ probabilities(root, judged[key])
        assert prediction.expert == judged[key][0]["expert"]
        assert prediction.probabilities == pytest.approx(np.sort(expected)[::-1][:3].tolist(), rel=2e-2)
        assert expected[mixture.tags.index(prediction.tags[0])] == pytest.approx(expected.max(), rel=2e-2)
    with pytest.raises(DataError, match=r"experts=3 needs weights fitted for as many, which this run has for 2; .*top_k: 3"):
        mixture.predict(list(images.values()), experts=3)


def test_a_run_without_weights_for_several_experts_says_how_to_fit_them(finished: Path) -> None:
    with pytest.raises(DataError, match=r"which this run has none of; run `hardmoe evaluate` with evaluation\.top_k: 2"):
        Mixture.load(str(finished / "runs/small")).predict([], experts=2)


def test_weights_are_those_of_a_softmax_from_one_expert_to_all_alike() -> None:
    squared_Nk = np.array([[1.0, 1.5, 4.0], [2.0, 2.0, 3.0]])
    expected_Nk = np.exp(-squared_Nk / 0.5) / np.exp(-squared_Nk / 0.5).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(log_weights(squared_Nk, 0.5)), expected_Nk)
    np.testing.assert_allclose(np.exp(log_weights(squared_Nk, TEMPERATURES_T[0])), [[1, 0, 0], [0.5, 0.5, 0]], atol=1e-12)
    np.testing.assert_allclose(np.exp(log_weights(squared_Nk, TEMPERATURES_T[-1])), np.full((2, 3), 1 / 3), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("evaluation.top_k=4",), "evaluation.top_k is 4, but there are 3 experts (partition.experts)"),
        (("evaluation.top_k=2", "partition.method=random"), "evaluation.top_k: 2 goes by the distance to the experts' centroids"),
    ],
)
def test_several_experts_that_cannot_be_are_refused(finished: Path, settings: tuple[str, ...], sentence: str) -> None:
    result = invoke(finished, "run", "--dry-run", *(a for setting in settings for a in ("--set", setting)))
    assert result.returncode == 1
    assert sentence in result.stderr
