"""Moments are exact, whatever the magnitudes, and the same bytes however the rows are ordered, batched and added."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from hardmoe.errors import DataError
from hardmoe.partitioning import moments as module
from hardmoe.partitioning.moments import WIDEST, Moments

LARGEST, SMALLEST = 65504.0, 2.0**-24

FLOAT16 = st.one_of(
    st.floats(width=16, allow_nan=False, allow_infinity=False),
    st.sampled_from([LARGEST, -LARGEST, SMALLEST, -SMALLEST, 2.0**-14 - SMALLEST, 0.0, -0.0, 1023.5]),
)


def as_bytes(moments):
    return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in moments.to_arrays().items()}


def fractions(features):
    return [[Fraction(float(value)) for value in row] for row in features]


def exact_products(features):
    """Sums of products of the rows with a one at the end of each, by Python's own rationals."""
    rows = [[*row, Fraction(1)] for row in fractions(features)]
    width = len(rows[0])
    return [[sum((row[i] * row[j] for row in rows), Fraction(0)) for j in range(width)] for i in range(width)]


def exact_covariance(features):
    """As rationals, each rounded once."""
    products, width = exact_products(features), features.shape[1]
    count = products[-1][-1]
    return np.array(
        [
            [float(products[i][j] / count - products[i][-1] * products[j][-1] / count**2) for j in range(width)]
            for i in range(width)
        ]
    )


def found_products(moments):
    """What the arrays say, as rationals."""
    pairs = zip(moments.high_AA.tolist(), moments.low_AA.tolist(), strict=True)
    return [[Fraction((h << 62) + low, 2**48) for h, low in zip(*pair, strict=True)] for pair in pairs]


@settings(max_examples=80)
@given(features=hypothesis_numpy.arrays(np.float16, st.tuples(st.integers(1, 30), st.integers(1, 5)), elements=FLOAT16))
def test_moments_of_float16_features_are_exact(features):
    moments = Moments.from_batch(features.astype(np.float32))
    assert found_products(moments) == exact_products(features)
    assert (moments.low_AA >= 0).all() and (moments.low_AA < 2**62).all()
    assert moments.num_rows == len(features)
    np.testing.assert_array_equal(moments.covariance(), exact_covariance(features))
    squares = [float(sum(value**2 for value in column) / len(features)) for column in zip(*fractions(features), strict=True)]
    np.testing.assert_array_equal(moments.mean_squares(), squares)


@pytest.mark.parametrize("rows", [2**11, 2**11 + 1, 2**13 - 1])
def test_blocks_full_of_the_largest_and_most_awkward_values_are_exact(rows):
    """Products at their limit: in blocks of four times as many rows they would pass 2^54 and be no multiples of 4 there."""
    # High and low parts, and so their sums, as large as they get; no float16, but on the grid of 2^-24.
    odd, even = ((2.0**40 - step + 2.0**19 - 2.0**16) * 2.0**-24 for step in (2.0**20, 2.0**21))
    values = np.array([LARGEST, -LARGEST, odd, even, SMALLEST, 2.0**-5 - SMALLEST, 3.0000610351562500], np.float64)
    features = np.tile(values.astype(np.float32), (rows, 1))
    expected = [[rows * Fraction(float(a)) * Fraction(float(b)) for b in [*features[0], 1.0]] for a in [*features[0], 1.0]]
    assert found_products(Moments.from_batch(features)) == expected
    assert not Moments.from_batch(features).covariance().any(), "features that are all the same have no variance at all"


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), cuts=st.lists(st.integers(0, 500), max_size=8))
def test_any_order_of_rows_batches_and_sums_gives_the_same_bytes(seed, cuts):
    rng = np.random.default_rng(seed)
    features = (rng.standard_normal((500, 7)) * 10.0 ** rng.integers(-4, 4, 7)).astype(np.float16).astype(np.float32)
    expected = Moments.from_batch(features)
    pieces = [Moments.from_batch(piece) for piece in np.split(features[rng.permutation(500)], sorted(cuts))]
    total = Moments.zero(7)
    for index in rng.permutation(len(pieces)):
        total = total + Moments.from_arrays(pieces[index].to_arrays())
    assert as_bytes(total) == as_bytes(expected)


def test_blocks_may_be_of_any_size(monkeypatch):
    features = np.random.default_rng(0).standard_normal((700, 5)).astype(np.float16).astype(np.float32)
    expected = as_bytes(Moments.from_batch(features))
    monkeypatch.setattr(module, "_BLOCK_ROWS", 33)
    assert as_bytes(Moments.from_batch(features)) == expected


def test_sums_far_beyond_what_float64_and_int64_hold_stay_exact():
    """As of a hundred billion rows: the same moments, added to themselves again and again."""
    features = np.array([[LARGEST, SMALLEST], [-LARGEST, 1.0], [LARGEST, 3.5]], np.float32)
    moments, doublings = Moments.from_batch(features), 35
    expected = [[value * 2**doublings for value in row] for row in exact_products(features)]
    before = moments.covariance()
    for _ in range(doublings):
        moments = moments + Moments.from_arrays(moments.to_arrays())
    assert expected[0][0] * 2**48 > 2**114, "two words are needed"
    assert found_products(moments) == expected
    assert moments.num_rows == 3 * 2**doublings
    np.testing.assert_array_equal(moments.covariance(), before)
    # A single row more is not lost among so many.
    one_more = moments + Moments.from_batch(np.array([[SMALLEST, SMALLEST]], np.float32))
    assert found_products(one_more)[1][1] - expected[1][1] == Fraction(2) ** -48


def test_covariance_agrees_with_numpy_and_a_large_mean_costs_nothing():
    features = (np.random.default_rng(3).standard_normal((4000, 9)) @ np.diag(np.arange(1, 10))).astype(np.float16)
    found = Moments.from_batch(features.astype(np.float32)).covariance()
    np.testing.assert_allclose(found, np.cov(features.T.astype(np.float64), bias=True), rtol=1e-9, atol=1e-12)
    # Where the sum of squares is 10^11 times the variance, float64 sums keep five digits.
    far = (30000.0 + np.random.default_rng(4).integers(0, 2, (1000, 2)) * 16.0).astype(np.float32)
    np.testing.assert_array_equal(Moments.from_batch(far).covariance(), exact_covariance(far))


def test_features_off_the_grid_are_rounded_to_it():
    features = np.array([[0.1, 2.0**-26], [1.0 / 3.0, -(2.0**-24) * 0.75]], np.float32)
    rounded = np.rint(features.astype(np.float64) * 2.0**24) * 2.0**-24
    assert found_products(Moments.from_batch(features)) == exact_products(rounded)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused(bad):
    features = np.ones((5, 3), np.float32)
    features[3, 1] = bad
    with pytest.raises(DataError, match="1 of 5 features hold NaN or infinity"):
        Moments.from_batch(features)


def test_features_beyond_float16_and_features_too_wide_are_refused():
    with pytest.raises(DataError, match=r"a feature of magnitude 70000 is beyond 65536.*set partition\.transform to l2"):
        Moments.from_batch(np.array([[1.0, -70000.0]], np.float32))
    with pytest.raises(DataError, match=rf"features of width {WIDEST + 1} are too wide.*{WIDEST} is the most"):
        Moments.zero(WIDEST + 1)


def test_moments_of_other_widths_are_not_added():
    with pytest.raises(ValueError, match="cannot be added"):
        Moments.zero(2) + Moments.zero(3)


def test_moments_of_no_rows_are_zero():
    assert as_bytes(Moments.from_batch(np.empty((0, 4), np.float32))) == as_bytes(Moments.zero(4))
    assert Moments.zero(4).num_rows == 0
