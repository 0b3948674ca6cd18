"""Parts that are groups of fine clusters, through the command line: who belongs where, and that nothing else decides it.

Shape letters: N examples, D feature dim, F fine clusters, K experts.
"""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize
from support import TWO_LEVEL, invoke, partition, records, refusal, run_here, write_recipe
from test_theorems_partition import by_id, payload, rows

from hardmoe.arrays import load_arrays
from hardmoe.data.schemas import SPLITS
from hardmoe.mixture import Mixture
from hardmoe.partitioning.grouping import Borders, group_clusters
from hardmoe.storage import open_storage

EXPERTS = 3


def project(directory: Path, photos: Path, reuse: Path, settings: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A directory whose recipe takes over everything up to the features; returns the root."""
    (directory / "photos").symlink_to(photos.resolve())
    write_recipe(directory, reuse=[str(reuse)], partition={**TWO_LEVEL, **(settings or {})}, **changes)
    return directory / "runs" / "small"


def trunk_features(root: Path, split: str = "*") -> tuple[list[bytes], NDArray[np.float64]]:
    """Ids and features of a finished run, as the trunk gave them."""
    found = by_id(root.glob(f"features/split={split}/*.parquet"))
    return list(found), np.array([row["feature"] for row in found.values()], np.float64)


def features_of(root: Path, split: str = "*") -> tuple[list[bytes], NDArray[np.float64]]:
    """Ids and unit features of a finished run, as the router has them."""
    keys, features_ND = trunk_features(root, split)
    features_ND /= np.sqrt((features_ND**2).sum(axis=1, keepdims=True))
    return keys, features_ND.astype(np.float32).astype(np.float64)


def router_of(root: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The fine centroids and the expert of each, read without hardmoe."""
    description = json.loads((root / "router" / "router.json").read_text())
    assert (description["experts"], set(description["groups"])) == (EXPERTS, set(range(EXPERTS)))
    return np.load(root / "router" / "centroids.npy", allow_pickle=False), np.array(description["groups"])


def squared_to(centroids_FD: NDArray[np.float32], features_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    distances_NF: NDArray[np.float64] = ((features_ND[:, None] - centroids_FD.astype(np.float64)) ** 2).sum(axis=2)
    return distances_NF


def distances_to_experts(features_root: Path, root: Path) -> tuple[list[bytes], NDArray[np.float64]]:
    """Every example's distance to the nearest centroid of every expert, [N, K]."""
    keys, features_ND = features_of(features_root)
    centroids_FD, group_F = router_of(root)
    squared_NF = squared_to(centroids_FD, features_ND)
    return keys, np.sqrt(np.stack([squared_NF[:, group_F == expert].min(axis=1) for expert in range(EXPERTS)], axis=1))


def test_every_example_is_in_the_part_with_the_nearest_fine_centroid(two_level_root: Path, root: Path) -> None:
    keys, distances_NK = distances_to_experts(root, two_level_root)
    order_NK, nearest_NK = np.argsort(distances_NK, axis=1), np.sort(distances_NK, axis=1)
    assert np.diff(nearest_NK[:, :2]).min() > 1e-6, "a near-tie would make this comparison unfair"
    assigned = by_id(two_level_root.glob("partition/assignments/*.parquet"))
    found = [assigned[key] for key in keys]
    for rank, (expert, distance) in enumerate((("expert", "distance"), ("second", "second_distance"))):
        np.testing.assert_array_equal(order_NK[:, rank], [row[expert] for row in found])
        np.testing.assert_allclose(nearest_NK[:, rank], [row[distance] for row in found], rtol=1e-6)
    for split in SPLITS:
        sizes = [len(rows(two_level_root.glob(f"partition/split={split}/expert={k:04d}/*.parquet"))) for k in range(EXPERTS)]
        assert sizes == payload(two_level_root, "partition")["sizes"][split]
    assert sum(map(sum, payload(two_level_root, "partition")["sizes"].values())) == len(keys)


def borders_by_hand(centroids_FD: NDArray[np.float32], features_ND: NDArray[np.float64]) -> Borders:
    nearest_N2 = np.argsort(squared_to(centroids_FD, features_ND), axis=1)[:, :2]
    size = len(centroids_FD)
    pairs_P, shared_P = np.unique(nearest_N2.min(axis=1) * size + nearest_N2.max(axis=1), return_counts=True)
    return Borders(np.bincount(nearest_N2[:, 0], minlength=size), pairs_P, shared_P)


def test_groups_are_those_of_the_borders_between_the_training_examples(two_level_root: Path, root: Path) -> None:
    _, features_ND = features_of(root, "train")
    centroids_FD, group_F = router_of(two_level_root)
    borders, size = borders_by_hand(centroids_FD, features_ND), len(centroids_FD)
    np.testing.assert_array_equal(group_clusters(centroids_FD, borders, EXPERTS), group_F)
    told = payload(two_level_root, "router")
    assert (told["experts"], told["fine_clusters"]) == (EXPERTS, np.bincount(group_F).tolist())
    assert sum(told["fine_clusters"]) == size == 24
    training = np.bincount(group_F, borders.counts_F).astype(int).tolist()
    assert payload(two_level_root, "partition")["sizes"]["train"] == training


def test_groups_of_whitened_features_on_the_sphere_survive_a_kill_and_equal_brute_force(
    root: Path, photos: Path, tmp_path: Path
) -> None:
    """Every phase after the directions looks at projected features, the borders as well."""
    other = project(tmp_path, photos, root, {"transform": "whiten", "components": 4, "spherical": True})
    assert partition(tmp_path, die_at="borders/00001").returncode == -signal.SIGKILL
    result = partition(tmp_path)
    assert result.returncode == 0, result.stderr
    told, (keys, vectors_NW), (_, training_NW) = payload(other, "router"), trunk_features(root), trunk_features(root, "train")
    fine = told["fine_clusters"]
    assert f"\nby distances along 4 principal directions of {vectors_NW.shape[1]}, whitened: " in result.stdout
    assert f"\n24 fine clusters in 3 parts, {min(fine)} to {max(fine)} in each\n" in result.stdout
    assert (told["dim"], told["transform"]["components"], "zero_vectors" in told) == (vectors_NW.shape[1], 4, False)
    centroids_FD, group_F = router_of(other)
    assert (centroids_FD.shape, fine) == ((24, 4), np.bincount(group_F).tolist())
    np.testing.assert_allclose(np.linalg.norm(centroids_FD.astype(np.float64), axis=1), 1.0, atol=1e-7)
    pca = PCA(4, whiten=True, svd_solver="full").fit(training_NW)
    directions_DW = load_arrays(open_storage(str(other)), "router/transform.safetensors")["directions"]
    signs_D = np.sign((pca.components_ * directions_DW).sum(axis=1))
    borders = borders_by_hand(centroids_FD, normalize(pca.transform(training_NW) * signs_D))
    np.testing.assert_array_equal(group_clusters(centroids_FD, borders, EXPERTS), group_F)
    squared_NF = squared_to(centroids_FD, normalize(pca.transform(vectors_NW) * signs_D))
    distances_NK = np.sqrt(np.stack([squared_NF[:, group_F == expert].min(axis=1) for expert in range(EXPERTS)], axis=1))
    clear_N = np.diff(np.sort(distances_NK, axis=1)[:, :2]).ravel() > 1e-3
    assert clear_N.mean() > 0.95
    assigned = by_id(other.glob("partition/assignments/*.parquet"))
    found_N = np.array([assigned[key]["expert"] for key in keys])
    np.testing.assert_array_equal(distances_NK.argmin(axis=1)[clear_N], found_N[clear_N])
    np.testing.assert_allclose(distances_NK.min(axis=1), [assigned[key]["distance"] for key in keys], atol=1e-3)


def parts(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.glob("partition/[se]*/*/*.parquet")}


def test_another_sharding_gives_the_same_router_and_parts(two_level_root: Path, resharded_root: Path, tmp_path: Path) -> None:
    other = project(tmp_path, resharded_root.parents[1] / "photos", resharded_root, dataset={"shard_rows": 47})
    run_here(tmp_path, "partition")
    for name in ("centroids.npy", "router.json"):
        assert (other / "router" / name).read_bytes() == (two_level_root / "router" / name).read_bytes(), name
    for name in ("router", "partition"):
        assert payload(other, name) == payload(two_level_root, name)
    assert parts(other) == parts(two_level_root)


def test_four_ray_workers_give_the_same_records(two_level_root: Path, root: Path, photos: Path, tmp_path: Path) -> None:
    other = project(tmp_path, photos, root)
    result = partition(tmp_path, "ray")
    assert result.returncode == 0, result.stderr
    for name in ("router/artifact.json", "partition/artifact.json"):
        assert records(other)[name] == records(two_level_root)[name]


def test_killed_in_every_phase_and_resumed_equals_uninterrupted(
    two_level_root: Path, root: Path, photos: Path, tmp_path: Path
) -> None:
    other = project(tmp_path, photos, root)
    for moment in ("sample/00001", "start/02", "pass-0001/00000", "borders/00000", "borders/00002"):
        result = partition(tmp_path, die_at=moment)
        assert result.returncode == -signal.SIGKILL, f"{moment}: {result.stdout}{result.stderr}"
        assert not (other / "router" / "artifact.json").exists()
    result = partition(tmp_path)
    assert result.returncode == 0, result.stderr
    for name in ("router/artifact.json", "partition/artifact.json"):
        assert records(other)[name] == records(two_level_root)[name]


def test_copies_are_as_far_as_the_nearest_centroid_of_the_expert_that_trains_on_them(
    root: Path, photos: Path, tmp_path: Path
) -> None:
    other = project(tmp_path, photos, root, {"overlap": 1.1, "out_of_part_fraction": 0.1})
    run_here(tmp_path, "partition")
    keys, distances_NK = distances_to_experts(root, other)
    distances = dict(zip(keys, distances_NK, strict=True))
    found = rows(other.glob("partition/assignments/*.parquet"))
    copies = {(row["example_id"], row["expert"]): row["distance"] for row in found if not row["primary"]}
    for (key, expert), distance in copies.items():
        assert distance == pytest.approx(distances[key][expert], rel=1e-6)
    near = set()
    for row in found:
        if row["primary"] and row["split"] == "train":
            first, second = np.sort(distances[row["example_id"]])[:2]
            near |= {(row["example_id"], row["second"])} if second <= 1.1 * first else set()
    assert near <= copies.keys()
    assert sum(payload(other, "partition")["extra"]["overlap"]) == len(near) > 0
    assert sum(payload(other, "partition")["extra"]["out_of_part"]) == len(copies) - len(near) > 0


def test_page_table_mixture_and_check_speak_of_the_groups(two_level_root: Path, root: Path) -> None:
    directory = two_level_root.parents[1]
    fine = payload(two_level_root, "router")["fine_clusters"]
    told = invoke(directory, "partition", "--backend", "inline").stdout
    assert f"\n24 fine clusters in 3 parts, {min(fine)} to {max(fine)} in each\n" in told
    page = (two_level_root / "report" / "index.html").read_text()
    assert "24 fine clusters in 3 parts" in page
    assert "the expert that has the nearest of their centroids" in page
    shown = json.loads(invoke(directory, "show", "router", "--json").stdout)
    assert shown["record"]["payload"]["fine_clusters"] == fine
    dataset = by_id(root.glob("dataset/split=test/*.parquet"))
    assigned = by_id(two_level_root.glob("partition/assignments/*.parquet"))
    experts_N = Mixture.load(str(two_level_root)).route([row["image"] for row in dataset.values()])
    np.testing.assert_array_equal(experts_N, [assigned[key]["expert"] for key in dataset])


def test_check_sends_other_images_by_the_groups(two_level_root: Path, root: Path, photos: Path, tmp_path: Path) -> None:
    project(tmp_path, photos, root)
    write_recipe(tmp_path, "other.yaml", root="runs/other")
    checked = invoke(tmp_path, "partition", "--check", "other.yaml", "--backend", "inline", "--json")
    assert checked.returncode == 0, checked.stderr
    sets = json.loads(checked.stdout)["sets"]
    sizes = payload(two_level_root, "partition")["sizes"]
    assert sets["training"]["sizes"] == sizes["train"]
    assert sets["new"]["sizes"] == [sum(counts) for counts in zip(*sizes.values(), strict=True)]


def test_collapse_is_a_matter_of_the_groups_and_not_of_the_clusters(root: Path, photos: Path, tmp_path: Path) -> None:
    project(tmp_path, photos, root, {"max_share": 0.34})
    told = refusal(invoke(tmp_path, "partition", "--backend", "inline"))
    assert told.endswith(
        "hardly any border runs through them; set partition.method: kmeans, ask for more experts, or raise max_share"
    )
    assert "one of 3 parts holds " in told
    assert "more than partition.max_share=0.34" in told
