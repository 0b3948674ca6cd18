"""A partition that a column of the dataset gives: every example where the column says, and a router made of the parts' means."""

import hashlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from support import copied_run, hardmoe, invoke, payload, real_images, records, refusal, run_here, write_recipe

from hardmoe.data.schemas import SPLITS
from hardmoe.data.sources.base import RawExample
from hardmoe.mixture import Mixture

IMAGES = real_images(300)
NAMES = ("circle", "north", "zebra")
BUILD = ("partition", "--backend", "inline")
GIVEN: dict[str, Any] = {"dataset": {"part_column": "cluster"}, "partition": {"method": "given"}}


def name_of(image: bytes) -> str:
    """A part that has to do with nothing else that is known of the image."""
    return NAMES[hashlib.sha256(b"part" + image).digest()[0] % 3]


def identity(image: bytes) -> bytes:
    return hashlib.sha256(image).digest()[:16]


def write_parts(directory: Path, parts: list[Any], images: list[RawExample] = IMAGES, kind: Any = None) -> None:
    """Two Parquet files with a column `cluster`."""
    (directory / "photos").mkdir(parents=True)
    for index in range(2):
        chosen = images[index::2]
        columns = {"image": [row.image for row in chosen], "hashtags": [list(row.tags) for row in chosen]}
        table = pa.table({**columns, "cluster": pa.array(parts[index::2], kind)})
        pq.write_table(table, directory / "photos" / f"{index}.parquet", row_group_size=64)


def rows(root: Path, pattern: str) -> list[dict[str, Any]]:
    """All rows of some Parquet files, read without hardmoe."""
    return [row for path in sorted(root.glob(pattern)) for row in pq.read_table(path, partitioning=None).to_pylist()]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a run with given parts, and with copies for further experts, was made to the end."""
    directory = tmp_path_factory.mktemp("given")
    write_parts(directory, [name_of(row.image) for row in IMAGES])
    write_recipe(directory, **{**GIVEN, "partition": {"method": "given", "overlap": 1.05, "out_of_part_fraction": 0.1}})
    run_here(directory, "report")
    return directory


@pytest.fixture(scope="module")
def given(project: Path) -> Path:
    return project / "runs" / "small"


@pytest.fixture(scope="module")
def wanted() -> dict[bytes, int]:
    """The part of every image by the column, names numbered in sorted order."""
    return {identity(row.image): NAMES.index(name_of(row.image)) for row in IMAGES}


def features_of(root: Path, split: str = "*") -> tuple[list[bytes], NDArray[np.float32]]:
    """Ids and unit features, float32 as the router has them."""
    found = {row["example_id"]: row["feature"] for row in rows(root, f"features/split={split}/*.parquet")}
    features_ND = np.array(list(found.values()), np.float64)
    lengths_N = np.sqrt((features_ND**2).sum(axis=1, keepdims=True))
    return list(found), (features_ND / lengths_N).astype(np.float32)


def test_every_example_of_every_split_is_in_the_part_that_the_column_says(given: Path, wanted: dict[bytes, int]) -> None:
    found: dict[bytes, tuple[str, int]] = {}
    for split in SPLITS:
        for expert in range(3):
            part = rows(given, f"partition/split={split}/expert={expert:04d}/*.parquet")
            assert part
            found |= {row["example_id"]: (split, expert) for row in part}
        assert {key for key, (of, _) in found.items() if of == split} == {
            row["example_id"] for row in rows(given, f"dataset/split={split}/*.parquet")
        }
    assert {key: expert for key, (_, expert) in found.items()} == wanted
    assert payload(given, "dataset")["parts"] == {"column": "cluster", "kind": "names", "values": list(NAMES)}


def test_table_of_parts_goes_row_by_row_with_the_shard_of_its_name(given: Path, wanted: dict[bytes, int]) -> None:
    shards = sorted(given.glob("dataset/split=*/*.parquet"))
    tables = sorted(given.glob("dataset/parts/split=*/*.parquet"))
    assert [path.relative_to(given / "dataset/parts") for path in tables] == [p.relative_to(given / "dataset") for p in shards]
    for shard, table in zip(shards, tables, strict=True):
        assert [str(field.type) for field in pq.read_schema(table)] == ["fixed_size_binary[16]", "int32"]
        parts = pq.read_table(table, partitioning=None).to_pylist()
        assert [row["example_id"] for row in parts] == pq.read_table(shard, partitioning=None).column("example_id").to_pylist()
        assert all(row["part"] == wanted[row["example_id"]] for row in parts)


def test_centroids_are_the_means_of_the_parts_training_features(given: Path, wanted: dict[bytes, int]) -> None:
    """To the last bit: the sums are exact, so the mean is the true one, rounded."""
    keys, features_ND = features_of(given, "train")
    parts_N = np.array([wanted[key] for key in keys])
    centroids_KD = np.load(given / "router" / "centroids.npy", allow_pickle=False)
    grid_ND = np.rint(features_ND.astype(np.float64) * 2.0**32).astype(np.int64)
    for part in range(3):
        sums_D = [sum(map(int, column)) for column in grid_ND[parts_N == part].T]
        count = int((parts_N == part).sum())
        expected_D = [float(Fraction(total, 2**32)) / count for total in sums_D]
        np.testing.assert_array_equal(centroids_KD[part], np.array(expected_D).astype(np.float32))
    assert payload(given, "router")["objective"] == []


def test_record_counts_whom_the_router_would_send_elsewhere(given: Path, wanted: dict[bytes, int]) -> None:
    centroids_KD = np.load(given / "router" / "centroids.npy", allow_pickle=False).astype(np.float64)
    counts = {}
    for split in SPLITS:
        keys, features_ND = features_of(given, split)
        nearest_N = ((features_ND[:, None].astype(np.float64) - centroids_KD) ** 2).sum(-1).argmin(axis=1)
        counts[split] = int(sum(wanted[key] != nearest for key, nearest in zip(keys, nearest_N, strict=True)))
    assert payload(given, "partition")["routed_elsewhere"] == counts
    assert min(counts.values()) > 0, "parts drawn by chance lie nowhere together"


def test_distances_are_to_the_own_part_and_to_the_nearest_other_one(given: Path, wanted: dict[bytes, int]) -> None:
    centroids_KD = np.load(given / "router" / "centroids.npy", allow_pickle=False).astype(np.float64)
    keys, features_ND = features_of(given)
    distances_NK = np.sqrt(((features_ND[:, None].astype(np.float64) - centroids_KD) ** 2).sum(-1))
    assigned = {row["example_id"]: row for row in rows(given, "partition/assignments/*.parquet") if row["primary"]}
    for key, distances_K in zip(keys, distances_NK, strict=True):
        others = [expert for expert in np.argsort(distances_K).tolist() if expert != wanted[key]]
        row = assigned[key]
        assert (row["expert"], row["second"]) == (wanted[key], others[0])
        assert row["distance"] == pytest.approx(distances_K[wanted[key]], rel=1e-6)
        assert row["second_distance"] == pytest.approx(distances_K[others[0]], rel=1e-6)


def test_example_nearer_to_another_part_than_to_its_own_trains_there_as_well(given: Path) -> None:
    assigned = rows(given, "partition/assignments/*.parquet")
    copies = {(row["example_id"], row["expert"]) for row in assigned if not row["primary"]}
    training = [row for row in assigned if row["primary"] and row["split"] == "train"]
    near = {(row["example_id"], row["second"]) for row in training if row["second_distance"] <= 1.05 * row["distance"]}
    assert near <= copies
    assert sum(payload(given, "partition")["extra"]["overlap"]) == len(near)
    assert any(row["second_distance"] < row["distance"] for row in training)


def test_mixture_sends_new_images_to_the_nearest_mean(given: Path) -> None:
    mixture = Mixture.load(str(given))
    keys, features_ND = features_of(given, "test")
    centroids_KD = np.load(given / "router" / "centroids.npy", allow_pickle=False).astype(np.float64)
    nearest_N = ((features_ND[:, None].astype(np.float64) - centroids_KD) ** 2).sum(-1).argmin(axis=1)
    images = {identity(row.image): row.image for row in IMAGES}
    assert mixture.route([images[key] for key in keys]).tolist() == nearest_N.tolist()


def test_page_and_table_say_that_a_column_decided(project: Path, given: Path) -> None:
    assert "A column of the dataset says which part" in (given / "report" / "index.html").read_text()
    told, elsewhere = invoke(project, *BUILD).stdout, payload(given, "partition")["routed_elsewhere"]
    sizes = payload(given, "dataset")["sizes"]
    assert f"to another part than the one given: {elsewhere['train']} of {sizes['train']} train" in told
    assert "from others: overlap" in told


def test_ray_gives_the_same_records_as_inline(project: Path, given: Path, tmp_path: Path) -> None:
    other = copied_run(project, tmp_path, keep=("dataset", "vocabulary", "trunk", "features"))
    result = hardmoe(tmp_path, "partition", "--backend", "ray", "--parallel", "2", cores=2)
    assert result.returncode == 0, result.stderr
    assert records(other) == {name: body for name, body in records(given).items() if name in records(other)}
    assert {"router/artifact.json", "partition/artifact.json"} <= records(other).keys()


def partition(directory: Path, **changes: Any) -> Path:
    """Build up to the partition; returns the root."""
    write_recipe(directory, **changes)
    run_here(directory, "partition")
    return directory / "runs" / "small"


def test_sharding_and_references_change_neither_router_nor_parts(given: Path, tmp_path: Path) -> None:
    write_parts(tmp_path, [name_of(row.image) for row in IMAGES])
    settings = {"method": "given", "overlap": 1.05, "out_of_part_fraction": 0.1}
    other = partition(tmp_path, dataset={"part_column": "cluster", "shard_rows": 50, "store": "reference"}, partition=settings)
    assert payload(other, "dataset")["store"] == "reference"
    assert (other / "router/centroids.npy").read_bytes() == (given / "router/centroids.npy").read_bytes()
    assert payload(other, "partition") == payload(given, "partition")
    first, second = (
        {str(path.relative_to(top)): path.read_bytes() for path in top.glob("partition/[se]*/*/**/*.parquet")}
        for top in (given, other)
    )
    assert first == second and len(first) == 12


def test_column_of_numbers_gives_these_numbers_and_may_lie_unused(tmp_path: Path) -> None:
    """The dataset's own shards are those without the column; k-means may ignore it."""
    numbers = [2 - NAMES.index(name_of(row.image)) for row in IMAGES]
    write_parts(tmp_path / "a", numbers, kind=pa.int16())
    write_parts(tmp_path / "b", numbers, kind=pa.int16())
    told = partition(tmp_path / "a", dataset={"part_column": "cluster"})
    plain = partition(tmp_path / "b")
    shards = [{str(p.relative_to(top)): p.read_bytes() for p in top.glob("dataset/split=*/*")} for top in (told, plain)]
    assert shards[0] == shards[1]
    assert not (plain / "dataset" / "parts").exists()
    assert "parts" not in payload(plain, "dataset")
    assert (told / "router/centroids.npy").read_bytes() == (plain / "router/centroids.npy").read_bytes()
    found = {row["example_id"]: row["part"] for row in rows(told, "dataset/parts/split=*/*.parquet")}
    assert found == {identity(row.image): number for row, number in zip(IMAGES, numbers, strict=True)}
    assert payload(told, "dataset")["parts"]["values"] == ["0", "1", "2"]


def refused(directory: Path, parts: list[Any], code: int = 1, images: list[RawExample] = IMAGES, **changes: Any) -> str:
    write_parts(directory, parts, images)
    write_recipe(directory, **{**GIVEN, **changes})
    return refusal(invoke(directory, *BUILD), code)


@pytest.mark.parametrize(
    ("parts", "experts", "sentence"),
    [
        (["a", "b"] * 150, 3, "'cluster' has 2 different names ('a', 'b'), but partition.experts is 3; set partition.experts: 2"),
        (["0", "1", "3"] * 100, 3, "'cluster' has a part 3, but partition.experts is 3, so the last one is 2; set"),
        (["0", "2"] * 150, 3, "'cluster' has no example in part 1, but partition.experts is 3; number the parts"),
        (["0", "1", "n/a"] * 100, 3, "'cluster' holds numbers, such as 0, and names, such as 'n/a'; give either"),
        ([row.source_uri + str(at) for at, row in enumerate(IMAGES)], 3, "'cluster' has 300 different names ("),
    ],
)
def test_column_that_does_not_fit_the_experts_is_refused_before_any_image_is_copied(
    tmp_path: Path, parts: list[str], experts: int, sentence: str
) -> None:
    told = refused(tmp_path, parts, partition={"method": "given", "experts": experts})
    assert told.startswith(f"dataset.part_column {sentence}")
    assert not list((tmp_path / "runs").rglob("dataset/split=*"))
    assert not list((tmp_path / "runs").rglob("artifact.json"))


def test_finished_dataset_with_other_parts_than_the_experts_is_refused_before_a_trunk_is_trained(
    project: Path, given: Path, tmp_path: Path
) -> None:
    recipe = {**GIVEN, "partition": {"method": "given", "experts": 4}}
    sentence = "dataset.part_column 'cluster' has 3 different names ('circle', 'north', 'zebra'), but partition.experts is 4"
    copied_run(project, tmp_path / "own", keep=("dataset",))
    (tmp_path / "reusing").mkdir()
    (tmp_path / "reusing" / "photos").symlink_to(project / "photos")
    for name, reuse in (("own", []), ("reusing", [str(given)])):
        write_recipe(tmp_path / name, **recipe, reuse=reuse)
        for command in (BUILD, ("run", "--dry-run")):
            assert refusal(invoke(tmp_path / name, *command)).startswith(sentence)
        assert not list((tmp_path / name).rglob("trunk/*"))


def test_copies_of_an_image_in_different_parts_are_refused_with_both_places(tmp_path: Path) -> None:
    """Either could be meant; whichever were taken, nobody would know of the other."""
    images = [*IMAGES, IMAGES[4], IMAGES[7]]
    parts = [name_of(row.image) for row in images]
    parts[300] = next(name for name in NAMES if name != parts[4])
    told = refused(tmp_path, parts, code=3, images=images)
    assert "0.parquet#row=150 and 0.parquet#row=2 are the same image, but the one is in part " in told
    assert f"in part {parts[300]!r} and the other in part {parts[4]!r} by dataset.part_column 'cluster'; correct" in told


def test_copies_of_an_image_in_one_part_are_one_example_of_it(tmp_path: Path) -> None:
    images = [*IMAGES, *IMAGES[:20]]
    write_parts(tmp_path, [name_of(row.image) for row in images], images)
    root = partition(tmp_path, **GIVEN)
    assert payload(root, "dataset")["copies_merged"] == 20
    assert len(rows(root, "dataset/parts/split=*/*.parquet")) == 300


def test_rows_without_a_usable_part_are_quarantined_with_their_reason(tmp_path: Path, wanted: dict[bytes, int]) -> None:
    parts: list[str | None] = [name_of(row.image) for row in IMAGES]
    parts[:3] = [None, " ", "-1"]
    write_parts(tmp_path, parts)
    root = partition(tmp_path, **GIVEN)
    bad = {row["source_uri"]: row["reason"] for row in rows(root, "dataset/quarantine/*.parquet")}
    assert bad == {
        "0.parquet#row=0": "no part in the column 'cluster'",
        "1.parquet#row=0": "no part in the column 'cluster'",
        "0.parquet#row=1": "the part in 'cluster' is a negative number",
    }
    found = {row["example_id"]: row["expert"] for row in rows(root, "partition/assignments/*.parquet")}
    assert found == {identity(row.image): wanted[identity(row.image)] for row in IMAGES[3:]}


def test_part_that_is_held_out_as_a_whole_is_refused_since_it_has_no_mean(tmp_path: Path, given: Path) -> None:
    held_out = {row["example_id"] for row in rows(given, "dataset/split=test/*.parquet")}
    parts = ["held" if identity(row.image) in held_out else ("a", "b")[at % 2] for at, row in enumerate(IMAGES)]
    told = refused(tmp_path, parts)
    assert told == (
        "no training example is in part 'held' by dataset.part_column 'cluster', so it has no centroid; "
        "add examples to it, or join it with another part and lower partition.experts"
    )
