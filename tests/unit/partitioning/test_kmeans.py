"""Theorem 3: k-means recovers blobs, agrees with scikit-learn, and gives the same centroids whatever the sharding."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score

from hardmoe.errors import DataError
from hardmoe.hashing import derive_seed
from hardmoe.neighbours.assignment import assign
from hardmoe.neighbours.faiss_engine import FaissEngine
from hardmoe.neighbours.torch_engine import TorchEngine
from hardmoe.partitioning.config import PartitionConfig, default_starts
from hardmoe.partitioning.in_memory import FitOptions, fit
from hardmoe.partitioning.kmeans import PassSums, has_converged, refine, refine_with, scan_batch, update
from hardmoe.partitioning.seeding import _SampleGrid, seed_centroids
from hardmoe.partitioning.starting import Ladder, best_start, refine_with_momentum, rung_rows

ENGINE = FaissEngine()


pytestmark = pytest.mark.usefixtures("one_search_thread")


def random_ids(rows, seed=0):
    return np.random.default_rng(derive_seed(seed, "ids")).integers(0, 256, (rows, 16), dtype=np.uint8)


def blobs(rows=1200, centers=8, dim=6, spread=0.3, seed=0):
    features, labels = make_blobs(rows, dim, centers=centers, cluster_std=spread, random_state=seed)
    return features.astype(np.float32), labels, random_ids(rows, seed)


def scan_all(features, ids, engine=ENGINE, batch=10_000):
    def scan(centroids):
        parts = [
            scan_batch(features[start : start + batch], ids[start : start + batch], centroids, engine)
            for start in range(0, len(features), batch)
        ]
        return sum(parts, start=PassSums.zero(*centroids.shape))

    return scan


@pytest.mark.parametrize("seed", range(4))
def test_fit_recovers_blobs(seed):
    features, labels, ids = blobs(seed=seed)
    found = fit(features, ids, 8, seed=seed, options=FitOptions(restarts=3))
    assert found.converged
    assert adjusted_rand_score(labels, assign(features, found.centroids_KD, ENGINE).primary_N) == 1.0


@settings(max_examples=15)
@given(order_seed=st.integers(0, 2**32), batch_size=st.integers(7, 900))
def test_fit_any_order_and_batch_size_gives_the_same_bytes(order_seed, batch_size):
    features, _, ids = blobs(rows=600, spread=4.0)
    expected = fit(features, ids, 8, seed=3)
    order = np.random.default_rng(order_seed).permutation(600)
    found = fit(features[order], ids[order], 8, seed=3, options=FitOptions(batch_size=batch_size, num_threads=1 + batch_size % 2))
    assert found.centroids_KD.tobytes() == expected.centroids_KD.tobytes()
    assert found.objective_per_pass == expected.objective_per_pass


def test_refine_with_other_engine_and_stored_sums_gives_the_same_bytes():
    features, _, ids = blobs(spread=5.0)
    start = seed_centroids(features, ids, 8, seed=0)
    expected = refine_with(scan_all(features, ids), start, 20, 0.0)
    torch_scan = scan_all(features, ids, TorchEngine("cpu"), batch=77)
    found = refine_with(lambda centroids: PassSums.from_arrays(torch_scan(centroids).to_arrays()), start, 20, 0.0)
    assert found.centroids_KD.tobytes() == expected.centroids_KD.tobytes()
    assert found.objective_per_pass == expected.objective_per_pass


def test_refine_killed_between_passes_is_replayed_from_the_stored_sums():
    features, _, ids = blobs(spread=5.0)
    start, scan = seed_centroids(features, ids, 8, seed=0), scan_all(features, ids)
    expected = refine_with(scan, start, 20, 0.0)
    killed, stored = refine(start, 20, 0.0), []
    number, centroids = next(killed)
    while number < 4:
        stored.append(scan(centroids))
        number, centroids = killed.send(stored[-1])
    replayed = iter(stored)
    resumed = refine_with(lambda centroids: next(replayed, None) or scan(centroids), start, 20, 0.0)
    assert len(expected.objective_per_pass) > 5
    assert resumed.centroids_KD.tobytes() == expected.centroids_KD.tobytes()
    assert resumed.objective_per_pass == expected.objective_per_pass


def test_refine_agrees_with_scikit_learn_from_the_same_start():
    features, _, ids = blobs(rows=3000, spread=5.0)
    start = seed_centroids(features, ids, 8, seed=1)
    found = refine_with(scan_all(features, ids), start, 300, 0.0)
    reference = KMeans(8, init=start.astype(np.float64), n_init=1, tol=0.0, max_iter=300, algorithm="lloyd")
    reference.fit(features.astype(np.float64))
    assert found.converged
    assert found.objective_per_pass[-1] == pytest.approx(reference.inertia_, rel=1e-6)
    np.testing.assert_allclose(found.centroids_KD, reference.cluster_centers_, rtol=1e-4, atol=1e-4)


def test_refine_objective_never_rises_and_stops_at_the_tolerance():
    features, _, ids = blobs(rows=2000, spread=6.0)
    start = seed_centroids(features, ids, 8, seed=2)
    loose = refine_with(scan_all(features, ids), start, 100, 1e-2)
    strict = refine_with(scan_all(features, ids), start, 100, 0.0)
    for objectives in (loose.objective_per_pass, strict.objective_per_pass):
        assert all(after <= before * (1 + 1e-6) for before, after in pairwise(objectives))
    assert len(loose.objective_per_pass) < len(strict.objective_per_pass)
    assert not refine_with(scan_all(features, ids), start, 2, 0.0).converged


def test_refine_starts_empty_clusters_at_the_farthest_distinct_points():
    features = np.array([[0], [1], [10], [10], [30]], np.float32)
    ids = random_ids(5)
    start = np.array([[0], [-50], [-60], [-70]], np.float32)
    found = refine_with(scan_all(features, ids), start, 20, 0.0)
    # Cluster 0 moves to the mean of all rows, 10.2; the three new ones then take every row from it, and it starts anew too.
    assert found.reseeded == [(0, 1), (0, 2), (0, 3), (1, 0)]
    assert sorted(found.centroids_KD[:, 0].tolist()) == [0.0, 1.0, 10.0, 30.0]
    assert found.objective_per_pass[-1] == 0.0
    assert found.converged


def test_refine_a_pass_that_started_a_cluster_anew_is_not_converged():
    features, ids = np.array([[0], [1], [10], [10], [30]], np.float32), random_ids(5)
    start = np.array([[0], [-50], [-60], [-70]], np.float32)
    found = refine_with(scan_all(features, ids), start, 20, 0.9995)  # by the tolerance alone pass 1 (1101 -> 1) would do
    assert found.objective_per_pass == [1101.0, 1.0, 0.25]


def test_update_keeps_the_centroid_of_an_empty_cluster_when_no_point_is_left_over():
    features, ids = np.zeros((3, 2), np.float32), random_ids(3)
    centroids = np.array([[0, 0], [5, 5]], np.float32)
    updated = update(scan_batch(features, ids, centroids, ENGINE), centroids)
    assert (updated.empty, updated.reseeded) == ([1], [])
    np.testing.assert_array_equal(updated.centroids_KD, centroids)


@pytest.mark.parametrize(
    ("previous", "objective", "tolerance", "expected"),
    [
        (None, 1.0, 0.5, False),
        (100.0, 98.0, 0.01, False),
        (100.0, 99.5, 0.01, True),
        (5.0, 5.0, 0.0, True),
        (0.0, 0.0, 0.0, True),
    ],
)
def test_has_converged_compares_the_relative_change(previous, objective, tolerance, expected):
    assert has_converged(previous, objective, tolerance) is expected


def test_seed_centroids_any_order_gives_the_same_distinct_rows():
    features, _, ids = blobs(spread=3.0)
    expected = seed_centroids(features, ids, 12, seed=5)
    order = np.random.default_rng(1).permutation(len(features))
    assert seed_centroids(features[order], ids[order], 12, seed=5).tobytes() == expected.tobytes()
    assert len(np.unique(expected, axis=0)) == 12
    assert all((features == row).all(axis=1).any() for row in expected)
    assert seed_centroids(features, ids, 12, seed=6).tobytes() != expected.tobytes()


def test_seed_centroids_are_as_good_as_scikit_learns():
    features, _, ids = blobs(rows=800, centers=20, spread=1.5)

    def potential(centroids):
        return assign(features, centroids.astype(np.float32), ENGINE).squared_distance_N.sum()

    ours = np.mean([potential(seed_centroids(features, ids, 20, seed)) for seed in range(12)])
    theirs = np.mean([potential(kmeans_plusplus(features, 20, random_state=seed)[0]) for seed in range(12)])
    assert ours < 1.15 * theirs


def test_sample_grid_distances_are_exact_integers_whatever_blas_does():
    sample = np.random.default_rng(0).uniform(-1, 1, (60, 1500)).astype(np.float32)
    grid = _SampleGrid(sample)
    steps = grid._grid_SD.astype(np.int64)
    expected = [np.square(steps - steps[row]).sum(axis=1).tolist() for row in (0, 1)]
    assert grid.squared_distances([0, 1]).tolist() == expected


@pytest.mark.parametrize("shift", [0.0, 4096.0])
def test_seed_centroids_heavy_copies_still_find_every_distinct_point(shift):
    distinct = np.arange(6, dtype=np.float32)[:, None] + np.float32(shift)
    sample = distinct[np.r_[np.zeros(400, int), np.arange(6)]]
    assert sorted(seed_centroids(sample, random_ids(406), 6, seed=0)[:, 0]) == sorted(distinct[:, 0])


def test_seed_centroids_points_closer_than_the_grid_are_still_distinct():
    sample = np.array([[0.0], [1e-30], [2e-30], [1.0], [1.0], [-0.0]], np.float32)
    found = seed_centroids(sample, random_ids(6), 4, seed=0)
    assert len(np.unique(found)) == 4


@pytest.mark.parametrize(("rows", "distinct"), [(2, 2), (50, 3), (50, 1)])
def test_seed_centroids_fewer_distinct_points_than_clusters_are_refused(rows, distinct):
    sample = np.resize(np.arange(distinct, dtype=np.float32), rows)[:, None]
    with pytest.raises(DataError, match=f"^4 clusters .* holds {distinct}: lower partition.experts"):
        seed_centroids(sample, random_ids(rows), 4, seed=0)


def test_seed_centroids_non_finite_sample_is_refused():
    with pytest.raises(DataError, match="NaN or infinity"):
        seed_centroids(np.array([[0.0], [np.nan]], np.float32), random_ids(2), 1, seed=0)


def test_fit_one_cluster_is_the_mean():
    features, _, ids = blobs(spread=9.0)
    found = fit(features, ids, 1, seed=0)
    np.testing.assert_array_equal(found.centroids_KD[0], features.astype(np.float64).mean(axis=0).astype(np.float32))


def test_starts_and_rungs_look_at_a_bounded_number_of_rows_and_any_order_gives_the_same_bytes():
    lowest, _, highest = rung_rows(4)
    features, _, ids = blobs(rows=highest + 500, centers=4, spread=3.0)
    expected = Ladder(ids, features.__getitem__, 4, seed=2).start()
    order = np.random.default_rng(3).permutation(len(features))
    found = Ladder(ids[order], features[order].__getitem__, 4, seed=2).start()
    assert found.centroids_KD.tobytes() == expected.centroids_KD.tobytes()
    assert expected.counts_K.sum() == lowest
    climbed = Ladder(ids, features.__getitem__, 4, seed=2).climb(expected.centroids_KD)
    with ThreadPoolExecutor(2) as pool:
        again = Ladder(ids[order], features[order].__getitem__, 4, seed=2).climb(found.centroids_KD, pool.map)
    assert again.centroids_KD.tobytes() == climbed.centroids_KD.tobytes()
    assert climbed.counts_K.sum() == highest


def test_climbing_goes_nearer_to_the_optimum_of_all_rows_than_a_start():
    """Within K / n of it, n the rows of the highest rung; with no clusters to be found, where the descent is slow."""
    features = np.random.default_rng(0).standard_normal((40_000, 8), np.float32)
    ids = random_ids(len(features))
    ladder = Ladder(ids, features.__getitem__, 8, seed=0)
    start = ladder.start().centroids_KD
    climbed = ladder.climb(start).centroids_KD
    scan = scan_all(features, ids)
    ends = [refine_with(scan, centroids, 200, 0.0).objective_per_pass for centroids in (start, climbed)]
    optimum = min(end[-1] for end in ends)
    assert ends[1][0] < (1.0 + 8 * 8 / rung_rows(8)[-1]) * optimum
    assert ends[1][0] < ends[0][0]


@pytest.mark.parametrize("spherical", [False, True])
def test_momentum_reaches_lloyds_objective_in_fewer_passes_and_returns_means(spherical):
    saved = 0
    for seed in range(6):
        features, _, ids = blobs(rows=3000, spread=8.0)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        start, scan = seed_centroids(features, ids, 16, seed), scan_all(features, ids)
        plain = refine_with(scan, start, 40, 1e-4, spherical).objective_per_pass
        found = refine_with_momentum(scan, start, 40, 0.0, spherical)
        reached = next((n for n, o in enumerate(found.objective_per_pass, 1) if o <= plain[-1] * 1.001), 40)
        saved += len(plain) - reached
        # Means: they are no worse than the best pass, which ended with them.
        assert scan(found.centroids_KD).sums.objective <= min(found.objective_per_pass) * (1 + 1e-9)
        if spherical:
            np.testing.assert_allclose(np.linalg.norm(found.centroids_KD, axis=1), 1.0, rtol=1e-6)
    assert saved > 0


def test_momentum_goes_back_to_the_best_means_where_it_overshot():
    """Rows along a line that the centroids run down, and past their end."""
    features = np.concatenate([np.linspace(0, 1, 400), np.full(2000, 1.2)])[:, None].astype(np.float32)
    ids = random_ids(len(features))
    scan = scan_all(features, ids)
    found = refine_with_momentum(scan, np.array([[0.0], [0.01]], np.float32), 100, 0.0)
    objectives = found.objective_per_pass
    assert any(after > min(objectives[: at + 1]) for at, after in enumerate(objectives[1:])), "the test shows nothing"
    assert found.converged
    expected = refine_with(scan, np.array([[0.0], [0.01]], np.float32), 100, 0.0)
    np.testing.assert_allclose(np.sort(found.centroids_KD[:, 0]), np.sort(expected.centroids_KD[:, 0]), rtol=1e-2)
    assert scan(found.centroids_KD).sums.objective <= min(objectives) * (1 + 1e-12)


def test_a_sample_smaller_than_a_rung_is_a_rung_itself():
    features, _, ids = blobs(rows=3000, centers=4, spread=3.0)
    ladder = Ladder(ids, features.__getitem__, 4, seed=0)
    start = ladder.start()
    assert start.counts_K.sum() == rung_rows(4)[0]
    climbed = ladder.climb(start.centroids_KD)
    assert climbed.counts_K.sum() == 3000
    expected = refine_with_momentum(scan_all(features, ids), start.centroids_KD, 60, 5e-4)
    assert climbed.objective_per_pass == expected.objective_per_pass


def test_fewer_starts_are_made_of_more_clusters():
    assert [default_starts(clusters) for clusters in (1, 8, 32, 64, 128, 100_000)] == [8, 8, 8, 4, 2, 2]
    assert PartitionConfig(experts=64).num_starts == 4
    assert PartitionConfig(experts=64, restarts=3).num_starts == 3
    assert PartitionConfig(experts=4, method="two_level").num_starts == 4


def test_start_finds_the_few_distinct_points_among_copies():
    features = np.zeros((20_000, 1), np.float32)
    features[:3] = [[1], [2], [3]]
    found = Ladder(random_ids(20_000), features.__getitem__, 4, seed=0).start()
    assert len(np.unique(found.centroids_KD)) == 4


def test_restarts_draw_other_seeds_and_the_best_is_taken():
    features, _, ids = blobs(rows=3000, centers=40, spread=4.0)
    starts = [Ladder(ids, features.__getitem__, 40, seed=0).start(attempt) for attempt in range(4)]
    objectives = [start.objective_per_pass[-1] for start in starts]
    assert len(set(objectives)) > 1
    assert best_start(starts).objective_per_pass[-1] == min(objectives)
    # The best on the first rung's rows need not be the best in the end, but is not far from it.
    one, four = (fit(features, ids, 40, 0, FitOptions(restarts=count)).objective_per_pass[-1] for count in (1, 4))
    assert four <= one * 1.01


def unit_blobs(rows=1500, centers=8, dim=6, spread=0.3, seed=0):
    """On the sphere, with clusters of very different spread along it."""
    features, labels, ids = blobs(rows, centers, dim, spread, seed)
    features = (features / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)).astype(np.float32)
    return features, labels, ids


def spherical_in_numpy(features, centroids, passes):
    """Spherical k-means by its definition: the largest cosine, then the sum of the rows at length 1."""
    rows, centroids = features.astype(np.float64), centroids.astype(np.float64)
    for _ in range(passes):
        nearest = (rows @ centroids.T).argmax(axis=1)
        sums = np.stack([rows[nearest == cluster].sum(axis=0) for cluster in range(len(centroids))])
        centroids = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    return centroids


@pytest.mark.parametrize("passes", [1, 2, 7])
def test_spherical_passes_are_those_of_a_brute_force_in_numpy(passes):
    features, _, ids = unit_blobs(spread=2.0)
    start = seed_centroids(features, ids, 8, seed=1)
    found = refine_with(scan_all(features, ids), start, passes, 0.0, spherical=True)
    np.testing.assert_allclose(found.centroids_KD, spherical_in_numpy(features, start, passes), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found.centroids_KD.astype(np.float64), axis=1), 1.0, atol=1e-7)
    plain = refine_with(scan_all(features, ids), start, passes, 0.0)
    assert (np.linalg.norm(plain.centroids_KD, axis=1) < 0.99).any(), "no different from plain means"


def test_spherical_objective_never_rises_and_is_that_of_the_cosines():
    features, _, ids = unit_blobs(rows=2000, spread=4.0)
    start = seed_centroids(features, ids, 8, seed=2)
    found = refine_with(scan_all(features, ids), start, 100, 0.0, spherical=True)
    assert len(found.objective_per_pass) > 5
    assert found.converged
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(found.objective_per_pass))
    cosines = (features.astype(np.float64) @ found.centroids_KD.T.astype(np.float64)).max(axis=1)
    assert found.objective_per_pass[-1] == pytest.approx(2.0 * (len(features) - cosines.sum()), rel=1e-5)


def test_spherical_fit_recovers_blobs_in_any_order_with_the_same_bytes():
    features, labels, ids = unit_blobs(rows=1200)
    expected = fit(features, ids, 8, seed=3, options=FitOptions(restarts=3, spherical=True))
    assert adjusted_rand_score(labels, assign(features, expected.centroids_KD, ENGINE).primary_N) > 0.99
    np.testing.assert_allclose(np.linalg.norm(expected.centroids_KD.astype(np.float64), axis=1), 1.0, atol=1e-7)
    order = np.random.default_rng(0).permutation(1200)
    found = fit(features[order], ids[order], 8, 3, FitOptions(restarts=3, spherical=True, batch_size=100, num_threads=2))
    assert found.centroids_KD.tobytes() == expected.centroids_KD.tobytes()


def test_spherical_update_keeps_the_centroid_of_a_cluster_whose_rows_cancel():
    features, ids = np.array([[1, 0], [-1, 0], [0, 0]], np.float32), random_ids(3)
    centroids = np.array([[0, 1]], np.float32)
    updated = update(scan_batch(features, ids, centroids, ENGINE), centroids, spherical=True)
    np.testing.assert_array_equal(updated.centroids_KD, centroids)
    np.testing.assert_array_equal(update(scan_batch(features, ids, centroids, ENGINE), centroids).centroids_KD, [[0, 0]])


def test_spherical_fit_never_puts_a_centroid_where_a_row_is_zero():
    """Such a row is as far from every centroid as a row at 60 degrees, so one there would draw all that are farther away."""
    features = np.zeros((300, 3), np.float32)
    features[:60, 0], features[60:120, 1] = 1.0, 1.0
    ids = random_ids(300)
    for seed in range(8):
        found = fit(features, ids, 2, seed, FitOptions(spherical=True))
        assert sorted(found.centroids_KD.tolist()) == [[0, 1, 0], [1, 0, 0]]
    start = np.array([[1, 0, 0], [-1, 0, 0]], np.float32)  # the second is nobody's, and zero is farther away than anything
    found = scan_batch(features[np.r_[:60, 120:300]], ids[:240], start, ENGINE)
    updated = update(found, start, spherical=True)
    assert (updated.empty, updated.reseeded) == ([1], [])
    assert update(found, start).reseeded == [1]
    with pytest.raises(DataError, match="2 clusters need as many distinct features"):
        fit(features[60:], ids[60:], 2, 0, FitOptions(spherical=True))


@pytest.mark.slow
def test_forty_million_points_have_their_mean_where_faiss_says_two():
    """faiss adds and counts in float32. Past 2^24 rows another 1 changes the count no more, past 2^25 a value below 2 the sum
    hardly any more; 2^25 / 2^24 is 2.0, whatever the points are.
    """
    points = np.random.default_rng(0).uniform(0, 2, (40_000_000, 1)).astype(np.float32)
    truth = points.mean(dtype=np.float64)
    total = PassSums.zero(2, 1)
    ids = np.zeros((2**20, 16), np.uint8)
    centroids = np.array([[1.0], [50.0]], np.float32)
    for start in range(0, len(points), 2**20):
        rows = points[start : start + 2**20]
        total += scan_batch(rows, ids[: len(rows)], centroids, ENGINE)
    assert total.sums.counts_K.tolist() == [40_000_000, 0]
    assert abs(update(total, centroids).centroids_KD[0, 0] - truth) < 1e-6
    theirs = faiss.Kmeans(1, 1, niter=2, max_points_per_centroid=len(points), seed=1)
    theirs.train(points)
    assert abs(theirs.centroids[0, 0] - truth) > 0.5


def test_partition_config_too_small_a_sample_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="raise it to 9 or more"):
        PartitionConfig(experts=9, sample_size=8)
    assert PartitionConfig.operational_fields() == set()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"components": 8},
            "components 8 does nothing with transform 'l2'.*set transform: pca or whiten, or leave components out",
        ),
        ({"components": 8, "transform": "none"}, "components 8 does nothing with transform 'none'"),
        (
            {"spherical": True, "transform": "none"},
            "spherical k-means needs features of length 1.*set transform: l2, pca or whiten",
        ),
        (
            {"spherical": True, "method": "given"},
            "spherical k-means needs a fit, and method 'given' makes none: set method: kmeans, balanced or two_level",
        ),
        ({"spherical": True, "method": "random"}, "method 'random' makes none"),
    ],
)
def test_partition_config_settings_that_do_nothing_are_refused_with_the_remedy(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        PartitionConfig(**settings)
    for kind in ("pca", "whiten"):
        PartitionConfig(transform=kind, components=8, spherical=True, method="balanced")


def test_partition_config_of_before_still_means_the_same():
    assert not {"components", "spherical"} & PartitionConfig().identity().keys()
