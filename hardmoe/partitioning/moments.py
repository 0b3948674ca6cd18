"""First and second moments of features, exact, and so the same in whatever order and batches the rows are added.

Principal directions decide where every image goes, so the matrix that they come from may depend neither on how the features
are cut into shards nor on the order in which a matrix product adds. Features are float16, hence integers m of at most 40 bits
in steps of 2^-24. With m = high * 2^20 + low, |high| <= 2^20 and |low| <= 2^19, the three matrices

    high'high,   low'low,   (high + low)'(high + low)

are sums of products of at most 2.25 * 2^40; of 2^11 rows all partial sums stay below 2^53 (4,608 * 2^40 = 2^52.2), so float64
products are exact in any order, with or without fused multiply-add. The third less the other two is high'low + low'high, and
each is NumPy's `A.T @ A`, which computes half of the matrix. A sum is kept as high * 2^62 + low with 0 <= low < 2^62 and both
int64, which is unique and overflows past 2^44 rows of the largest magnitude. A last column of ones makes count, sums and
products one matrix, of which the covariance is the Schur complement: computed with Python's integers and rounded once.

A row of 256 features takes 8.2 us on one thread of an EPYC (one such product in float64, which errs, takes 2.3 us; scaling a row
to unit length, 0.6 us), once. Rejected: float64 sums (they depend on where the shards are cut, and cancel where the
mean is large), sums of Python integers or by `np.add.reduceat` of products (a hundred times slower), and the moments of a
sample.

Shape letters: N examples, D feature dim, B rows of a block, A = D + 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hardmoe.errors import DataError
from hardmoe.neighbours.assignment import refuse_non_finite

GRID_BITS = 24
"""Features are looked at in steps of 2^-24, of which every float16 is a multiple."""
SPLIT_BITS = 20
"""Of a feature in such steps, so many bits are its low part."""
LARGEST = 2.0**16
"""Features beyond this magnitude are refused; float16 ends at 65,504."""
WIDEST = 2**13
"""Features of more dimensions are refused: their moments would take more than 1 GB."""

_BLOCK_ROWS = 2**11
_WORD_BITS = 62
_LOW_WORD = 2**_WORD_BITS - 1


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, sums and sums of products of a set of rows; `+` joins two disjoint sets, in any order.

    Attributes:
        high_AA: the sums of products in units of 2^-48, divided by 2^62 and rounded down, int64 [A, A]. The last row and column
            are those of a feature that is 1 everywhere.
        low_AA: what remains of each, int64 [A, A] in [0, 2^62).
    """

    high_AA: NDArray[np.int64]
    low_AA: NDArray[np.int64]

    @classmethod
    def zero(cls, dim: int) -> Self:
        """The moments of no rows at all.

        Raises:
            DataError: features of this width are too wide.
        """
        if dim > WIDEST:
            raise DataError(
                f"features of width {dim} are too wide for principal directions, whose moments are a matrix of that many rows "
                f"and columns: {WIDEST} is the most; set partition.transform to l2, or take narrower features"
            )
        return cls(np.zeros((dim + 1, dim + 1), np.int64), np.zeros((dim + 1, dim + 1), np.int64))

    @classmethod
    def from_batch(cls, features_ND: NDArray[np.float32]) -> Self:
        """The moments of a batch, float32 [N, D]; what is no multiple of 2^-24 (no float16) is rounded to one first.

        Raises:
            DataError: a feature is NaN, infinite or beyond `LARGEST`, or there are too many of them.
        """
        total = cls.zero(features_ND.shape[1])
        if features_ND.size:
            _refuse_unusable(features_ND)
        for start in range(0, len(features_ND), _BLOCK_ROWS):
            block_BD = features_ND[start : start + _BLOCK_ROWS]
            steps_BA = np.full((len(block_BD), total.dim + 1), 2.0**GRID_BITS)
            steps_BA[:, :-1] = to_steps(block_BD)
            total._take_in(split_steps(steps_BA), steps_BA)
        return total

    def __add__(self, other: "Moments") -> "Moments":
        if self.high_AA.shape != other.high_AA.shape:
            raise ValueError(f"moments of shapes {self.high_AA.shape} and {other.high_AA.shape} cannot be added")
        total = Moments(self.high_AA + other.high_AA, self.low_AA + other.low_AA)
        total._carry()
        return total

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return self._row(self.dim)[-1] >> (2 * GRID_BITS)

    @property
    def dim(self) -> int:
        """D, the width of the features."""
        return len(self.high_AA) - 1

    def sums_units(self) -> list[int]:
        """The sums of the features, in units of 2^-48."""
        return self._row(self.dim)[:-1]

    def mean_squares(self) -> NDArray[np.float64]:
        """The mean of every feature's square, float64 [D], each rounded once."""
        count = self._row(self.dim)[-1]
        return np.array([self._row(dim)[dim] / count for dim in range(self.dim)])

    def covariance(self) -> NDArray[np.float64]:
        """The covariance of the features (divided by their number), float64 [D, D], each element rounded once."""
        *sums, count = self._row(self.dim)
        sums_D = np.array(sums, object)
        covariance_DD = np.empty((self.dim, self.dim))
        for dim in range(self.dim):
            # With t the sums of products: (t_ij t_nn - t_in t_jn) / t_nn^2, where n is the column of ones.
            products = np.array(self._row(dim)[dim:-1], object)
            exact = products * count - sums_D[dim:] * sums[dim]
            covariance_DD[dim, dim:] = (exact / count**2).astype(np.float64)  # integers divide with one rounding
            covariance_DD[dim:, dim] = covariance_DD[dim, dim:]
        return covariance_DD

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as arrays, for a file without pickle."""
        return {"moments_high": self.high_AA, "moments_low": self.low_AA}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The inverse of `to_arrays`; other keys are left alone."""
        return cls(arrays["moments_high"], arrays["moments_low"])

    def _row(self, row: int) -> list[int]:
        """A row of sums as Python's integers."""
        pairs = zip(self.high_AA[row].tolist(), self.low_AA[row].tolist(), strict=True)
        return [(high << _WORD_BITS) + low for high, low in pairs]

    def _take_in(self, high_BA: NDArray[np.float64], low_BA: NDArray[np.float64]) -> None:
        """Add a block of rows, in place; overwrites `low_BA`."""
        high_AA, low_AA = high_BA.T @ high_BA, low_BA.T @ low_BA
        low_BA += high_BA
        both_AA = low_BA.T @ low_BA
        both_AA -= high_AA
        both_AA -= low_AA
        for products_AA, shift in ((high_AA, 2 * SPLIT_BITS), (both_AA, SPLIT_BITS), (low_AA, 0)):
            units_AA = products_AA.astype(np.int64)
            self.high_AA[...] += units_AA >> (_WORD_BITS - shift)
            units_AA &= _LOW_WORD >> shift
            self.low_AA[...] += units_AA << shift
            self._carry()

    def _carry(self) -> None:
        """Bring `low` back to [0, 2^62), in place."""
        self.high_AA[...] += self.low_AA >> _WORD_BITS
        self.low_AA[...] &= _LOW_WORD


def to_steps(features_BD: NDArray[np.float32]) -> NDArray[np.float64]:
    """Features in steps of 2^-24, rounded to whole ones; NaN and infinity stay."""
    steps_BD = np.multiply(features_BD, 2.0**GRID_BITS, dtype=np.float64)
    return np.rint(steps_BD, out=steps_BD)


def split_steps(steps_BD: NDArray[np.float64]) -> NDArray[np.float64]:
    """The high part of such steps, in units of 2^20, nearest; what is left in `steps_BD` is the low part."""
    high_BD = steps_BD * 2.0**-SPLIT_BITS
    np.rint(high_BD, out=high_BD)
    steps_BD -= high_BD * 2.0**SPLIT_BITS
    return high_BD


def _refuse_unusable(features_ND: NDArray[np.float32]) -> None:
    largest = max(float(features_ND.max()), -float(features_ND.min()))
    if largest <= LARGEST:
        return
    refuse_non_finite(features_ND, np.where(np.isfinite(features_ND).all(axis=1), 0.0, np.inf))
    raise too_large(largest)


def too_large(magnitude: float) -> DataError:
    """What is said of a feature beyond `LARGEST`."""
    return DataError(
        f"a feature of magnitude {magnitude:g} is beyond {LARGEST:g}, the largest that can be projected on principal directions "
        "exactly: set partition.transform to l2, or take a trunk whose features are normalised"
    )
