"""Theorem 2: the assignment equals a ten-line NumPy brute force, for any engine, batch size and order of rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmoe.errors import DataError
from hardmoe.neighbours.assignment import Assignment, assign, sum_of_squares
from hardmoe.neighbours.faiss_engine import FaissEngine
from hardmoe.neighbours.torch_engine import TorchEngine

ENGINES = [FaissEngine(), TorchEngine("cpu")]


pytestmark = pytest.mark.usefixtures("one_search_thread")


def brute_force(features, centroids):
    distances = ((features.astype(np.float64)[:, None] - centroids.astype(np.float64)[None]) ** 2).sum(-1)
    order = np.argsort(distances, axis=1, kind="stable")
    second = order[:, 1] if len(centroids) > 1 else np.full(len(features), -1)
    return order[:, 0], second, distances[np.arange(len(features)), order[:, 0]]


def assert_same(assignment, expected):
    np.testing.assert_array_equal(assignment.primary_N, expected[0])
    np.testing.assert_array_equal(assignment.second_N, expected[1])
    np.testing.assert_array_equal(assignment.squared_distance_N, expected[2])


def random_case(seed, rows=200, clusters=5, dim=7, scale=1.0, offset=0.0):
    generator = np.random.default_rng(seed)
    features = (generator.standard_normal((rows, dim)) * scale + offset).astype(np.float32)
    return features, (generator.standard_normal((clusters, dim)) * scale + offset).astype(np.float32)


def tied_case(seed):
    """Rows at, between and a rounding error beside the middle of two centroids; centroids repeated."""
    _, centroids = random_case(seed, rows=0, clusters=4, dim=33)
    generator = np.random.default_rng(seed)
    centroids = np.concatenate([centroids, centroids[:2], -centroids[:1]])
    pairs = generator.integers(0, len(centroids), (300, 2))
    middles = (centroids[pairs[:, 0]] + centroids[pairs[:, 1]]) * np.float32(0.5)
    nudged = np.nextafter(middles, np.float32(np.inf) * generator.choice([-1, 1], middles.shape).astype(np.float32))
    return np.concatenate([middles, nudged, centroids, np.zeros((1, 33), np.float32)]), centroids


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@pytest.mark.parametrize("clusters", [1, 2, 3, 50])
@pytest.mark.parametrize("dim", [1, 2, 96, 300])
def test_assign_random_features_equals_brute_force(engine, clusters, dim):
    features, centroids = random_case(dim * 100 + clusters, clusters=clusters, dim=dim)
    assignment = assign(features, centroids, engine)
    assert_same(assignment, brute_force(features, centroids))
    assert (assignment.primary_N.dtype, assignment.second_N.dtype) == (np.int32, np.int32)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@pytest.mark.parametrize("seed", range(5))
def test_assign_ties_and_near_ties_equals_brute_force(engine, seed):
    features, centroids = tied_case(seed)
    assert_same(assign(features, centroids, engine), brute_force(features, centroids))


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@pytest.mark.parametrize(
    ("scale", "offset"),
    [(1e-3, 1000.0), (1e-6, 1.0), (1e-22, 0.0), (1e-30, 0.0), (2e4, 0.0), (1e18, 0.0), (1e37, 0.0)],
    ids=["offset", "tight", "tiny", "subnormal squares", "float16 range", "large", "squares overflow"],
)
def test_assign_where_float32_loses_everything_equals_brute_force(engine, scale, offset):
    features, centroids = random_case(1, scale=scale, offset=offset, dim=64)
    assert_same(assign(features, centroids, engine), brute_force(features, centroids))


def test_assign_second_whose_expanded_distance_overflows_float32_is_not_taken_for_the_first():
    # 2 x.c is infinite in float32 for centroid 2 only, so |c|^2 - 2 x.c + |x|^2 ranks it first, infinitely far ahead.
    features = np.full((40, 1), 2.0**63.4, np.float32)
    centroids = np.float32(2.0**63.4) * np.array([[0.5], [0.9], [1.2], [0.2]], np.float32)
    for engine in ENGINES:
        assignment = assign(features, centroids, engine)
        assert_same(assignment, brute_force(features, centroids))
        assert assignment.primary_N.tolist() == [1] * 40


class AdversarialEngine:
    """Errs by as much as the contract allows, towards whatever order is wrong."""

    name = "adversarial"

    def __init__(self, seed):
        self._generator = np.random.default_rng(seed)

    def nearest(self, features_ND, centroids_KD, count):
        features, centroids = features_ND.astype(np.float64), centroids_KD.astype(np.float64)
        distances = ((features[:, None] - centroids[None]) ** 2).sum(-1)
        bound = (features.shape[1] + 2) * 2.0**-24
        bound = bound * (np.linalg.norm(features, axis=1)[:, None] + np.linalg.norm(centroids, axis=1)) ** 2
        distances += bound * self._generator.choice([-0.999, 0.999], distances.shape)
        indices = np.argsort(distances, axis=1)[:, :count]
        return indices, np.take_along_axis(distances, indices, axis=1).astype(np.float32)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32), clusters=st.integers(1, 9), dim=st.sampled_from([1, 3, 64]), steps=st.sampled_from([2, 9, 400])
)
def test_assign_any_engine_within_the_bound_gives_the_same_answer(seed, clusters, dim, steps):
    generator = np.random.default_rng(seed)
    features = (generator.integers(-steps, steps + 1, (40, dim)) / steps).astype(np.float32)
    centroids = (generator.integers(-steps, steps + 1, (clusters, dim)) / steps).astype(np.float32)
    assert_same(assign(features, centroids, AdversarialEngine(seed)), brute_force(features, centroids))


@pytest.mark.parametrize("batch", [1, 3, 19, 64])
def test_assign_any_batch_size_gives_the_same_bytes(batch):
    features, centroids = tied_case(9)
    whole = assign(features, centroids, ENGINES[0])
    parts = [assign(features[start : start + batch], centroids, ENGINES[0]) for start in range(0, len(features), batch)]
    for name in ("primary_N", "second_N", "squared_distance_N"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


def test_assign_permuted_rows_and_threads_give_permuted_answer():
    features, centroids = tied_case(11)
    order = np.random.default_rng(0).permutation(len(features))
    whole = assign(features, centroids, ENGINES[1])
    torch.set_num_threads(2)
    permuted = assign(features[order], centroids, ENGINES[1])
    np.testing.assert_array_equal(permuted.primary_N, whole.primary_N[order])
    np.testing.assert_array_equal(permuted.squared_distance_N, whole.squared_distance_N[order])


def test_assign_exact_tie_goes_to_the_lower_index():
    centroids = np.array([[1, 0], [0, 1], [-1, 0], [1, 0]], np.float32)
    assignment = assign(np.array([[0, 0], [1, 0]], np.float32), centroids, ENGINES[0])
    assert assignment.primary_N.tolist() == [0, 0]
    assert assignment.second_N.tolist() == [1, 3]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_assign_no_rows_gives_empty_arrays(engine):
    assignment = assign(np.empty((0, 4), np.float32), np.eye(4, dtype=np.float32), engine)
    assert isinstance(assignment, Assignment)
    assert assignment.primary_N.shape == assignment.second_N.shape == assignment.squared_distance_N.shape == (0,)


def test_assign_non_finite_rows_are_counted():
    features = np.ones((10, 3), np.float32)
    features[2, 1], features[5, 0], features[5, 2], features[9, 2] = np.nan, np.inf, np.nan, -np.inf
    with pytest.raises(DataError, match="3 of 10 features hold NaN or infinity"):
        assign(features, np.eye(3, dtype=np.float32), ENGINES[0])


@pytest.mark.parametrize("dim", [1, 2, 7, 8, 9, 127, 128, 129, 1000, 9000])
def test_sum_of_squares_is_independent_of_the_number_of_rows(dim):
    values = np.random.default_rng(dim).standard_normal((1000 if dim < 9000 else 20, dim))
    whole = sum_of_squares(values.copy())
    alone = np.concatenate([sum_of_squares(row[None].copy()) for row in values])
    np.testing.assert_array_equal(alone, whole)
    np.testing.assert_allclose(whole, np.einsum("nd,nd->n", values, values), rtol=1e-13)
