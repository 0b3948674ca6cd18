"""Integer costs: exact for any batch, as near to the distances as they claim, and different for copies."""

from fractions import Fraction

import numpy as np
import pytest
from balancing import random_ids

from hardmoe.neighbours.assignment import squared_distances
from hardmoe.partitioning.cost_grid import NOISE_BITS, CostGrid
from hardmoe.partitioning.transport import COST_BITS

SCALES = [1e-6, 1.0, 3e4]


def made(dim, scale=1.0, offset=0.0, rows=50, parts=7, seed=0):
    rng = np.random.default_rng(seed)
    features = (rng.standard_normal((rows, dim)) * rng.choice([0.01, 1.0], (rows, 1)) * scale + offset).astype(np.float32)
    centroids = (rng.standard_normal((parts, dim)) * scale + offset).astype(np.float32)
    return features, centroids, random_ids(rows, seed)


@pytest.mark.parametrize("dim", [1, 3, 64, 700])
def test_costs_are_the_products_of_the_rounded_rows_and_centroids_exactly(dim):
    """What BLAS returns must be the integer itself; computed here with Python's integers."""
    features, centroids, _ = made(dim, rows=5, parts=3)
    grid = CostGrid.of(centroids, 0)
    costs, exponents = grid.measure(features)
    bits = 53 - (dim - 1).bit_length()
    for row, feature in enumerate(features):
        moved = feature.astype(np.float64) - grid.origin_D
        assert np.abs(moved).max() < 2.0 ** exponents[row]
        steps = [round(Fraction(float(value)) * Fraction(2) ** (bits - bits // 2 - int(exponents[row]))) for value in moved]
        for part in range(3):
            product = sum(int(a) * int(b) for a, b in zip(steps, grid.steps_DK[:, part], strict=True))
            scale = -2.0 * 2.0 ** (int(exponents[row]) - (bits - bits // 2) + grid.exponent - bits // 2)
            assert costs[row, part] == product * scale + grid.norms_K[part]


def test_costs_of_a_row_do_not_depend_on_its_batch():
    features, centroids, ids = made(64, rows=400)
    grid = CostGrid.of(centroids, 0)
    whole, exponents = grid.measure(features)
    unit = grid.unit_exponent(int(exponents.max()))
    whole = grid.to_integers(whole, ids, unit)
    for size in (1, 7, 64):
        pieces = [
            grid.to_integers(grid.measure(features[start : start + size])[0], ids[start : start + size], unit)
            for start in range(0, 400, size)
        ]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.parametrize("dim", [2, 96])
def test_integers_differ_from_the_distances_by_no_more_than_the_slack(scale, offset, dim):
    features, centroids, ids = made(dim, scale, offset * scale)
    grid = CostGrid.of(centroids, 0)
    costs, exponents = grid.measure(features)
    unit = grid.unit_exponent(int(exponents.max()))
    integers = grid.to_integers(costs, ids, unit)
    assert np.abs(integers).max() < 2**COST_BITS
    rows, parts = (each.reshape(-1) for each in np.indices(integers.shape))
    distances = squared_distances(features, centroids, rows, parts).reshape(integers.shape)
    # What all parts share is the squared length of the row seen from the origin.
    shared = np.square(features.astype(np.float64) - grid.origin_D).sum(axis=1)
    errors = np.abs(integers * 2.0 ** (unit - NOISE_BITS) + shared[:, None] - distances)
    slacks = np.array([grid.slack(int(exponent), unit) for exponent in exponents])
    assert (errors <= slacks[:, None]).all()
    typical = np.square(centroids.astype(np.float64) - grid.origin_D).sum(axis=1).max()
    assert slacks.max() < 1e-4 * typical, "a bound that is always true says nothing"


def test_an_outlier_leaves_the_other_rows_their_precision():
    features, centroids, _ = made(16)
    features[0] = 60_000.0
    grid = CostGrid.of(centroids, 0)
    exponents = grid.measure(features)[1]
    unit = grid.unit_exponent(int(exponents.max()))
    assert exponents[0] > exponents[1:].max() + 10
    assert grid.slack(int(exponents[1:].max()), unit) < 1e-4


def test_copies_differ_by_noise_below_the_unit():
    features, centroids, _ = made(8, rows=1)
    ids = random_ids(4000)
    grid = CostGrid.of(centroids, 0)
    costs, exponents = grid.measure(np.repeat(features, 4000, axis=0))
    integers = grid.to_integers(costs, ids, grid.unit_exponent(int(exponents.max())))
    assert (integers >> NOISE_BITS == integers[0] >> NOISE_BITS).all()
    noise = integers & (2**NOISE_BITS - 1)
    # Uniform, and independent between parts: their correlation is that of chance, 1 / sqrt(4000).
    assert abs(noise.mean() / 2**NOISE_BITS - 0.5) < 0.02
    assert np.abs(np.corrcoef(noise.T) - np.eye(7)).max() < 0.08


def test_identical_centroids_at_the_origin_have_a_grid():
    grid = CostGrid.of(np.zeros((3, 4), np.float32), 0)
    costs, exponents = grid.measure(np.ones((2, 4), np.float32))
    assert (grid.to_integers(costs, random_ids(2), grid.unit_exponent(int(exponents.max()))) >> NOISE_BITS == 0).all()
