"""Features computed elsewhere: joined on the id, they give the tables that the trunk's own would; and every refusal."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3 import Store
from support import copied_run, invoke, metrics, real_images, refusal, run_here, snapshot, succeed, write_recipe

from hardmoe.errors import DataError
from hardmoe.features import external as external_module
from hardmoe.mixture import Mixture
from hardmoe.storage import open_storage

KEPT = ("dataset", "vocabulary", "trunk", "baselines")
"""What a run has in common with one whose features come from elsewhere."""
BUILD = ("partition", "--backend", "inline")


def features_of(root: Path) -> tuple[list[bytes], np.ndarray]:
    """Ids and features of a run, shard after shard."""
    table = pa.concat_tables([pq.read_table(path) for path in sorted(root.glob("features/split=*/*.parquet"))])
    return table.column("example_id").to_pylist(), np.stack(table.column("feature").to_pylist())


def write_features(path: Path, ids: Any, vectors: np.ndarray, kind: str = "float", **options: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    item = {"halffloat": pa.float16(), "float": pa.float32(), "double": pa.float64()}[kind]
    column = pa.array([row.tolist() for row in vectors.astype(np.float64)], pa.list_(pa.float64())).cast(pa.list_(item))
    pq.write_table(pa.table({"example_id": ids, "remark": pa.nulls(len(vectors)), "feature": column}), path, **options)


def prepare(finished: Path, directory: Path, **changes: Any) -> Path:
    """A run of which the dataset and the trunk are there, and a recipe that takes features from `theirs/*.parquet`."""
    root = copied_run(finished, directory, keep=KEPT)
    write_recipe(directory, features={"path": "theirs/*.parquet"}, **changes)
    return root


@pytest.fixture(scope="module")
def external(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run on the small run's own features, out of three files of other forms and in another order."""
    directory = tmp_path_factory.mktemp("external")
    prepare(finished, directory)
    ids, vectors = features_of(finished / "runs" / "small")
    order = np.random.default_rng(0).permutation(len(ids))
    ids, vectors = [ids[row] for row in order], vectors[order]
    hexadecimal = pa.array([identity.hex() for identity in ids[:200]])
    write_features(directory / "theirs" / "a.parquet", hexadecimal, vectors[:200], row_group_size=7)
    write_features(directory / "theirs" / "b.parquet", pa.array(ids[200:], pa.binary()), vectors[200:], "double")
    # Rows that nobody asked for, and some that are given twice with the same values.
    strangers = [bytes([number]) * 16 for number in range(9)] + ids[:5]
    many = np.concatenate([np.ones((9, vectors.shape[1]), np.float16), vectors[:5]])
    write_features(directory / "theirs" / "c.parquet", pa.array(strangers, pa.binary(16)), many, "halffloat")
    run_here(directory, "run")
    return directory


def test_external_features_make_the_tables_that_the_trunk_s_own_make(external: Path, finished: Path) -> None:
    """Down to the partition, byte for byte: the files' order, forms and cuts leave no trace."""
    root, theirs = external / "runs" / "small", finished / "runs" / "small"
    for artifact in ("features", "router", "partition"):
        ours = {path.relative_to(root): path for path in root.glob(f"{artifact}/**/*.parquet") if "_progress" not in path.parts}
        assert ours or artifact == "router"
        for relative, path in ours.items():
            assert path.read_bytes() == (theirs / relative).read_bytes(), relative
    assert (root / "router/centroids.npy").read_bytes() == (theirs / "router/centroids.npy").read_bytes()
    payload = json.loads((root / "features/artifact.json").read_text())["payload"]
    own = json.loads((theirs / "features/artifact.json").read_text())["payload"]
    assert payload == {**own, "extra_rows": 9}


def test_external_features_cut_into_many_units_and_runs_make_the_same_tables(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a large collection is: several units per file, several batches and runs per unit."""
    for name, value in {"_UNIT_ROWS": 90, "_BATCH_ROWS": 16, "_RUN_BYTES": 2000}.items():
        monkeypatch.setattr(external_module, name, value)
    root, theirs = prepare(finished, tmp_path), finished / "runs" / "small"
    ids, vectors = features_of(theirs)
    write_features(tmp_path / "theirs" / "a.parquet", pa.array(ids[::-1], pa.binary()), vectors[::-1], row_group_size=40)
    write_features(tmp_path / "theirs" / "b.parquet", pa.array([], pa.binary()), vectors[:0])
    run_here(tmp_path, "partition")
    paths = sorted(path.relative_to(root) for path in root.glob("features/split=*/*.parquet"))
    assert len(paths) > 3
    for relative in paths:
        assert (root / relative).read_bytes() == (theirs / relative).read_bytes()


def test_run_on_external_features_judges_every_system_but_the_trunk(external: Path, finished: Path) -> None:
    systems, own = (metrics(directory / "runs" / "small")["systems"] for directory in (external, finished))
    assert set(own) - set(systems) == {"trunk"}
    assert systems == {name: own[name] for name in systems}
    page = (external / "runs/small/report/index.html").read_text()
    assert "features that were computed elsewhere" in page
    assert "features that were computed elsewhere" not in (finished / "runs/small/report/index.html").read_text()


def test_finished_run_on_external_features_opens_without_the_files(external: Path, tmp_path: Path) -> None:
    invoke(external, "run", "--dry-run")  # whoever looks first after a file was touched digests it anew
    before = snapshot(external / "runs")
    succeed(external, "run", "--backend", "inline")
    assert snapshot(external / "runs") == before
    shutil.move(external / "theirs", tmp_path / "theirs")
    try:
        assert "\n0 of " in invoke(external, "run", "--dry-run").stdout
        succeed(external, "verify")
    finally:
        shutil.move(tmp_path / "theirs", external / "theirs")


def test_changed_external_features_are_refused_as_another_recipe(external: Path) -> None:
    path = external / "theirs" / "c.parquet"
    kept = path.read_bytes()
    write_features(path, pa.array([b"x" * 16]), np.ones((1, 3)))
    try:
        assert "external.sha256" in refusal(invoke(external, "run"))
    finally:
        path.write_bytes(kept)


def test_mixture_of_external_features_cannot_route_images_and_says_so(external: Path) -> None:
    with pytest.raises(DataError, match=r"computed elsewhere \(features\.path\).*take a run without features\.path"):
        Mixture.load(str(external / "runs" / "small"))


Spoil = Callable[[list[bytes], np.ndarray], tuple[Any, np.ndarray]]


def _differing(ids: list[bytes], vectors: np.ndarray) -> tuple[Any, np.ndarray]:
    return pa.array([*ids, ids[3]], pa.binary()), np.concatenate([vectors, vectors[4:5]])


def _not_finite(ids: list[bytes], vectors: np.ndarray) -> tuple[Any, np.ndarray]:
    vectors = vectors.copy()
    vectors[11, 2] = np.nan
    return pa.array(ids, pa.binary()), vectors


def _some_missing(ids: list[bytes], vectors: np.ndarray) -> tuple[Any, np.ndarray]:
    return pa.array(ids[4:], pa.binary()), vectors[4:]


def _of_others(ids: list[bytes], vectors: np.ndarray) -> tuple[Any, np.ndarray]:
    return pa.array([bytes(16)] * 3, pa.binary()), vectors[:3]


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (_some_missing, 1, "4 of 500 examples have no feature in features.path, such as "),
        (_differing, 3, "features.path has two different features of example"),
        (_not_finite, 3, "theirs.parquet: 1 features are not finite in float16"),
        (lambda ids, vectors: (pa.array(range(500)), vectors), 1, "theirs.parquet: column 'example_id' is int64, but this"),
        (_of_others, 1, "none of the 3 rows of features.path is of an example"),
        (lambda ids, vectors: (pa.array(["cat"]), vectors[:1]), 3, "'cat' in column 'example_id' is no example id"),
    ],
    ids=["missing", "differing", "not-finite", "wrong-type", "other-ids", "no-id"],
)
def test_features_that_do_not_fit_the_dataset_are_refused(
    finished: Path, tmp_path: Path, spoil: Spoil, code: int, message: str
) -> None:
    prepare(finished, tmp_path)
    ids, vectors = features_of(finished / "runs" / "small")
    spoiled, rows = spoil(ids, vectors)
    write_features(tmp_path / "theirs" / "theirs.parquet", spoiled, rows)
    result = invoke(tmp_path, *BUILD)
    assert result.returncode == code, result.stderr
    assert message in result.stderr


def test_files_of_different_widths_are_refused(finished: Path, tmp_path: Path) -> None:
    prepare(finished, tmp_path)
    ids, vectors = features_of(finished / "runs" / "small")
    write_features(tmp_path / "theirs" / "a.parquet", pa.array(ids[:100], pa.binary()), vectors[:100])
    write_features(tmp_path / "theirs" / "b.parquet", pa.array(ids[100:], pa.binary()), vectors[100:, :3])
    width = vectors.shape[1]
    assert f"features of different widths [3, {width}]" in refusal(invoke(tmp_path, *BUILD))


def test_files_that_are_none_or_no_parquet_are_refused_naming_the_key(finished: Path, tmp_path: Path) -> None:
    prepare(finished, tmp_path)
    assert "features.path" in (sentence := refusal(invoke(tmp_path, *BUILD)))
    assert "matches no file" in sentence
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a.parquet").write_text("no table")
    sentence = refusal(invoke(tmp_path, *BUILD))
    assert "a.parquet is not a whole Parquet file" in sentence
    assert "correct features.path" in sentence


def test_features_in_an_object_store_are_read_like_those_on_disk(finished: Path, tmp_path: Path, s3_store: Store) -> None:
    place, _, options = s3_store.root("their own").partition("?")
    copied_run(finished, tmp_path, keep=["dataset"])
    ids, vectors = features_of(finished / "runs" / "small")
    storage = open_storage(f"{place}?{options}")
    for number in range(2):
        write_features(tmp_path / "local" / "a.parquet", pa.array(ids[number::2], pa.binary()), vectors[number::2])
        storage.write_bytes(f"deep/{number}.parquet", (tmp_path / "local" / "a.parquet").read_bytes())
    write_recipe(tmp_path, features={"path": f"{place}/deep/*.parquet?{options}"})
    run_here(tmp_path, "partition")
    root, theirs = tmp_path / "runs" / "small", finished / "runs" / "small"
    for path in theirs.glob("features/split=*/*.parquet"):
        assert (root / path.relative_to(theirs)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("number", [int, str])
def test_features_are_joined_on_the_user_s_own_keys(tmp_path: Path, number: type) -> None:
    examples = real_images(60)
    keys = [number(1000 + 7 * index) for index in range(60)]
    columns = {"image": [row.image for row in examples], "hashtags": [list(row.tags) for row in examples], "name": keys}
    (tmp_path / "photos").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "photos" / "0.parquet")
    vectors = np.random.default_rng(2).normal(size=(60, 5)).astype(np.float16)
    write_features(tmp_path / "theirs" / "a.parquet", pa.array(keys[::-1]), vectors[::-1])
    dataset = {"id_column": "name", "near_duplicates": "none", "shard_rows": 16, "test_fraction": 0.2, "validation_fraction": 0.2}
    write_recipe(
        tmp_path,
        dataset=dataset,
        features={"path": "theirs/a.parquet"},
        hashtags={"min_count": 2},
        partition={"experts": 2},
    )
    run_here(tmp_path, "partition")
    images = {row.image: vector for row, vector in zip(examples, vectors, strict=True)}
    root, seen = tmp_path / "runs" / "small", 0
    for path in sorted(root.glob("dataset/split=*/*.parquet")):
        rows = pq.read_table(path).to_pylist()
        found = pq.read_table(root / "features" / path.relative_to(root / "dataset")).to_pylist()
        assert [row["example_id"] for row in rows] == [row["example_id"] for row in found]
        for row, feature in zip(rows, found, strict=True):
            assert feature["feature"] == images[row["image"]].tolist()
        seen += len(rows)
    assert seen == 60
