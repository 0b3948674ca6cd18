"""Experts that train on examples of other parts as well: which, how often, and that nothing else sees them twice."""

import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import hardmoe, invoke, payload, records, refusal, run_here, write_recipe

from hardmoe.errors import StorageError
from hardmoe.hashing import hash_fractions
from hardmoe.partitioning import regroup
from hardmoe.stage import UnitContext

RATIO, FRACTION, EXPERTS = 1.1, 0.1, 3
SETTINGS = {"overlap": RATIO, "out_of_part_fraction": FRACTION}


def rows(root: Path, pattern: str) -> list[dict[str, Any]]:
    """All rows of some Parquet files, read without hardmoe."""
    return [row for path in sorted(root.glob(pattern)) for row in pq.read_table(path, partitioning=None).to_pylist()]


def build(directory: Path, base: Path, photos: Path, command: str, **changes: Any) -> Path:
    """Run a command with everything up to the router taken over from `base`; returns the root."""
    (directory / "photos").symlink_to(photos.resolve())
    write_recipe(directory, reuse=[str(base)], **{"partition": SETTINGS, **changes})
    run_here(directory, command)
    return directory / "runs" / "small"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, root: Path, photos: Path) -> Path:
    """The small run with copies, evaluated; what comes before the partition is the small run's own."""
    return build(tmp_path_factory.mktemp("extra"), root, photos, "evaluate")


@pytest.fixture(scope="module")
def distances(root: Path) -> dict[bytes, np.ndarray]:
    """Every example's distance to every centroid, by a brute force in NumPy."""
    features = {row["example_id"]: row["feature"] for row in rows(root, "features/split=*/*.parquet")}
    features_ND = np.array(list(features.values()), np.float64)
    features_ND /= np.sqrt((features_ND**2).sum(axis=1, keepdims=True))
    centroids_KD = np.load(root / "router" / "centroids.npy", allow_pickle=False).astype(np.float64)
    distances_NK = np.sqrt(((features_ND[:, None] - centroids_KD) ** 2).sum(axis=2))
    return dict(zip(features, distances_NK, strict=True))


@pytest.fixture(scope="module")
def training(root: Path) -> list[bytes]:
    return [row["example_id"] for row in rows(root, "dataset/split=train/*.parquet")]


def extra_pairs(top: Path) -> dict[tuple[bytes, int], float]:
    """Distance by example and expert, from the assignments; each pair once."""
    found = [row for row in rows(top, "partition/assignments/*.parquet") if not row["primary"]]
    pairs = {(row["example_id"], row["expert"]): row["distance"] for row in found}
    assert len(pairs) == len(found)
    assert all(row["split"] == "train" and row["second"] == -1 and math.isnan(row["second_distance"]) for row in found)
    return pairs


def overlapping(distances: dict[bytes, np.ndarray], training: list[bytes]) -> set[tuple[bytes, int]]:
    near = {key: np.sort(distances[key])[:2] for key in training}
    margin = min(abs(second / first - RATIO) for first, second in near.values())
    assert margin > 1e-6, "a near-tie would make this comparison unfair"
    return {(key, int(np.argsort(distances[key])[1])) for key, (first, second) in near.items() if second <= RATIO * first}


def test_overlap_is_what_a_brute_force_in_numpy_finds(
    shared: Path, distances: dict[bytes, np.ndarray], training: list[bytes]
) -> None:
    expected = overlapping(distances, training)
    assert 20 < len(expected) < len(training)
    assert expected <= extra_pairs(shared).keys()
    counts = Counter(expert for _, expert in expected)
    assert payload(shared, "partition")["extra"]["overlap"] == [counts[expert] for expert in range(EXPERTS)]


def test_the_other_copies_are_those_whose_hash_wins_in_the_share_that_was_asked_for(
    shared: Path, distances: dict[bytes, np.ndarray], training: list[bytes]
) -> None:
    border = overlapping(distances, training)
    drawn = extra_pairs(shared).keys() - border
    ids_N16 = np.frombuffer(b"".join(training), np.uint8).reshape(-1, 16)
    own = {key: int(np.argmin(distances[key])) for key in training}
    expected = set()
    for expert in range(EXPERTS):
        members = {key for key in training if own[key] == expert} | {key for key, of in border if of == expert}
        others = len(training) - len(members)
        chance = FRACTION / (1 - FRACTION) * len(members) / others
        lots = hash_fractions(ids_N16, 0, "out-of-part", expert)
        expected |= {(key, expert) for key, lot in zip(training, lots, strict=True) if lot < chance and key not in members}
        share = sum(of == expert for _, of in drawn) / (len(members) + sum(of == expert for _, of in drawn))
        assert abs(share - FRACTION) < 4 * math.sqrt(others * chance) / len(members)
    assert drawn == expected
    counts = Counter(expert for _, expert in drawn)
    assert payload(shared, "partition")["extra"]["out_of_part"] == [counts[expert] for expert in range(EXPERTS)]


def test_parts_are_byte_for_byte_those_without_copies(shared: Path, root: Path) -> None:
    """Theorem 1: every example has one primary part, whoever else trains on it."""
    first, second = (
        {str(path.relative_to(top)): path.read_bytes() for path in top.glob("partition/split=*/*/*.parquet")}
        for top in (shared, root)
    )
    assert first == second
    primary = [row for row in rows(shared, "partition/assignments/*.parquet") if row["primary"]]
    assert primary == rows(root, "partition/assignments/*.parquet")
    told = payload(shared, "partition")
    assert {key: told[key] for key in payload(root, "partition")} == payload(root, "partition")
    assert sum(map(sum, told["sizes"].values())) == len(rows(root, "dataset/split=*/*.parquet"))


def test_files_of_copies_hold_the_datasets_images_with_the_distance_to_that_expert(
    shared: Path, root: Path, distances: dict[bytes, np.ndarray]
) -> None:
    dataset = {row["example_id"]: row for row in rows(root, "dataset/split=train/*.parquet")}
    pairs = extra_pairs(shared)
    found = {}
    for expert in range(EXPERTS):
        paths = sorted(shared.glob(f"partition/extra/expert={expert:04d}/part-*.parquet"))
        assert [path.name for path in paths] == ["part-00000-of-00001.parquet"]
        part = shared / "partition" / "split=train" / "expert=0000" / "part-00000-of-00001.parquet"
        assert pq.read_schema(paths[0]).equals(pq.read_schema(part))
        for row in rows(shared, f"partition/extra/expert={expert:04d}/*.parquet"):
            found[row["example_id"], expert] = row
    assert found.keys() == pairs.keys()
    for (key, expert), row in found.items():
        assert (row["image"], row["tags"]) == (dataset[key]["image"], dataset[key]["tags"])
        assert row["distance"] == pairs[key, expert]
        assert row["distance"] == pytest.approx(distances[key][expert], rel=1e-6)


def labelled(top: Path) -> set[bytes]:
    return {row["example_id"] for row in rows(top, "vocabulary/labels/*.parquet") if row["tags"]}


def test_every_expert_trains_on_its_part_and_its_copies(shared: Path, root: Path) -> None:
    members: dict[int, set[bytes]] = defaultdict(set)
    for row in rows(shared, "partition/assignments/*.parquet"):
        if row["split"] == "train" and row["example_id"] in labelled(root):
            members[row["expert"]].add(row["example_id"])
    for expert in range(EXPERTS):
        told, before = (payload(top, f"experts/expert-{expert:04d}") for top in (shared, root))
        assert told["unique_examples"] == len(members[expert]) > before["unique_examples"]
        assert told["examples_seen"] == 2 * len(members[expert])
    weights = [(top / "experts/expert-0000/model.safetensors").read_bytes() for top in (shared, root)]
    assert weights[0] != weights[1]


def test_dense_baseline_sees_as_many_examples_as_all_experts_together(shared: Path, root: Path) -> None:
    for top in (shared, root):
        experts = [payload(top, f"experts/expert-{expert:04d}") for expert in range(EXPERTS)]
        dense = payload(top, "baselines/dense")
        assert dense["examples_seen"] == sum(told["examples_seen"] for told in experts)
        assert dense["samples_per_epoch"] == [
            sum(counts) for counts in zip(*(t["samples_per_epoch"] for t in experts), strict=True)
        ]
    assert payload(shared, "baselines/dense")["unique_examples"] == payload(root, "baselines/dense")["unique_examples"]
    assert payload(shared, "baselines/dense")["examples_seen"] > payload(root, "baselines/dense")["examples_seen"]


def test_embeddings_decoder_and_evaluation_see_every_example_once(shared: Path, root: Path) -> None:
    embedded = rows(shared, "embeddings/split=*/*.parquet")
    own = {row["example_id"]: row["expert"] for row in rows(shared, "partition/assignments/*.parquet") if row["primary"]}
    assert len(embedded) == len(own) == len(rows(root, "dataset/split=*/*.parquet"))
    assert {row["example_id"]: row["expert"] for row in embedded} == own
    assert payload(shared, "decoder")["examples_seen"] == payload(root, "decoder")["examples_seen"]
    assert payload(shared, "evaluation")["num_test_examples"] == payload(root, "evaluation")["num_test_examples"]


def test_another_sharding_gives_the_same_copies_byte_for_byte(
    shared: Path, resharded_root: Path, tmp_path: Path, photos: Path
) -> None:
    (tmp_path / "b").mkdir()
    source = resharded_root.parents[1] / "photos"
    other = build(tmp_path / "b", resharded_root, source, "partition", dataset={"shard_rows": 47})
    assert len(rows(other, "partition/extra/expert=*/*.parquet")) > 20
    first, second = (
        {str(path.relative_to(top)): path.read_bytes() for path in top.glob("partition/extra/*/*.parquet")}
        for top in (shared, other)
    )
    assert first == second
    assert extra_pairs(other) == extra_pairs(shared)
    assert payload(other, "partition") == payload(shared, "partition")


def test_partition_whose_merge_was_cut_off_goes_on_and_ends_with_the_same_record(
    shared: Path, root: Path, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").symlink_to(photos.resolve())
    write_recipe(tmp_path, reuse=[str(root)], partition=SETTINGS)
    done, merge = [], regroup.merge

    def failing(context: UnitContext) -> Any:
        done.append(context.unit.name)
        if context.unit.name == "extra-0001":
            raise StorageError("the disk is full")
        return merge(context)

    monkeypatch.setattr(regroup, "merge", failing)
    assert "the disk is full" in refusal(invoke(tmp_path, "partition", "--backend", "inline"), 3)
    assert {"train-0000", "extra-0000", "extra-0001", "extra-0002"} <= set(done)
    monkeypatch.setattr(regroup, "merge", lambda context: (done.append(context.unit.name), merge(context))[1])
    before = len(done)
    run_here(tmp_path, "partition")
    assert done[before:] == ["extra-0001"]
    record = "partition/artifact.json"
    assert (tmp_path / "runs" / "small" / record).read_bytes() == (shared / record).read_bytes()


def test_ray_gives_the_same_records_as_inline(shared: Path, root: Path, tmp_path: Path, photos: Path) -> None:
    (tmp_path / "photos").symlink_to(photos.resolve())
    write_recipe(tmp_path, reuse=[str(root)], partition=SETTINGS)
    result = hardmoe(tmp_path, "train-experts", "--backend", "ray", "--parallel", "2", cores=2)
    assert result.returncode == 0, result.stderr
    found = records(tmp_path / "runs" / "small")
    assert {"partition/artifact.json", "experts/expert-0002/artifact.json"} <= found.keys()
    assert found == {name: body for name, body in records(shared).items() if name in found}


def test_random_partition_draws_from_other_parts_without_a_distance(root: Path, tmp_path: Path, photos: Path) -> None:
    settings = {"method": "random", "out_of_part_fraction": 0.2}
    top = build(tmp_path, root, photos, "partition", partition=settings)
    pairs = extra_pairs(top)
    assert set(pairs.values()) == {0.0}
    own = {row["example_id"]: row["expert"] for row in rows(top, "partition/assignments/*.parquet") if row["primary"]}
    assert not any(own[key] == expert for key, expert in pairs)
    told = payload(top, "partition")
    assert told["extra"]["overlap"] == [0, 0, 0]
    for size, extra in zip(told["sizes"]["train"], told["extra"]["out_of_part"], strict=True):
        assert abs(extra / (size + extra) - 0.2) < 0.1


def test_copies_beside_balanced_parts_go_by_the_parts_that_the_balance_made(
    root: Path, distances: dict[bytes, np.ndarray], training: list[bytes], tmp_path: Path, photos: Path
) -> None:
    """An image that had no room in its nearest part trains that one's expert as well, and the lots go by the balanced sizes."""
    tops = []
    for name, extra in (("plain", {}), ("copies", SETTINGS)):
        (tmp_path / name).mkdir()
        settings = {"method": "balanced", "slack": 0.02, **extra}
        tops.append(build(tmp_path / name, root, photos, "partition", partition=settings))
    plain, top = tops
    own_rows = [row for row in rows(top, "partition/assignments/*.parquet") if row["primary"]]
    assert own_rows == rows(plain, "partition/assignments/*.parquet")
    own = {row["example_id"]: row["expert"] for row in own_rows if row["split"] == "train"}
    moved = {(key, int(np.argmin(distances[key]))) for key in training if own[key] != np.argmin(distances[key])}
    other = {key: min(set(range(EXPERTS)) - {own[key]}, key=lambda expert: distances[key][expert]) for key in training}
    ratios = {key: distances[key][other[key]] / distances[key][own[key]] for key in training}
    assert min(abs(ratio - RATIO) for ratio in ratios.values()) > 1e-6, "a near-tie would make this comparison unfair"
    border = {(key, other[key]) for key in training if ratios[key] <= RATIO}
    assert moved
    assert moved < border
    ids_N16 = np.frombuffer(b"".join(training), np.uint8).reshape(-1, 16)
    drawn = set()
    for expert in range(EXPERTS):
        members = {key for key in training if own[key] == expert} | {key for key, of in border if of == expert}
        chance = FRACTION / (1 - FRACTION) * len(members) / (len(training) - len(members))
        lots = hash_fractions(ids_N16, 0, "out-of-part", expert)
        drawn |= {(key, expert) for key, lot in zip(training, lots, strict=True) if lot < chance and key not in members}
    pairs = extra_pairs(top)
    assert pairs.keys() == border | drawn
    assert all(pairs[key, of] == pytest.approx(distances[key][of], rel=1e-6) for key, of in pairs)
    told, before = payload(top, "partition"), payload(plain, "partition")
    assert {key: told[key] for key in before} == before
    assert max(told["sizes"]["train"]) == told["balance"]["capacity"] < max(payload(root, "partition")["sizes"]["train"])
    for kind, expected in (("overlap", border), ("out_of_part", drawn)):
        assert told["extra"][kind] == [sum(of == expert for _, of in expected) for expert in range(EXPERTS)]
