"""Refusing images: limits, sums and the curve against NumPy, on problems whose answer is known.

Shape letters: N images, L coverages, R = 1 + B rows.
"""

import numpy as np
import pytest

from hardmoe.evaluation.abstention import COVERAGES_L, QUANTILES_Q, curve_results, curve_sums, interpolated, limits_of
from hardmoe.evaluation.bootstrap import poisson_weights

REPLICATES = 200


def ids(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16), np.uint8)


def curve(doubts: dict[str, np.ndarray], right_N: np.ndarray, validation: dict[str, np.ndarray]) -> dict:
    ids_N16 = ids(len(right_N))
    sums = {
        rule: curve_sums(doubts[rule], right_N, ids_N16, limits_of(validation[rule], COVERAGES_L), REPLICATES) for rule in doubts
    }
    return curve_results(sums)


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_limit_leaves_at_least_the_share_within_and_no_smaller_value_does(count: int) -> None:
    doubts_N = np.random.default_rng(count).integers(0, 50, count).astype(float)  # with ties
    for coverage, limit in zip(COVERAGES_L[:-1], limits_of(doubts_N, COVERAGES_L)[:-1], strict=True):
        assert np.mean(doubts_N <= limit) >= coverage - 1e-12
        assert np.mean(doubts_N < limit) < coverage
    assert limits_of(doubts_N, COVERAGES_L)[-1] == np.inf


def test_sums_are_those_of_numpy_in_every_replicate() -> None:
    rng, count = np.random.default_rng(1), 5000  # several chunks
    doubts_N, right_N, limits_L = rng.random(count), rng.random(count) < 0.5, np.array([0.1, 0.5, np.inf])
    found_RL2 = curve_sums(doubts_N, right_N, ids(count), limits_L, 20)
    weights_RN = np.concatenate([np.ones((1, count)), poisson_weights(ids(count), 20, 0)])
    for at, limit in enumerate(limits_L):
        answered_N = doubts_N <= limit
        np.testing.assert_array_equal(found_RL2[:, at, 0], weights_RN @ answered_N)
        np.testing.assert_array_equal(found_RL2[:, at, 1], weights_RN @ (answered_N & right_N))


def test_a_rule_that_knows_beats_one_that_guesses_and_the_interval_of_the_difference_says_so() -> None:
    rng, count = np.random.default_rng(2), 2000
    right_N = rng.random(count) < 0.6
    doubts = {"distance": np.where(right_N, 0.0, 1.0) + rng.random(count) / 2, "probability": rng.random(count)}
    found = curve(doubts, right_N, doubts)
    whole = right_N.mean()
    for point in found["curve"]:
        value = point["distance"]["precision@1"]["value"]
        assert value == pytest.approx(min(1.0, whole / point["coverage"]), abs=2e-3)
        assert point["probability"]["precision@1"]["value"] == pytest.approx(whole, abs=0.12)
        assert point["distance"]["answered"]["value"] == pytest.approx(point["coverage"], abs=1e-3)
    # Of a rule that knows all, 1 - the share of right ones among the answered, once they run out.
    expected = np.mean(1 - np.minimum(1.0, whole / COVERAGES_L))
    assert found["area"]["distance"]["value"] == pytest.approx(expected, abs=2e-3)
    assert found["area"]["probability"]["value"] == pytest.approx(1 - whole, abs=0.05)
    assert found["area"]["difference"]["high"] < 0
    assert found["curve"][-1]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_images_unlike_the_validation_images_are_answered_less_often_than_was_asked() -> None:
    rng, right_N = np.random.default_rng(3), np.ones(1000, bool)
    validation = {rule: rng.random(1000) for rule in ("distance", "probability")}
    found = curve({"distance": rng.random(1000) + 0.5, "probability": rng.random(1000)}, right_N, validation)
    half = next(point for point in found["curve"] if point["coverage"] == 0.5)
    assert half["distance"]["answered"]["value"] == pytest.approx(0.0, abs=0.02)
    assert half["probability"]["answered"]["value"] == pytest.approx(0.5, abs=0.05)
    nothing = found["curve"][0]["distance"]
    assert nothing["answered"]["value"] == 0.0
    assert nothing["precision@1"]["reason"] == found["area"]["distance"]["reason"] == "no test image is answered"


def test_limit_in_use_lies_on_the_line_between_the_kept_quantiles() -> None:
    distances_N = np.random.default_rng(4).gamma(3.0, size=50_000)
    kept = limits_of(distances_N, QUANTILES_Q).tolist()
    for coverage in (0.001, 0.5, 0.95, 0.9505, 0.999):
        assert np.mean(distances_N <= interpolated(kept, coverage)) == pytest.approx(coverage, abs=1e-4)
