"""Balanced parts: no part too large, at the least cost that SciPy finds, proved so, and the same however the rows are cut."""

from fractions import Fraction

import numpy as np
import pytest
from balancing import SEED, balanced, collections, random_ids, squared
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from hardmoe.partitioning import balance
from hardmoe.partitioning.balance import capacity_of, find_plan
from hardmoe.partitioning.balance_pass import Found
from hardmoe.partitioning.balance_placement import to_units
from hardmoe.partitioning.cost_grid import CostGrid

COLLECTIONS = {name: (features, centroids) for name, features, centroids in collections()}


def optimum(distances, capacity):
    repeated = distances[:, np.repeat(np.arange(distances.shape[1]), capacity)]
    return float(repeated[linear_sum_assignment(repeated)].sum())


@pytest.mark.parametrize("most_rows", [2**18, 120, 30], ids=["solved at once", "by excerpts", "by small excerpts"])
@pytest.mark.parametrize("slack", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("name", COLLECTIONS)
def test_parts_are_no_larger_than_allowed_and_cost_no_more_than_scipy_finds(name, slack, most_rows, monkeypatch):
    monkeypatch.setattr(balance, "_MOST_ROWS", most_rows)
    features, centroids = COLLECTIONS[name]
    num_rows, num_parts = len(features), len(centroids)
    found = balanced(features, random_ids(num_rows), centroids, slack)
    record, distances = found.record, squared(features, centroids)
    sizes = np.bincount(found.parts, minlength=num_parts)
    allowed = max(-(-num_rows // num_parts), int((1 + Fraction(str(slack))) * num_rows / num_parts))
    assert record["capacity"] == min(num_rows, allowed)
    assert (record["largest"], sizes.sum()) == (sizes.max(), num_rows)
    assert sizes.max() <= allowed
    cost, best = distances[np.arange(num_rows), found.parts].sum(), optimum(distances, record["capacity"])
    assert cost <= best * (1 + 1e-5)
    assert record["cost"] == pytest.approx(cost, rel=1e-9, abs=1e-9)
    assert record["unconstrained_cost"] == pytest.approx(distances.min(axis=1).sum(), rel=1e-9, abs=1e-9)
    # The certificate: below the optimum, but by little; and its prices give it to anybody who has the features.
    assert record["lower_bound"] <= best * (1 + 1e-12)
    assert record["lower_bound"] >= best * (1 - 1e-4)
    prices = np.array(record["prices"])
    by_prices = (distances + prices).min(axis=1).sum() - record["capacity"] * prices.sum()
    assert max(by_prices, record["unconstrained_cost"]) == pytest.approx(record["lower_bound"], rel=1e-4, abs=1e-9)
    nearest = distances.argmin(axis=1)
    assert record["serve_elsewhere"] == np.bincount(found.parts[found.parts != nearest], minlength=num_parts).tolist()


@pytest.mark.parametrize("name", ["blobs of very unequal sizes", "copies", "an outlier and a speck"])
@pytest.mark.parametrize("most_rows", [2**18, 90])
def test_any_number_of_shards_and_any_order_of_rows_give_the_same_bytes(name, most_rows, monkeypatch):
    monkeypatch.setattr(balance, "_MOST_ROWS", most_rows)
    features, centroids = COLLECTIONS[name]
    ids = random_ids(len(features))
    expected = balanced(features, ids, centroids, 0.05)
    assert (expected.plan.passes > 1) == (most_rows == 90)
    for shards in (7, 64):
        found = balanced(features, ids, centroids, 0.05, shards)
        np.testing.assert_array_equal(found.parts, expected.parts)
        assert found.record == expected.record
    order = np.random.default_rng(0).permutation(len(features))
    found = balanced(features[order], ids[order], centroids, 0.05, 5)
    np.testing.assert_array_equal(found.parts, expected.parts[order])
    assert found.record == expected.record


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), most_rows=st.integers(20, 300), parts=st.integers(2, 9), copies=st.integers(1, 40))
def test_excerpts_lead_to_the_optimum_that_all_rows_together_have(seed, most_rows, parts, copies):
    """The noise makes the best assignment unique, so it can be asked for row by row."""
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((300 // copies, 3)) * rng.choice([0.01, 1.0], (300 // copies, 1))
    features = np.repeat(points, copies, axis=0).astype(np.float32)
    centroids = rng.standard_normal((parts, 3)).astype(np.float32)
    ids = random_ids(len(features), seed)
    expected = balanced(features, ids, centroids, 0.03)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance, "_MOST_ROWS", most_rows)
        found = balanced(features, ids, centroids, 0.03)
    np.testing.assert_array_equal(found.parts, expected.parts)


def test_few_rows_are_exceptions_even_where_all_rows_are_copies():
    """Without noise, prices cannot tell copies apart, and every copy would have to be listed."""
    features, centroids = np.ones((20_000, 2), np.float32), np.arange(12, dtype=np.float32).reshape(6, 2)
    found = balanced(features, random_ids(20_000), centroids)
    assert np.bincount(found.parts).max() == 3334
    assert len(found.plan.parts_E) < 20


@pytest.mark.parametrize("copies", [0.0, 0.4], ids=["distinct rows", "two fifths copies"])
def test_large_collections_need_two_passes_and_never_all_rows(copies, monkeypatch):
    """At 60,000 rows and excerpts of 4,096, as at millions and 262,144."""
    monkeypatch.setattr(balance, "_MOST_ROWS", 4096)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((60_000, 8)).astype(np.float32)
    features[: int(copies * 60_000)] = features[0]
    centroids = np.concatenate([features[:1], rng.standard_normal((7, 8))]).astype(np.float32)
    seen = []
    original = balance._Excerpt.__init__

    def watched(self, scan, found, capacity, seed):
        seen.append((len(found.ids_M16), int(found.near_K.sum())))
        original(self, scan, found, capacity, seed)

    monkeypatch.setattr(balance._Excerpt, "__init__", watched)
    found = balanced(features, random_ids(60_000), centroids, 0.02)
    assert np.bincount(found.parts).max() <= found.record["capacity"] == 7650
    assert found.record["cost"] <= found.record["lower_bound"] * (1 + 1e-4)
    assert found.plan.passes <= 3
    assert max(collected for collected, _ in seen) < 2 * 4096
    assert len(found.plan.parts_E) < 50


def test_search_killed_between_passes_is_replayed_from_the_stored_findings(monkeypatch):
    monkeypatch.setattr(balance, "_MOST_ROWS", 60)
    features, centroids = COLLECTIONS["blobs of very unequal sizes"]
    ids, grid = random_ids(len(features)), CostGrid.of(centroids, SEED)
    costs, exponents = grid.measure(features)
    costs = grid.to_integers(costs, ids, grid.unit_exponent(int(exponents.max())))
    capacity = capacity_of(len(features), len(centroids), 0.0)

    def search(stored):
        """Answer the first passes from what is stored, store the others."""
        finding, answers = find_plan(ids[:60], costs[:60], len(features), capacity, SEED), list(stored)
        try:
            scan = next(finding)
            while True:
                if scan.number >= len(answers):
                    answers.append(Found.in_batch(costs, ids, scan, SEED).to_arrays())
                scan = finding.send(Found.from_arrays(answers[scan.number]))
        except StopIteration as stop:
            return stop.value, answers

    expected, answers = search([])
    assert len(answers) > 2
    for kept in range(len(answers)):
        found, _ = search(answers[:kept])
        for name, array in expected.to_arrays().items():
            assert found.to_arrays()[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(
    ("rows", "parts", "slack", "expected"),
    [
        (100, 5, 0.15, 23),
        (100, 5, 0.0, 20),
        (101, 5, 0.0, 21),
        (7, 7, 0.9, 1),
        (10, 3, 100.0, 10),
        (5, 1, 0.0, 5),
        (10, 4, 0.05, 3),
    ],
)
def test_capacity_is_the_allowed_size_rounded_down_but_always_enough(rows, parts, slack, expected):
    """In floats 1.15 * 100 / 5 is 22.999999999999996, and a part would have had room for 22."""
    assert capacity_of(rows, parts, slack) == expected


def test_sums_of_distances_are_exact_to_a_unit_per_row():
    values = np.random.default_rng(0).random(50_000) * 10.0 ** np.random.default_rng(1).integers(-9, 14, 50_000)
    exact = sum(Fraction(float(value)) for value in values) * 2**40
    assert abs(to_units(values) - exact) <= len(values) / 2
    assert to_units(values[::-1]) == to_units(values) == to_units(values[:17]) + to_units(values[17:])
