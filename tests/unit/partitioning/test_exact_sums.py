"""Sums of a pass are exact and the same bytes however the rows are ordered, sharded and added."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from hardmoe.errors import DataError
from hardmoe.neighbours.assignment import Assignment
from hardmoe.partitioning.exact_sums import ClusterSums, FarthestPoints, sort_order_of_ids


def assignment_of(primary, distances=None):
    primary = np.asarray(primary, np.int32)
    distances = np.zeros(len(primary)) if distances is None else np.asarray(distances, np.float64)
    return Assignment(primary, np.zeros_like(primary), distances)


def as_bytes(value):
    return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in value.to_arrays().items()}


def exact_sum(column):
    return sum((Fraction(float(value)) for value in column), Fraction(0))


def sum_as_fraction(sums, cluster, column):
    return Fraction(int(sums.high_KD[cluster, column])) + Fraction(int(sums.low_KD[cluster, column]), 2**32)


def unit_rows(rows, dim, seed):
    features = np.random.default_rng(seed).standard_normal((rows, dim))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=60)
@given(
    features=hypothesis_numpy.arrays(
        np.float16,
        st.tuples(st.integers(1, 40), st.integers(1, 4)),
        elements=st.floats(width=16, allow_nan=False, allow_infinity=False),
    ),
    seed=st.integers(0, 1000),
)
def test_from_batch_float16_features_sum_exactly(features, seed):
    primary = np.random.default_rng(seed).integers(0, 3, len(features))
    sums = ClusterSums.from_batch(features.astype(np.float32), assignment_of(primary), 3)
    np.testing.assert_array_equal(sums.counts_K, np.bincount(primary, minlength=3))
    for cluster in range(3):
        for column in range(features.shape[1]):
            expected = exact_sum(features[primary == cluster, column])
            assert sum_as_fraction(sums, cluster, column) == expected
            assert sums.totals_KD[cluster, column] == float(expected)


def test_from_batch_unit_features_err_by_half_a_grid_step_a_row_at_most():
    features = unit_rows(500, 64, seed=0)
    sums = ClusterSums.from_batch(features, assignment_of(np.zeros(500)), 1)
    errors = [abs(sum_as_fraction(sums, 0, column) - exact_sum(features[:, column])) for column in range(64)]
    assert max(errors) <= Fraction(500, 2**33)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    cuts=st.lists(st.integers(0, 3000), max_size=6),
    magnitude=st.sampled_from([1.0, 65504.0, 2.0**20]),
)
def test_sums_any_order_and_sharding_gives_the_same_bytes(seed, cuts, magnitude):
    generator = np.random.default_rng(seed)
    features = (generator.uniform(-1, 1, (3000, 3)) * magnitude).astype(np.float32)
    primary, distances = generator.integers(0, 5, 3000), generator.uniform(0, 4, 3000) * magnitude**2
    whole = ClusterSums.from_batch(features, assignment_of(primary, distances), 5)
    order = generator.permutation(3000)
    bounds = [0, *sorted(cuts), 3000]
    shards = [order[start:end] for start, end in pairwise(bounds)]
    parts = [ClusterSums.from_batch(features[rows], assignment_of(primary[rows], distances[rows]), 5) for rows in shards]
    generator.shuffle(parts)
    joined = ClusterSums.zero(5, 3)
    for part in parts:
        joined = part + joined
    assert as_bytes(joined) == as_bytes(whole)


def test_sums_of_40_million_points_give_the_true_mean_where_float32_stops_counting():
    # faiss.Kmeans returned 2.0 as the mean of 40 million points uniform on [0, 2]: its float32 counts stop at 2^24.
    points = np.random.default_rng(0).uniform(0, 2, (625_000, 1)).astype(np.float32)
    sums = ClusterSums.from_batch(points, assignment_of(np.zeros(625_000)), 1)
    for _ in range(6):
        sums = sums + sums
    assert sums.num_rows == 40_000_000
    assert sums.totals_KD[0, 0] / sums.num_rows == pytest.approx(points.astype(np.float64).mean(), rel=1e-12)
    assert np.float32(2**24) + np.float32(1) == np.float32(2**24)


@pytest.mark.parametrize("value", [2.0**20, -(2.0**20), 65504.0, 2.0**-24])
def test_sums_of_a_trillion_extreme_rows_do_not_overflow(value):
    sums = ClusterSums.from_batch(
        np.full((2**12, 1), value, np.float32), assignment_of(np.zeros(2**12), np.full(2**12, 2.0**54)), 1
    )
    for _ in range(28):
        sums = sums + sums
    assert sums.num_rows == 2**40
    assert sum_as_fraction(sums, 0, 0) == Fraction(value) * 2**40
    assert sums.objective == 2.0**94
    assert as_bytes(ClusterSums.from_arrays(sums.to_arrays())) == as_bytes(sums)


def test_sums_canonical_form_is_the_same_for_equal_sums():
    above = ClusterSums.from_batch(np.array([[0.75], [-1.0]], np.float32), assignment_of([0, 0]), 1)
    below = ClusterSums.from_batch(np.array([[-0.25], [0.0]], np.float32), assignment_of([0, 0]), 1)
    assert as_bytes(above) == as_bytes(below)


def test_objective_matches_exact_sum_of_distances():
    distances = np.random.default_rng(5).exponential(3.0, 5000)
    sums = ClusterSums.from_batch(np.zeros((5000, 1), np.float32), assignment_of(np.zeros(5000), distances), 1)
    assert abs(Fraction(sums.objective_units, 2**40) - exact_sum(distances)) <= Fraction(5000, 2**41)


@pytest.mark.parametrize("bad", [2.0**20 * 1.01, -3e38, np.nan])
def test_from_batch_beyond_the_grid_is_refused(bad):
    with pytest.raises(DataError, match=r"set partition\.transform to l2"):
        ClusterSums.from_batch(np.array([[0.0], [bad]], np.float32), assignment_of([0, 0]), 1)


def test_add_of_other_shapes_is_refused():
    with pytest.raises(ValueError, match="cannot be added"):
        ClusterSums.zero(2, 3) + ClusterSums.zero(2, 4)


def ids_of(numbers):
    return np.array([[*([0] * 14), number // 256, number % 256] for number in numbers], np.uint8)


def farthest_oracle(distances, ids, features, capacity):
    rows = sorted(range(len(distances)), key=lambda row: (-distances[row], bytes(ids[row])))
    seen, kept = set(), []
    for row in rows:
        if distances[row] > 0 and tuple(features[row]) not in seen:
            seen.add(tuple(features[row]))
            kept.append(row)
    return kept[:capacity]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), capacity=st.integers(1, 12), kinds=st.integers(1, 40), num_shards=st.integers(1, 6))
def test_farthest_points_any_sharding_equals_sorting_everything(seed, capacity, kinds, num_shards):
    generator = np.random.default_rng(seed)
    kind = generator.integers(0, kinds, 120)  # rows of one kind are copies: the same feature at the same distance
    features, distances = generator.standard_normal((kinds, 3)).astype(np.float32)[kind], (kind // 2).astype(np.float64)
    ids = ids_of(generator.permutation(1000)[:120])
    joined = FarthestPoints.none(3, capacity)
    for rows in np.array_split(generator.permutation(120), num_shards):
        found = FarthestPoints.from_batch(
            features[rows], ids[rows], assignment_of(np.zeros(len(rows)), distances[rows]), capacity
        )
        joined = joined + found
    expected = farthest_oracle(distances, ids, features, capacity)
    np.testing.assert_array_equal(joined.ids_M16, ids[expected])
    np.testing.assert_array_equal(joined.features_MD, features[expected])
    np.testing.assert_array_equal(joined.distances_M, distances[expected])
    assert as_bytes(FarthestPoints.from_arrays(joined.to_arrays())) == as_bytes(joined)


def test_farthest_points_zero_of_either_sign_is_one_point():
    features = np.array([[0.0], [-0.0], [3.0]], np.float32)
    found = FarthestPoints.from_batch(features, ids_of([2, 1, 3]), assignment_of([0, 0, 0], [9.0, 9.0, 4.0]), 3)
    assert found.ids_M16[:, -1].tolist() == [1, 3]


def test_sort_order_of_ids_is_lexicographic():
    ids = np.random.default_rng(0).integers(0, 3, (200, 16), dtype=np.uint8) * 100
    assert [bytes(ids[row]) for row in sort_order_of_ids(ids)] == sorted(bytes(row) for row in ids)
