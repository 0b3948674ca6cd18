"""The Poisson bootstrap: its law, its independence of sharding, and its intervals."""

import itertools

import numpy as np
import pytest
from scipy.stats import poisson

from hardmoe.evaluation.bootstrap import (
    hierarchical_result,
    interval_result,
    paired_result,
    percentile_interval,
    poisson_weights,
)


def random_ids(num_examples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_examples, 16), dtype=np.uint8)


def test_poisson_weights_follow_the_poisson_law():
    weights = poisson_weights(random_ids(2000), num_replicates=100, seed=3)

    counts = np.bincount(weights.ravel(), minlength=8)[:8]
    expected = poisson.pmf(np.arange(8), 1.0) * weights.size
    error = np.sqrt(expected) + 1.0
    assert (np.abs(counts - expected) < 5 * error).all()


def test_poisson_weights_are_independent_between_replicates_and_examples():
    weights = poisson_weights(random_ids(3000), num_replicates=8, seed=0).astype(float)

    between_replicates = np.corrcoef(weights)[np.triu_indices(8, 1)]
    assert np.abs(between_replicates).max() < 5 / np.sqrt(3000)
    assert abs(np.corrcoef(weights[:, :-1].ravel(), weights[:, 1:].ravel())[0, 1]) < 5 / np.sqrt(weights.size)


def test_poisson_weights_do_not_depend_on_sharding_order_or_number_of_replicates():
    ids = random_ids(50)
    whole = poisson_weights(ids, num_replicates=20, seed=1)
    order = np.random.default_rng(2).permutation(50)

    np.testing.assert_array_equal(np.hstack([poisson_weights(ids[:13], 20, 1), poisson_weights(ids[13:], 20, 1)]), whole)
    np.testing.assert_array_equal(poisson_weights(ids[order], 20, 1), whole[:, order])
    np.testing.assert_array_equal(poisson_weights(ids, 5, 1), whole[:5])
    assert not np.array_equal(poisson_weights(ids, 20, 2), whole)


def test_percentile_interval_equals_quantiles_and_skips_missing_replicates():
    values = np.random.default_rng(0).normal(size=101)

    low, high = percentile_interval(np.append(values, np.nan), level=0.9)

    assert (low, high) == pytest.approx((np.sort(values)[5], np.sort(values)[95]))
    with pytest.raises(ValueError, match="no replicate"):
        percentile_interval(np.array([np.nan]))
    with pytest.raises(ValueError, match="level"):
        percentile_interval(values, level=95.0)


def test_interval_covers_the_truth_as_often_as_it_says():
    """The mean of 60 exponential draws, over 200 data sets: 95 % intervals miss in roughly 5 to 10 % of them."""
    covered = 0
    for seed in range(200):
        values = np.random.default_rng(seed).exponential(size=60)
        weights = poisson_weights(random_ids(60, seed), 200, seed).astype(float)
        low, high = percentile_interval(weights @ values / weights.sum(axis=1))
        covered += low < 1.0 < high
    assert 170 <= covered <= 199


def test_interval_result_without_examples_is_null_with_a_reason():
    assert interval_result(np.array([np.nan, np.nan])) == {
        "value": None,
        "low": None,
        "high": None,
        "reason": "no example with a tag",
    }
    result = interval_result(np.array([0.5, np.nan]))
    assert result["value"] == 0.5
    assert result["low"] is None


def test_centred_interval_keeps_the_spread_and_contains_the_value():
    replicates = np.linspace(0.4, 0.6, 101)
    result = interval_result(np.append(0.2, replicates), centred=True)
    assert (result["low"] + result["high"]) / 2 == pytest.approx(0.2)
    assert result["high"] - result["low"] == pytest.approx(0.19)


def test_paired_result_of_correlated_systems_is_narrow():
    noise = np.random.default_rng(0).normal(0.0, 0.05, 500)
    result = paired_result(np.append(0.6, 0.6 + noise), np.append(0.5, 0.5 + noise))
    assert result == {"value": pytest.approx(0.1), "low": pytest.approx(0.1), "high": pytest.approx(0.1)}
    with pytest.raises(ValueError, match="replicates"):
        paired_result(np.zeros(3), np.zeros(4))


def test_hierarchical_interval_of_one_run_is_its_own_and_of_several_covers_their_spread() -> None:
    rng = np.random.default_rng(0)
    values_R = 0.5 + 0.01 * rng.normal(size=1001)
    assert hierarchical_result(values_R[None]) == interval_result(values_R)
    # Runs that differ by far more than test images do: a mean of three of {0.3, 0.5, 0.7}, drawn with replacement.
    runs_SR = np.array([0.3, 0.5, 0.7])[:, None] + 1e-6 * rng.normal(size=(3, 4001))
    found = hierarchical_result(runs_SR)
    assert found["value"] == pytest.approx(0.5, abs=1e-5)
    means = [np.mean(drawn) for drawn in itertools.product((0.3, 0.5, 0.7), repeat=3)]
    assert (found["low"], found["high"]) == pytest.approx(np.quantile(means, [0.025, 0.975], method="inverted_cdf"), abs=1e-3)
