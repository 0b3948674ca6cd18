"""Total variation, its level by chance and the chi-square test, against SciPy and against every possible deal."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, chi2_contingency, hypergeom

from hardmoe.partitioning.shares import chance_total_variation, chi_square_p, chi_square_tail, total_variation

counts = st.integers(1, 6).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(0, 40), min_size=n, max_size=n).filter(any) for _ in range(2)))
)


def expected_by_summing(first, second):
    """The expectation, part by part, as a sum over all that may happen."""
    n, m = sum(first), sum(second)
    total = 0.0
    for a, b in zip(first, second, strict=True):
        drawn = np.arange(n + 1)
        probability = hypergeom(n + m, a + b, n).pmf(drawn)
        total += (probability * np.abs(drawn / n - (a + b - drawn) / m)).sum()
    return total / 2


@given(counts)
def test_total_variation_and_its_level_by_chance_equal_their_definitions(pair):
    first, second = pair
    shares = np.array(first) / sum(first), np.array(second) / sum(second)
    assert total_variation(first, second) == pytest.approx(np.abs(shares[0] - shares[1]).sum() / 2)
    assert chance_total_variation(first, second) == pytest.approx(expected_by_summing(first, second), rel=1e-9, abs=1e-12)


def test_level_by_chance_is_what_dealing_out_a_pool_gives_on_average():
    first, second = [300, 120, 60, 20], [31, 9, 8, 2]
    pool = np.repeat(np.arange(4), np.add(first, second))
    generator, found = np.random.default_rng(0), []
    for _ in range(4000):
        dealt = generator.permutation(pool)
        found.append(
            total_variation(np.bincount(dealt[:500], minlength=4).tolist(), np.bincount(dealt[500:], minlength=4).tolist())
        )
    assert chance_total_variation(first, second) == pytest.approx(np.mean(found), abs=4 * np.std(found) / np.sqrt(4000))


def test_level_by_chance_of_a_hundred_million_examples_is_the_normal_distribution_s():
    shares = np.array([0.5, 0.3, 0.15, 0.05])
    n, m = 100_000_000, 10_000_000
    expected = np.sqrt(2 / np.pi * shares * (1 - shares) * (1 / n + 1 / m)).sum() / 2
    found = chance_total_variation((shares * n).astype(int).tolist(), (shares * m).astype(int).tolist())
    assert found == pytest.approx(expected, rel=1e-4)


@given(st.floats(1e-6, 2000.0), st.integers(1, 400))
def test_chi_square_tail_equals_scipy_s(statistic, degrees):
    expected = chi2.sf(statistic, degrees)
    assert chi_square_tail(statistic, degrees) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_chi_square_tail_at_and_below_zero_is_certain():
    assert (chi_square_tail(0.0, 3), chi_square_tail(-1.0, 3)) == (1.0, 1.0)


def test_p_value_equals_scipy_s_where_every_cell_is_large():
    first, second = [900, 500, 400, 200], [90, 61, 30, 19]
    assert chi_square_p(first, second) == pytest.approx(chi2_contingency([first, second], correction=False).pvalue)


@pytest.mark.parametrize(
    ("last", "merged"),
    [
        ((40, 3), [[900, 500, 445], [90, 61, 34]]),
        ((80, 8), [[900, 500, 400, 85], [90, 61, 30, 9]]),
    ],
    ids=["into the smallest", "to one cell"],
)
def test_parts_too_small_for_the_test_are_put_together(last, merged):
    """Of 2030 images 185 are in the second set, which expects five of a part of 55."""
    first, second = [900, 500, 400, 3, 2, last[0] // 2, last[0] // 2, 0], [90, 61, 30, 0, 1, last[1], 0, 0]
    assert chi_square_p(first, second) == pytest.approx(chi2_contingency(merged, correction=False).pvalue)


def test_sets_too_small_for_the_test_have_no_p_value():
    assert chi_square_p([1000, 900], [2, 1]) is None
    assert chi_square_p([1000], [50]) is None
    assert chi_square_p([3, 2], [2, 2]) is None


def test_p_values_of_sets_of_one_pool_are_uniform():
    generator = np.random.default_rng(5)
    shares = generator.dirichlet(np.ones(12))
    found = [
        chi_square_p(generator.multinomial(5000, shares).tolist(), generator.multinomial(800, shares).tolist())
        for _ in range(600)
    ]
    assert np.mean(np.array(found) < 0.1) == pytest.approx(0.1, abs=0.04)
    assert np.mean(found) == pytest.approx(0.5, abs=0.05)
