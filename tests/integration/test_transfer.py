"""What probes say of a finished run's spaces: on its own images, and on a second dataset, against scikit-learn and brute force.

Shape letters: N images, Z dims, V tags.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from support import copied_run, invoke, metrics, payload, real_images, records, refusal, run_here

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.mixture import Mixture
from hardmoe.models.shared_decoder import load_shared_decoder
from hardmoe.storage import open_storage

CLASSES = 4


def write_second(directory: Path) -> None:
    """Images that the run has not seen, each of one class by its place in the list of icons, and two that cannot be decoded."""
    mine = {row.image for row in real_images(500)}
    others = [row for row in real_images(1500) if row.image not in mine][:240]
    rows = [(row.image, [f"class{CLASSES * index // len(others)}"]) for index, row in enumerate(others)]
    rows += [(b"no image", ["class0"]), (b"", ["class1"])]
    directory.mkdir()
    pq.write_table(pa.table({"image": [row[0] for row in rows], "label": [row[1] for row in rows]}), directory / "all.parquet")


@pytest.fixture(scope="module")
def root(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, evaluated and reported once more, with probes of both kinds."""
    directory = tmp_path_factory.mktemp("transfer")
    kept = [path.name for path in (finished / "runs/small").iterdir() if path.name not in ("evaluation", "report")]
    root = copied_run(finished, directory, keep=kept)
    write_second(directory / "second")
    second = "{path: second/*.parquet, tags_column: label, test_fraction: 0.3, validation_fraction: 0.2, shard_rows: 64}"
    run_here(directory, "report", "--set", "evaluation.probe=true", "--set", f"evaluation.transfer={second}")
    return root


def unified(root: Path, split: str, place: str = "", system: str = "mixture") -> dict[bytes, tuple[np.ndarray, int]]:
    """Of every image, its place in the space that the report speaks of, float64 [Z], and its expert."""
    folder, decoder = {
        ("", "mixture"): ("embeddings", "decoder"),
        ("", "trunk"): ("features", None),
        ("transfer/", "mixture"): ("transfer/embeddings/mixture", "decoder"),
        ("transfer/", "trunk"): ("transfer/features", None),
    }[place, system]
    found = {}
    for path in sorted(root.glob(f"{folder}/split={split}/*.parquet")):
        for row in pq.read_table(path, partitioning=None).to_pylist():
            found[row["example_id"]] = (row.get("embedding") or row.get("feature"), row.get("expert", 0))
    if decoder is None:
        return {key: (np.array(vector, float), expert) for key, (vector, expert) in found.items()}
    model = load_shared_decoder(ArtifactStore(open_storage(str(root))).get(decoder))
    with torch.inference_mode():
        vectors, experts = zip(*found.values(), strict=True)
        aligned = model.align(torch.tensor(vectors), torch.tensor(experts)).double().numpy()
    return {key: (aligned[row], experts[row]) for row, key in enumerate(found)}


def labels(root: Path, place: str) -> dict[bytes, list[int]]:
    tables = [pq.read_table(path, partitioning=None) for path in root.glob(f"{place}vocabulary/labels/*.parquet")]
    return {row["example_id"]: row["tags"] for table in tables for row in table.to_pylist() if row["tags"]}


def rows(root: Path, split: str, place: str, system: str) -> tuple[np.ndarray, list[list[int]]]:
    """Labelled images in the order of their ids."""
    tags, places = labels(root, place), unified(root, split, place, system)
    keys = sorted(key for key in places if key in tags)
    return np.array([places[key][0] for key in keys]), [tags[key] for key in keys]


def test_only_what_was_asked_for_is_built(root: Path, finished: Path) -> None:
    before, after = records(finished / "runs/small"), records(root)
    new = {Path(name).parent.as_posix() for name in after.keys() - before.keys()}
    of_second = {f"transfer/{name}" for name in ("dataset", "vocabulary", "features", "nearest", "probe")}
    assert new == {"probe"} | of_second | {f"transfer/embeddings/{name}" for name in ("mixture", "dense")}
    assert {Path(name).parent.as_posix() for name in before if before[name] != after[name]} == {"evaluation", "report"}


@pytest.mark.parametrize("place", ["", "transfer/"])
@pytest.mark.parametrize("system", ["trunk", "mixture"])
def test_linear_probe_is_that_of_scikit_learn_on_the_stored_features(root: Path, place: str, system: str) -> None:
    told = metrics(root)["transfer"]["second_dataset" if place else "own_images"]["systems"][system]
    train_NZ, tags = rows(root, "train", place, system)
    test_NZ, true = rows(root, "test", place, system)
    assert (told["fitted"]["train"], told["fitted"]["dim"]) == train_NZ.shape
    scale_Z = np.where(train_NZ.std(axis=0) > 0, train_NZ.std(axis=0), 1.0)
    repeated = np.repeat(np.arange(len(tags)), [len(some) for some in tags])
    model = LogisticRegression(C=1.0 / (told["fitted"]["penalty"] * len(tags)), tol=1e-8, max_iter=10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        weights = [1.0 / len(tags[row]) for row in repeated]
        model.fit(((train_NZ - train_NZ.mean(axis=0)) / scale_Z)[repeated], np.concatenate(tags), sample_weight=weights)
    best = model.predict((test_NZ - train_NZ.mean(axis=0)) / scale_Z)
    right = np.mean([tag in some for tag, some in zip(best, true, strict=True)])
    assert told["fitted"]["converged"]
    assert told["linear"]["precision@1"]["value"] == pytest.approx(right, abs=1.5 / len(true))  # one image may be a tie
    assert told["linear"]["precision@1"]["low"] <= right <= told["linear"]["precision@1"]["high"]


@pytest.mark.parametrize("system", ["trunk", "mixture"])
def test_votes_are_those_of_brute_force(root: Path, system: str) -> None:
    told = metrics(root)["transfer"]["second_dataset"]["systems"][system]
    train_NZ, tags = rows(root, "train", "transfer/", system)
    test_NZ, true = rows(root, "test", "transfer/", system)
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (test_NZ, train_NZ)]
    right = 0
    for similar_N, some in zip(unit[0] @ unit[1].T, true, strict=True):
        votes_V = np.zeros(CLASSES)
        for row in np.argsort(-similar_N, kind="stable")[: told["fitted"]["neighbours"]]:
            votes_V[tags[row]] += np.exp((similar_N[row] - 1.0) / 0.07)
        right += int(votes_V.argmax()) in some
    assert told["knn"]["precision@1"]["value"] == pytest.approx(right / len(true), abs=1.5 / len(true))


def test_images_of_the_second_dataset_go_to_the_expert_that_the_mixture_in_use_sends_them_to(root: Path) -> None:
    mixture, there = Mixture.load(str(root)), unified(root, "test", "transfer/")
    tables = [pq.read_table(path, partitioning=None) for path in root.glob("transfer/dataset/split=test/*.parquet")]
    images = {row["example_id"]: row["image"] for table in tables for row in table.to_pylist()}
    assert there.keys() == images.keys()
    assert mixture.route(list(images.values())).tolist() == [there[key][1] for key in images]
    in_use_NZ = mixture.embed(list(images.values()))
    np.testing.assert_allclose(in_use_NZ, np.stack([there[key][0] for key in images]), rtol=5e-3, atol=5e-3)


def test_neighbours_in_the_second_dataset_are_those_of_brute_force(root: Path) -> None:
    told = metrics(root)["transfer"]["second_dataset"]
    test_NZ, true = rows(root, "test", "transfer/", "mixture")
    unit_NZ = test_NZ / np.linalg.norm(test_NZ, axis=1, keepdims=True)
    hits = 0
    for row, similar_N in enumerate(unit_NZ @ unit_NZ.T):
        order = [int(other) for other in np.argsort(-similar_N, kind="stable") if other != row][:10]
        hits += sum(bool({*true[row]} & {*true[other]}) for other in order)
    share = told["systems"]["mixture"]["neighbours"]["neighbours@10:all"]["value"]
    assert share == pytest.approx(hits / (10 * len(true)), abs=1.01 / len(true))
    assert "neighbours" not in metrics(root)["transfer"]["own_images"]["systems"]["mixture"]  # the evaluation has them


def test_every_system_is_held_against_the_mixture_in_both(root: Path) -> None:
    transfer = metrics(root)["transfer"]
    for told in transfer.values():
        assert told["systems"].keys() == {"trunk", "dense", "dense_refit", "experts_own_decoder", "mixture"}
        assert told["differences"].keys() == {f"mixture - {name}" for name in told["systems"] if name != "mixture"}
        for system in ("trunk", "dense"):
            for probe in ("linear", "knn"):
                difference = told["differences"][f"mixture - {system}"][probe]["precision@1"]
                mine, its = (told["systems"][name][probe]["precision@1"]["value"] for name in ("mixture", system))
                assert difference["value"] == pytest.approx(mine - its)
                assert difference["low"] <= difference["value"] <= difference["high"]
    assert transfer["second_dataset"]["tags"] == CLASSES
    assert transfer["second_dataset"]["systems"]["mixture"]["linear"]["precision@5"]["reason"].startswith("precision@5 needs")


def test_what_cannot_be_decoded_is_quarantined_and_counted(root: Path) -> None:
    told = metrics(root)["transfer"]["second_dataset"]["dataset"]
    assert told["quarantined"] == 2
    assert sum(told["sizes"].values()) == payload(root, "transfer/dataset")["sizes"]["train"] + sum(
        payload(root, "transfer/dataset")["sizes"][split] for split in ("validation", "test")
    )
    assert len(pq.read_table(root / "transfer/dataset/quarantine").to_pylist()) == 2
    page = (root / "report/index.html").read_text()
    assert "What others can read off each space: the second dataset" in page
    assert "2 rows could not be used" in page


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["evaluation.transfer={path: nowhere/*.parquet}"], "evaluation.transfer: "),
        (["evaluation.transfer={pth: x}"], "unknown key 'evaluation.transfer.pth'; did you mean 'evaluation.transfer.path'?"),
        (["evaluation.transfer={validation_fraction: 0.0}"], "leaves no image to choose the probe's penalty by"),
        (["evaluation.transfer={}", "partition.method=random"], "which random parts cannot do; set partition.method: kmeans"),
        (
            ["evaluation.probe=true", "dataset.validation_fraction=0.0"],
            "evaluation.probe: true chooses its penalty on validation",
        ),
    ],
)
def test_probes_that_cannot_be_are_refused(finished: Path, settings: list[str], sentence: str) -> None:
    assert sentence in refusal(invoke(finished, "run", "--dry-run", *(a for each in settings for a in ("--set", each))))


def test_results_are_in_the_record_of_the_probe_as_well(root: Path) -> None:
    for place, role in (("probe", "own_images"), ("transfer/probe", "second_dataset")):
        assert json.loads((root / place / "results.json").read_bytes()) == metrics(root)["transfer"][role]
