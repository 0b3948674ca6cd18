"""What it costs to put a row into a part, as integers: the same on every machine, for any batch and any order of the sums.

The cost of row x in part k is |x - c_k|^2 without the term |x|^2 that all parts share, so c_k.c_k - 2 x.c_k, both seen from the
mean of the centroids. To make the product exact the centroids are rounded to a grid of their own and every row to one by its
largest coordinate, so that an outlier coarsens only itself. With a and b bits, a + b + log2 D <= 53, the products are integers
whose sums stay within 2^53: float64 multiplies the matrices at full speed, and no order of additions can change a bit. The
result is rounded once to a unit common to all rows, 2^-38 of the largest cost there can be.

Below that unit come 16 bits of noise, a hash of example id and part. Copies of one image would otherwise tie everywhere, and
a price could only move all of them or none; with the noise a small step of a price moves a few. `slack` says by how much all
this may err, so that a bound on the integers becomes one on the distances by definition (`neighbours.assignment`).

Rejected: distances by definition for every pair (8 times the time at 64 dimensions and 32 parts), float32 with a margin as
in `assign` (decides which part is nearest, but the solver needs all costs to the last bit), and one grid for all rows (a
single feature of 65,504 among ones of 1 would leave them 7 bits).

Shape letters: N rows, D feature dim, K parts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hardmoe.hashing import derive_seed, hash_ids
from hardmoe.neighbours.assignment import sum_of_squares

NOISE_BITS = 16
_VALUE_BITS = 38  # with the noise below COST_BITS of the solver
_EXACT_BITS = 53
_BLOCK_ELEMENTS = 2**19  # float64 values of a block of features or costs: 4 MB

Batches = Iterable[tuple[NDArray[np.uint8], NDArray[np.float32]]]
"""Ids uint8 [N, 16] and features float32 [N, D], after the router's transform."""


@dataclass(frozen=True, eq=False)
class CostGrid:
    """The centroids, made ready for exact products.

    Attributes:
        origin_D: mean of the centroids, float64 [D].
        steps_DK: centroids minus origin in steps of the grid, integers as float64 [D, K].
        norms_K: squared lengths of the centroids seen from the origin, float64 [K].
        exponent: coordinates of the centroids, seen from the origin, are below 2^exponent.
        row_bits: bits that a row's coordinates are rounded to.
        odd_K: odd numbers that spread the noise of a row over the parts, uint64 [K].
        seed: the recipe's seed, for the noise.
    """

    origin_D: NDArray[np.float64]
    steps_DK: NDArray[np.float64]
    norms_K: NDArray[np.float64]
    exponent: int
    row_bits: int
    odd_K: NDArray[np.uint64]
    seed: int

    @classmethod
    def of(cls, centroids_KD: NDArray[np.float32], seed: int) -> Self:
        """The grid of float32 [K, D] centroids."""
        centroids64_KD = centroids_KD.astype(np.float64)
        origin_D = np.add.reduce(centroids64_KD, axis=0) / len(centroids_KD)
        moved_KD = np.ascontiguousarray(centroids64_KD - origin_D)
        exponent = int(np.frexp(np.abs(moved_KD).max())[1])
        bits = _EXACT_BITS - (moved_KD.shape[1] - 1).bit_length()
        steps_KD = np.rint(np.ldexp(moved_KD, bits // 2 - exponent))
        steps_DK, norms_K = np.ascontiguousarray(steps_KD.T), sum_of_squares(moved_KD)
        odd_K = np.array([derive_seed(seed, "balance", part) | 1 for part in range(len(norms_K))], np.uint64)
        return cls(origin_D, steps_DK, norms_K, exponent, bits - bits // 2, odd_K, seed)

    def measure(self, features_ND: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """Costs before they are rounded to the common unit.

        Args:
            features_ND: float32 [N, D], finite, after the router's transform.

        Returns:
            Costs float64 [N, K], and exponents int32 [N]: coordinates of row n, seen from the origin, are below 2^exponent.
        """
        moved_ND = np.subtract(features_ND, self.origin_D, dtype=np.float64)
        exponents_N = np.frexp(np.maximum(moved_ND.max(axis=1), -moved_ND.min(axis=1)))[1]
        moved_ND *= np.ldexp(1.0, self.row_bits - exponents_N)[:, None]
        costs_NK = np.rint(moved_ND, out=moved_ND) @ self.steps_DK
        costs_NK *= np.ldexp(-2.0, exponents_N - self.row_bits + self.exponent - self._centroid_bits)[:, None]
        costs_NK += self.norms_K
        return costs_NK, exponents_N

    def unit_exponent(self, largest_exponent: int) -> int:
        """Exponent of the common unit, where no row's exponent is larger than this."""
        one_norm = float(np.abs(self.steps_DK).sum(axis=0).max()) * 2.0 ** (self.exponent - self._centroid_bits)
        bound = float(self.norms_K.max()) + one_norm * 2.0 ** (largest_exponent + 1)
        return int(np.frexp(bound)[1]) - _VALUE_BITS

    def to_integers(self, costs_NK: NDArray[np.float64], ids_N16: NDArray[np.uint8], unit: int) -> NDArray[np.int64]:
        """Costs in units of 2^(unit - NOISE_BITS), with the noise, int64 [N, K]; destroys its input.

        Args:
            costs_NK: from `measure`.
            ids_N16: example ids of the rows, uint8 [N, 16].
            unit: from `unit_exponent`.
        """
        costs_NK *= 2.0**-unit
        integers_NK = np.rint(costs_NK, out=costs_NK).astype(np.int64)
        integers_NK <<= NOISE_BITS
        noise_NK = hash_ids(ids_N16, self.seed, "balance")[:, None] * self.odd_K
        noise_NK >>= np.uint64(64 - NOISE_BITS)
        integers_NK += noise_NK.view(np.int64)
        return integers_NK

    def slack(self, exponent: int, unit: int) -> float:
        """By how much an integer cost of a row of this exponent may differ from its squared distance, less what all parts share.

        Rounding errs by half a step in every coordinate of the row and of the centroid: by D 2^(e + e' - b) in the product,
        with exponents e and e' and b bits, hence by twice that in the cost; rounding to the unit and noise by 1.5 units. Both
        are doubled, which covers the float64 roundings here and in the definition of the distance.
        """
        dim = len(self.origin_D)
        return dim * 2.0 ** (exponent + self.exponent - self._centroid_bits + 2) + 2.0 ** (unit + 2)

    @property
    def _centroid_bits(self) -> int:
        return (_EXACT_BITS - (len(self.origin_D) - 1).bit_length()) // 2


def row_blocks(batches: Batches, grid: CostGrid) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float32]]]:
    """The same rows, in order, a few thousand at a time."""
    block = max(1, _BLOCK_ELEMENTS // max(grid.steps_DK.shape))
    for ids_N16, features_ND in batches:
        for start in range(0, len(ids_N16), block):
            yield ids_N16[start : start + block], features_ND[start : start + block]
