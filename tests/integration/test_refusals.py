"""A finished run that may refuse: its limits and curve against NumPy, and what refuses in use.

Shape letters: N images, V tags.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import copied_run, invoke, metrics, payload, records, refusal, run_here

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.errors import DataError
from hardmoe.mixture import Mixture, UseOptions
from hardmoe.models.shared_decoder import load_shared_decoder
from hardmoe.partitioning.regroup import load_router
from hardmoe.storage import open_storage

COVERAGE = 0.8


@pytest.fixture(scope="module")
def root(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, evaluated and reported once more, with refusals."""
    directory = tmp_path_factory.mktemp("abstention")
    kept = [path.name for path in (finished / "runs/small").iterdir() if path.name not in ("evaluation", "report")]
    root = copied_run(finished, directory, keep=kept)
    run_here(directory, "report", "--set", "evaluation.abstention=true")
    return root


def rows(root: Path, name: str) -> dict[bytes, dict]:
    """The rows of a table's shards by example."""
    tables = [pq.read_table(path, partitioning=None) for path in sorted(root.glob(f"{name}/*.parquet"))]
    return {row["example_id"]: row for table in tables for row in table.to_pylist()}


def distances(root: Path, split: str) -> dict[bytes, float]:
    """From every image to its nearest centroid, from the features."""
    router = load_router(ArtifactStore(open_storage(str(root))).get("router"))
    found = {}
    for key, row in rows(root, f"features/split={split}").items():
        transformed = router.transformed(np.array([row["feature"]], np.float32))[0].astype(float)
        found[key] = float(np.sqrt(((router.centroids_KD.astype(float) - transformed) ** 2).sum(axis=1).min()))
    return found


def test_only_what_was_asked_for_is_built(root: Path, finished: Path) -> None:
    before, after = records(finished / "runs/small"), records(root)
    new = {Path(name).parent.as_posix() for name in after.keys() - before.keys()}
    assert new == {"abstention/nearest", "abstention/limits"}
    assert {Path(name).parent.as_posix() for name in before if before[name] != after[name]} == {"evaluation", "report"}
    assert "If the mixture may refuse" in (root / "report/index.html").read_text()


def test_curve_is_that_of_brute_force_by_both_rules(root: Path) -> None:
    weights = load_shared_decoder(ArtifactStore(open_storage(str(root))).get("decoder")).state_dict()
    p = {name: value.double().numpy() for name, value in weights.items()}
    tags = {key: row["tags"] for key, row in rows(root, "vocabulary/labels").items()}
    doubts: dict[str, dict[str, dict[bytes, float]]] = {}
    right: dict[bytes, bool] = {}
    for split in ("validation", "test"):
        doubts[split] = {"distance": distances(root, split), "probability": {}}
        for key, row in rows(root, f"embeddings/split={split}").items():
            unified = p["alignment.weight"][row["expert"]] @ np.array(row["embedding"], float)
            logits = p["decoder.weight"] @ (unified + p["alignment.bias"][row["expert"]]) + p["decoder.bias"]
            doubts[split]["probability"][key] = 1.0 - float(np.exp(logits.max() - np.logaddexp.reduce(logits)))
            right[key] = int(logits.argmax()) in tags[key]
    found = metrics(root)["abstention"]
    judged = [key for key in doubts["test"]["distance"] if tags[key]]
    assert found["examples"] == len(judged)
    for point in found["curve"]:
        for rule in ("distance", "probability"):
            values = sorted(doubts["validation"][rule].values())
            limit = values[int(np.ceil(point["coverage"] * len(values) - 1e-9)) - 1] if point["coverage"] < 1 else np.inf
            answered = [key for key in judged if doubts["test"][rule][key] <= limit + 1e-6]
            slack = 1.5 / len(judged)  # float32 may move one image across
            assert point[rule]["answered"]["value"] == pytest.approx(len(answered) / len(judged), abs=slack)
            if answered:
                value = np.mean([right[key] for key in answered])
                assert point[rule]["precision@1"]["value"] == pytest.approx(value, abs=2.5 / len(answered))
    last = found["curve"][-1]
    assert last["distance"]["precision@1"]["value"] == metrics(root)["systems"]["mixture"]["precision@1"]["value"]
    risks = [1 - point["distance"]["precision@1"]["value"] for point in found["curve"]]
    assert found["area"]["distance"]["value"] == pytest.approx(np.mean(risks))
    assert found["area"]["difference"]["low"] <= found["area"]["difference"]["high"]


def test_in_use_images_beyond_the_kept_distance_get_no_tags_and_others_the_same(root: Path) -> None:
    far, images = distances(root, "test"), {key: row["image"] for key, row in rows(root, "dataset/split=test").items()}
    limit = float(np.interp(COVERAGE, np.arange(1, 1000) / 1000, payload(root, "abstention/limits")["distances"]))
    kept = sorted(distances(root, "validation").values())
    assert kept[int(np.ceil(COVERAGE * len(kept))) - 1] == pytest.approx(limit, rel=1e-6)
    clear = [key for key in images if abs(far[key] / limit - 1) > 1e-3]  # another batch moves the last bits
    plain = Mixture.load(str(root)).predict([images[key] for key in clear], k=3)
    refusing = Mixture.load(str(root), UseOptions(coverage=COVERAGE)).predict([images[key] for key in clear], k=3)
    refused = [far[key] > limit for key in clear]
    assert 0 < sum(refused) < len(refused) / 2
    for without, with_limit, is_refused in zip(plain, refusing, refused, strict=True):
        assert with_limit.expert == without.expert
        assert (with_limit.tags, with_limit.probabilities) == (([], []) if is_refused else (without.tags, without.probabilities))


def test_the_command_line_refuses_the_same_images(root: Path, tmp_path: Path) -> None:
    images = {key: row["image"] for key, row in rows(root, "dataset/split=test").items()}
    for name, data in zip("abcdefghijkl", images.values(), strict=False):
        (tmp_path / f"{name}.png").write_bytes(data)
    result = invoke(tmp_path, "predict", str(tmp_path), "--root", str(root), "-k", "2", "--coverage", "0.5")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    expected = Mixture.load(str(root), UseOptions(coverage=0.5)).predict(sorted(tmp_path.glob("*.png")), k=2)
    assert [line["tags"] for line in lines] == [each.tags for each in expected]
    assert {len(line["tags"]) for line in lines} == {0, 2}
    out = tmp_path / "tables"
    for coverage in ("0.5", "0.5"):  # the second time nothing is left to do
        result = invoke(
            tmp_path, "predict", str(tmp_path / "a.png"), "--root", str(root), "--out", str(out), "--coverage", coverage
        )
        assert result.returncode == 0, result.stderr
    assert "asked.coverage" in refusal(
        invoke(tmp_path, "predict", str(tmp_path / "a.png"), "--root", str(root), "--out", str(out))
    )


def test_a_run_that_kept_no_distances_says_how_to_keep_them(finished: Path, root: Path) -> None:
    with pytest.raises(DataError, match=r"has not kept; run `hardmoe evaluate` with evaluation\.abstention: true"):
        Mixture.load(str(finished / "runs/small"), UseOptions(coverage=0.9))
    with pytest.raises(DataError, match=r"coverage 1 is no share of images to answer; give one from 0\.001 to 0\.999"):
        Mixture.load(str(root), UseOptions(coverage=1.0))


def test_random_parts_have_no_distances(finished: Path) -> None:
    settings = ("--set", "evaluation.abstention=true", "--set", "partition.method=random")
    sentence = refusal(invoke(finished, "run", "--dry-run", *settings))
    assert "evaluation.abstention: true goes by the distance to the experts' centroids" in sentence
