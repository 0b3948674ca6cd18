"""Groups of centroids: nearest and second group, and the distance to any, equal a brute force in NumPy, ties included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmoe.errors import DataError
from hardmoe.neighbours.faiss_engine import FaissEngine
from hardmoe.neighbours.grouped import assign_groups, squared_distances_to_groups
from hardmoe.neighbours.torch_engine import TorchEngine

ENGINES = [FaissEngine(), TorchEngine("cpu")]


pytestmark = pytest.mark.usefixtures("one_search_thread")


def distances_of(features, centroids):
    return ((features.astype(np.float64)[:, None] - centroids.astype(np.float64)[None]) ** 2).sum(-1)


def brute_force(features, centroids, groups):
    distances = distances_of(features, centroids)
    primary, second = [], []
    for row in distances:
        order = groups[np.argsort(row, kind="stable")]
        others = order[order != order[0]]
        primary.append(order[0])
        second.append(others[0] if len(others) else -1)
    return primary, second, distances.min(axis=1)


def random_case(seed, rows=200, clusters=20, groups=4, dim=5, steps=None):
    generator = np.random.default_rng(seed)
    features, centroids = generator.standard_normal((rows, dim)), generator.standard_normal((clusters, dim))
    if steps:  # of so few values that there are ties
        features, centroids = np.rint(features * steps), np.rint(centroids * steps)
    owners = np.concatenate([np.arange(groups), generator.integers(0, groups, clusters - groups)])
    return features.astype(np.float32), centroids.astype(np.float32), generator.permutation(owners).astype(np.int32)


def assert_same(assignment, expected):
    np.testing.assert_array_equal(assignment.primary_N, expected[0])
    np.testing.assert_array_equal(assignment.second_N, expected[1])
    np.testing.assert_array_equal(assignment.squared_distance_N, expected[2])
    assert (assignment.primary_N.dtype, assignment.second_N.dtype) == (np.int32, np.int32)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    clusters=st.integers(1, 25),
    share=st.floats(0, 1),
    dim=st.sampled_from([1, 2, 40]),
    steps=st.sampled_from([1, 2, None]),
)
def test_assign_groups_equals_brute_force(engine, seed, clusters, share, dim, steps):
    case = random_case(seed, 60, clusters, 1 + int(share * (clusters - 1)), dim, steps)
    assert_same(assign_groups(*case, engine), brute_force(*case))


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_assign_groups_any_batch_gives_the_same_answer(batch):
    features, centroids, groups = random_case(3, steps=2)
    whole = assign_groups(features, centroids, groups, ENGINES[0])
    for start in range(0, len(features), batch):
        rows = slice(start, start + batch)
        part = assign_groups(features[rows], centroids, groups, ENGINES[1])
        assert_same(part, (whole.primary_N[rows], whole.second_N[rows], whole.squared_distance_N[rows]))


def test_assign_groups_deep_inside_a_group_looks_past_all_of_its_centroids():
    centroids = np.array([[0], [1], [-1], [2], [100], [90], [-90]], np.float32)
    groups = np.array([0, 0, 0, 0, 2, 1, 1], np.int32)
    found = assign_groups(np.array([[0.1], [0.0], [-0.5]], np.float32), centroids, groups, ENGINES[0])
    assert found.primary_N.tolist() == [0, 0, 0]
    assert found.second_N.tolist() == [1, 1, 1]
    tied = assign_groups(
        np.array([[0.0]], np.float32), centroids[[0, 1, 6, 4, 5]], np.array([0, 0, 2, 1, 1], np.int32), ENGINES[0]
    )
    assert tied.second_N.tolist() == [2]  # -90 and 90 are as far; the lower centroid is that of the higher group


def test_assign_groups_of_one_group_has_no_second():
    features, centroids, _ = random_case(0, clusters=6)
    found = assign_groups(features, centroids, np.zeros(6, np.int32), ENGINES[0])
    assert set(found.primary_N.tolist()) == {0}
    assert set(found.second_N.tolist()) == {-1}


def test_assign_groups_no_rows_gives_empty_arrays():
    _, centroids, groups = random_case(0)
    found = assign_groups(np.empty((0, 5), np.float32), centroids, groups, ENGINES[0])
    assert found.primary_N.shape == found.second_N.shape == found.squared_distance_N.shape == (0,)


def test_assign_groups_non_finite_rows_are_refused():
    features, centroids, groups = random_case(0)
    features[3, 1] = np.nan
    with pytest.raises(DataError, match="1 of 200 features"):
        assign_groups(features, centroids, groups, ENGINES[0])


def test_squared_distances_to_groups_are_to_the_nearest_centroid_of_the_group():
    features, centroids, groups = random_case(5)
    generator = np.random.default_rng(5)
    rows, wanted = generator.integers(0, 200, 700), generator.integers(0, 4, 700)
    distances = distances_of(features, centroids)
    expected = [distances[row, groups == group].min() for row, group in zip(rows, wanted, strict=True)]
    found = squared_distances_to_groups(features, centroids, groups, (rows, wanted), ENGINES[0])
    np.testing.assert_array_equal(found, expected)
    assert squared_distances_to_groups(features, centroids, groups, (rows[:0], wanted[:0]), ENGINES[0]).shape == (0,)
