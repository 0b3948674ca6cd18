"""Grouping of fine clusters: against a greedy brute force, against SciPy's linkages, and on shapes that k-means cannot find."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.datasets import make_circles, make_moons
from sklearn.metrics import adjusted_rand_score

from hardmoe.neighbours.assignment import Assignment, assign
from hardmoe.neighbours.engine import choose_engine
from hardmoe.partitioning.grouping import Borders, group_clusters
from hardmoe.partitioning.in_memory import FitOptions, fit
from hardmoe.partitioning.router import Router
from hardmoe.partitioning.transform import FeatureTransform


def brute_force(centroids, counts, shared, num_groups):
    """Every pair looked at anew before every merge; groups by their lowest cluster."""
    groups = {index: [index] for index in range(len(centroids))}
    centres = {index: row.astype(np.float64) for index, row in enumerate(centroids)}
    weights = {index: float(max(count, 1)) for index, count in enumerate(counts)}
    while len(groups) > num_groups:
        ranked = []
        for a in groups:
            for b in (other for other in groups if other > a):
                product = weights[a] * weights[b]
                border = sum(float(shared[i, j]) for i in groups[a] for j in groups[b])
                cost = product / (weights[a] + weights[b]) * np.square(centres[b] - centres[a]).sum()
                ranked.append((-border / product, cost, a, b))
        _, _, a, b = min(ranked)
        weight = weights[a] + weights[b]
        centres[a] = (weights[a] * centres[a] + weights[b] * centres[b]) / weight
        weights[a] = weight
        groups[a] += groups.pop(b)
    labels = np.empty(len(centroids), np.int32)
    for number, lowest in enumerate(sorted(groups)):
        labels[groups[lowest]] = number
    return labels


def borders_of(counts, shared):
    lower, higher = np.nonzero(np.triu(shared, 1))
    return Borders(np.asarray(counts, np.int64), lower * len(counts) + higher, shared[lower, higher].astype(np.int64))


def random_case(seed, clusters, dim=3, density=0.4, steps=6):
    """Coordinates and counts of few values, so that there are ties of every kind."""
    generator = np.random.default_rng(seed)
    centroids = generator.integers(-steps, steps + 1, (clusters, dim)).astype(np.float32)
    counts = generator.integers(0, 5, clusters)
    shared = np.triu(generator.integers(1, 4, (clusters, clusters)) * (generator.random((clusters, clusters)) < density), 1)
    return centroids, counts, shared + shared.T


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    clusters=st.integers(1, 14),
    density=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    steps=st.sampled_from([1, 6, 1000]),
    share=st.floats(0, 1),
)
def test_group_clusters_equals_a_greedy_brute_force(seed, clusters, density, steps, share):
    centroids, counts, shared = random_case(seed, clusters, density=density, steps=steps)
    num_groups = 1 + int(share * (clusters - 1))
    groups = group_clusters(centroids, borders_of(counts, shared), num_groups)
    np.testing.assert_array_equal(groups, brute_force(centroids, counts, shared, num_groups))
    assert groups.dtype == np.int32


@pytest.mark.parametrize("seed", range(5))
def test_group_clusters_without_borders_is_scipys_ward_with_points_repeated_by_weight(seed):
    generator = np.random.default_rng(seed)
    centroids, counts = generator.standard_normal((30, 4)).astype(np.float32), generator.integers(1, 9, 30)
    tree = linkage(np.repeat(centroids, counts, axis=0).astype(np.float64), "ward")
    for num_groups in (2, 5, 11):
        expected = fcluster(tree, num_groups, "maxclust")[np.cumsum(counts) - 1]
        found = group_clusters(centroids, borders_of(counts, np.zeros((30, 30), np.int64)), num_groups)
        assert len(np.unique(found)) == num_groups
        assert adjusted_rand_score(expected, found) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_group_clusters_with_borders_is_scipys_average_linkage_over_the_rows(seed):
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 9, 25)
    shared = np.triu(generator.integers(1, 10**6, (25, 25)), 1)
    shared += shared.T
    affinities = np.repeat(np.repeat(shared / np.outer(counts, counts), counts, axis=0), counts, axis=1)
    owner = np.repeat(np.arange(25), counts)
    distances = np.where(owner[:, None] == owner, 0.0, affinities.max() + 1.0 - affinities)
    tree = linkage(squareform(distances, checks=False), "average")
    for num_groups in (2, 4, 9):
        expected = fcluster(tree, num_groups, "maxclust")[np.cumsum(counts) - 1]
        found = group_clusters(np.zeros((25, 2), np.float32), borders_of(counts, shared), num_groups)
        assert adjusted_rand_score(expected, found) == 1.0


def test_group_clusters_numbers_groups_by_their_lowest_cluster_and_ties_go_to_the_lower_pair():
    centroids = np.array([[0.0], [9.0], [1.0], [8.0], [2.0]], np.float32)
    nothing = borders_of(np.full(5, 10), np.zeros((5, 5), np.int64))
    assert group_clusters(centroids, nothing, 5).tolist() == [0, 1, 2, 3, 4]
    assert group_clusters(centroids, nothing, 4).tolist() == [0, 1, 0, 2, 3]  # 0-2, 1-3 and 2-4 are as near
    assert group_clusters(centroids, nothing, 2).tolist() == [0, 1, 0, 1, 0]


def test_group_clusters_empty_cluster_joins_the_nearest_and_not_the_first():
    centroids = np.array([[0.0], [50.0], [51.0], [100.0]], np.float32)
    borders = borders_of([100, 100, 0, 100], np.zeros((4, 4), np.int64))
    assert group_clusters(centroids, borders, 3).tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("num_groups", [0, 4])
def test_group_clusters_impossible_number_is_refused(num_groups):
    with pytest.raises(ValueError, match=f"3 centroids and 3 counts cannot make {num_groups} groups"):
        group_clusters(np.zeros((3, 2), np.float32), Borders.none(3), num_groups)


def random_assignment(rows, clusters, seed=0):
    generator = np.random.default_rng(seed)
    primary = generator.integers(0, clusters, rows).astype(np.int32)
    second = ((primary + generator.integers(1, clusters, rows)) % clusters).astype(np.int32)
    return Assignment(primary, second, np.zeros(rows))


def test_borders_add_up_in_any_order_and_count_a_pair_in_both_directions():
    whole = random_assignment(500, 7)
    expected = np.zeros((7, 7), np.int64)
    for a, b in zip(whole.primary_N.tolist(), whole.second_N.tolist(), strict=True):
        expected[min(a, b), max(a, b)] += 1
    pieces = []
    for start in range(0, 500, 90):
        rows = slice(start, start + 90)
        pieces.append(Borders.of(Assignment(whole.primary_N[rows], whole.second_N[rows], whole.squared_distance_N[rows]), 7))
    for order in (pieces, pieces[::-1]):
        total = sum((Borders.from_arrays(piece.to_arrays()) for piece in order), start=Borders.none(7))
        found = np.zeros(49, np.int64)
        found[total.pairs_P] = total.shared_P
        np.testing.assert_array_equal(found.reshape(7, 7), expected)
        np.testing.assert_array_equal(total.counts_F, np.bincount(whole.primary_N, minlength=7))
    with pytest.raises(ValueError, match="borders of 7 and 6 clusters cannot be added"):
        Borders.none(7) + Borders.none(6)


def test_borders_of_a_single_cluster_share_nothing():
    borders = Borders.of(Assignment(np.zeros(5, np.int32), np.full(5, -1, np.int32), np.zeros(5)), 1)
    assert (borders.counts_F.tolist(), borders.pairs_P.tolist()) == ([5], [])
    assert group_clusters(np.zeros((1, 2), np.float32), borders, 1).tolist() == [0]


def strips():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(6000, 2)) * [4.0, 0.3]
    labels = np.repeat(np.arange(3), 2000)
    return rows + np.stack([np.zeros(6000), 2.0 * labels], axis=1), labels


SHAPES = {
    "moons": lambda: make_moons(4000, noise=0.06, random_state=0),
    "rings": lambda: make_circles(4000, noise=0.05, factor=0.5, random_state=0),
    "strips": strips,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_two_levels_find_shapes_that_k_means_cannot(shape):
    features, labels = SHAPES[shape]()
    features, groups = features.astype(np.float32), len(np.unique(labels))
    ids = np.zeros((len(features), 16), np.uint8)
    ids[:, :4] = np.arange(len(features), dtype=np.uint32)[:, None].view(np.uint8)
    fine = fit(features, ids, 16 * groups, 0, FitOptions(restarts=3)).centroids_KD
    borders = Borders.of(assign(features, fine, choose_engine()), len(fine))
    router = Router(FeatureTransform("none"), fine, group_clusters(fine, borders, groups))
    assert adjusted_rand_score(labels, router.route(features).primary_N) > 0.9
    plain = Router(FeatureTransform("none"), fit(features, ids, groups, 0, FitOptions(restarts=3)).centroids_KD)
    assert adjusted_rand_score(labels, plain.route(features).primary_N) < 0.5
