"""Theorems 1 to 3 on a finished run: the partition is one, the router is a brute force, k-means knows no shards."""

import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.data.schemas import SPLITS
from hardmoe.storage import open_storage


def rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """All rows of some Parquet files, read without hardmoe."""
    found = [row for path in sorted(paths) for row in pq.read_table(path, partitioning=None).to_pylist()]
    assert found
    return found


def by_id(paths: Iterable[Path]) -> dict[bytes, dict[str, Any]]:
    """Rows by example id, each id once."""
    found = rows(paths)
    keyed = {row.pop("example_id"): row for row in found}
    assert len(keyed) == len(found)
    return keyed


def examples(root: Path, split: str = "*") -> dict[bytes, dict[str, Any]]:
    return by_id(root.glob(f"dataset/split={split}/*.parquet"))


def vectors(root: Path, column: str, pattern: str) -> dict[bytes, bytes]:
    """The bits of a float16 column by example id."""
    return {key: np.array(row[column], np.float16).tobytes() for key, row in by_id(root.glob(pattern)).items()}


def payload(root: Path, name: str) -> Any:
    return ArtifactStore(open_storage(str(root))).get(name).payload


def pixels(encoded: bytes) -> bytes:
    return Image.open(io.BytesIO(encoded)).convert("RGB").tobytes()


def test_dataset_holds_every_distinct_source_image_exactly_once(root: Path, photos: Path) -> None:
    source = Counter(pixels(row["image"]) for row in rows(photos.glob("*.parquet")))
    dataset = Counter(pixels(row["image"]) for row in examples(root).values())
    assert dataset == dict.fromkeys(source, 1)
    assert payload(root, "dataset")["copies_merged"] == source.total() - len(source)


def test_every_example_is_in_exactly_one_part_of_its_own_split(root: Path) -> None:
    sizes = payload(root, "partition")["sizes"]
    for split in SPLITS:
        parts = [row for path in root.glob(f"partition/split={split}/*/*.parquet") for row in rows([path])]
        assert sorted(row["example_id"] for row in parts) == sorted(examples(root, split))
        counts = [len(rows(root.glob(f"partition/split={split}/expert={expert:04d}/*.parquet"))) for expert in range(3)]
        assert counts == sizes[split]
    assert sum(map(sum, sizes.values())) == len(examples(root))


def test_assignments_name_each_example_once_and_agree_with_the_parts(root: Path) -> None:
    assigned = by_id(root.glob("partition/assignments/*.parquet"))
    assert assigned.keys() == examples(root).keys()
    assert all(row["primary"] for row in assigned.values())
    for split in SPLITS:
        for expert in range(3):
            part = by_id(root.glob(f"partition/split={split}/expert={expert:04d}/*.parquet"))
            expected = {(split, expert, row["distance"]) for row in part.values()}
            assert {(assigned[key]["split"], assigned[key]["expert"], assigned[key]["distance"]) for key in part} == expected


def test_contents_of_the_parts_are_the_datasets(root: Path) -> None:
    parts = by_id(root.glob("partition/split=*/*/*.parquet"))
    assert {key: (row["image"], row["tags"]) for key, row in parts.items()} == {
        key: (row["image"], row["tags"]) for key, row in examples(root).items()
    }


def test_every_table_joins_with_the_dataset_by_id(root: Path) -> None:
    tables = (
        "vocabulary/labels/*.parquet",
        "features/split=*/*.parquet",
        "embeddings/split=*/*.parquet",
        "baselines/dense_embeddings/split=*/*.parquet",
    )
    for pattern in tables:
        assert by_id(root.glob(pattern)).keys() == examples(root).keys(), pattern
    for split in SPLITS:
        for name in ("features", "embeddings"):
            assert by_id(root.glob(f"{name}/split={split}/*.parquet")).keys() == examples(root, split).keys()


def test_embeddings_come_from_the_expert_that_the_example_was_assigned_to(root: Path) -> None:
    assigned = by_id(root.glob("partition/assignments/*.parquet"))
    embedded = by_id(root.glob("embeddings/split=*/*.parquet"))
    assert {key: row["expert"] for key, row in embedded.items()} == {key: row["expert"] for key, row in assigned.items()}
    assert len({row["expert"] for row in embedded.values()}) == 3


def test_assignments_on_disk_equal_a_brute_force_in_numpy(root: Path) -> None:
    features = by_id(root.glob("features/split=*/*.parquet"))
    assigned = by_id(root.glob("partition/assignments/*.parquet"))
    features_ND = np.array([row["feature"] for row in features.values()], np.float64)
    features_ND /= np.sqrt((features_ND**2).sum(axis=1, keepdims=True))
    centroids_KD = np.load(root / "router" / "centroids.npy", allow_pickle=False).astype(np.float64)
    distances_NK = np.sqrt(((features_ND[:, None] - centroids_KD) ** 2).sum(axis=2))
    order_NK = np.argsort(distances_NK, axis=1)
    nearest_NK = np.sort(distances_NK, axis=1)
    assert np.diff(nearest_NK[:, :2]).min() > 1e-6, "a near-tie would make this comparison unfair"
    found = [assigned[key] for key in features]
    np.testing.assert_array_equal(order_NK[:, 0], [row["expert"] for row in found])
    np.testing.assert_array_equal(order_NK[:, 1], [row["second"] for row in found])
    np.testing.assert_allclose(nearest_NK[:, 0], [row["distance"] for row in found], rtol=1e-6)
    np.testing.assert_allclose(nearest_NK[:, 1], [row["second_distance"] for row in found], rtol=1e-6)


def test_another_sharding_gives_the_same_features_bit_for_bit(root: Path, resharded_root: Path) -> None:
    assert len(list(resharded_root.glob("dataset/split=train/*.parquet"))) > len(list(root.glob("dataset/split=train/*.parquet")))
    pattern = "features/split=*/*.parquet"
    assert vectors(resharded_root, "feature", pattern) == vectors(root, "feature", pattern)


def test_another_sharding_gives_the_same_trunk_centroids_and_assignments(root: Path, resharded_root: Path) -> None:
    for name in ("vocabulary/tags.parquet", "trunk/model.safetensors", "trunk/metrics.jsonl", "router/centroids.npy"):
        assert (resharded_root / name).read_bytes() == (root / name).read_bytes(), name
    assert payload(resharded_root, "router") == payload(root, "router")
    pattern = "partition/assignments/*.parquet"
    assert by_id(resharded_root.glob(pattern)) == by_id(root.glob(pattern))


def test_another_sharding_gives_the_same_parts_byte_for_byte(root: Path, resharded_root: Path) -> None:
    first, second = (
        {str(path.relative_to(top)): path.read_bytes() for path in top.glob("partition/split=*/*/*.parquet")}
        for top in (root, resharded_root)
    )
    assert first == second


def test_another_sharding_gives_the_same_networks_and_metrics(root: Path, resharded_root: Path) -> None:
    """Not asked of the router alone: nothing that is learnt or measured may depend on how the data are cut."""
    names = [str(path.relative_to(root)) for path in root.rglob("*.safetensors") if "checkpoints" not in path.parts]
    assert len(names) == 8
    for name in [*names, "evaluation/metrics.json"]:
        assert (resharded_root / name).read_bytes() == (root / name).read_bytes(), name
