"""Distances to centroids of any number of examples, part by part, as tables that add up: counts, sums, order statistics.

A distance is counted by the leading bits of its float32 pattern, which for numbers not below zero grow with the number: steps
of 0.1 % at any magnitude, so a quantile needs no range to be known beforehand, and tables of shards add up in any order to
the table of all. Rejected: keeping the distances (0.4 GB for a hundred million), and quantiles of a sample, which for the
99th percentile of a small part rest on a handful of examples.

Shape letters: N examples, K parts, C cells of the table that are not empty.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

_DROPPED_BITS = 13
"""Of float32's 23 bits of precision 10 are kept: steps of 2^-10."""
_BIN_BITS = 32 - _DROPPED_BITS
_UNIT_BITS = 20
"""Distances are summed in units of 2^-20, as whole numbers."""
_BLOCK_ROWS = 2**16
"""2^16 distances of at most 2^26 stay below 2^63 in these units; the sums of blocks are Python integers."""
_LOW_MASK = 2**32 - 1


@dataclass(frozen=True, eq=False)
class DistanceTable:
    """How often which distance occurs in which part; tables of disjoint sets of examples join in any order.

    Attributes:
        cells_C: part * 2^19 + leading bits of the distance, int64, ascending.
        counts_C: examples in that cell, int64.
        sizes_K: examples of every part, int64.
        totals: sum of the distances in every part, in units of 2^-20.
    """

    cells_C: NDArray[np.int64]
    counts_C: NDArray[np.int64]
    sizes_K: NDArray[np.int64]
    totals: list[int]

    @classmethod
    def empty(cls, num_parts: int) -> Self:
        """The table of no example."""
        nothing = np.zeros(0, np.int64)
        return cls(nothing, nothing, np.zeros(num_parts, np.int64), [0] * num_parts)

    @classmethod
    def of(cls, part_N: NDArray[np.int32], distance_N: NDArray[np.float32], num_parts: int) -> Self:
        """Count examples by their part and their distance, which is finite and not below zero."""
        bins_N = (distance_N + np.float32(0.0)).view(np.uint32).astype(np.int64) >> _DROPPED_BITS
        cells, counts = np.unique((part_N.astype(np.int64) << _BIN_BITS) + bins_N, return_counts=True)
        totals = [0] * num_parts
        for start in range(0, len(part_N), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            sums_K = np.zeros(num_parts, np.int64)
            units_N = np.rint(distance_N[rows].astype(np.float64) * 2.0**_UNIT_BITS).astype(np.int64)
            np.add.at(sums_K, part_N[rows], units_N)
            totals = [a + b for a, b in zip(totals, sums_K.tolist(), strict=True)]
        return cls(cells, counts.astype(np.int64), np.bincount(part_N, minlength=num_parts).astype(np.int64), totals)

    @classmethod
    def joined(cls, tables: Sequence["DistanceTable"]) -> Self:
        """The table of all examples of some tables, at least one."""
        cells, inverse = np.unique(np.concatenate([table.cells_C for table in tables]), return_inverse=True)
        counts = np.zeros(len(cells), np.int64)
        np.add.at(counts, inverse, np.concatenate([table.counts_C for table in tables]))
        sizes_K = np.sum([table.sizes_K for table in tables], axis=0)
        return cls(cells, counts, sizes_K, [sum(totals) for totals in zip(*(table.totals for table in tables), strict=True)])

    @property
    def num_examples(self) -> int:
        """All of them."""
        return int(self.sizes_K.sum())

    def means(self) -> list[float | None]:
        """Mean distance of every part, None of an empty one."""
        pairs = zip(self.totals, self.sizes_K.tolist(), strict=True)
        return [total / (size << _UNIT_BITS) if size else None for total, size in pairs]

    def limits(self, share: float) -> NDArray[np.int64]:
        """The cell that holds this quantile of every part's distances, int64 [K]; -1 for an empty part."""
        limits_K = np.full(len(self.sizes_K), -1, np.int64)
        edges = np.searchsorted(self.cells_C, np.arange(len(self.sizes_K) + 1) << _BIN_BITS)
        for part in np.flatnonzero(self.sizes_K).tolist():
            reached = np.cumsum(self.counts_C[edges[part] : edges[part + 1]]) >= share * self.sizes_K[part]
            limits_K[part] = self.cells_C[edges[part] + int(reached.argmax())]
        return limits_K

    def beyond(self, limits_K: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many examples of every part lie farther out than a cell of that part, int64 [K]; 0 where the cell is -1."""
        part_C = self.cells_C >> _BIN_BITS
        farther_C = (self.cells_C > limits_K[part_C]) & (limits_K[part_C] >= 0)
        found_K = np.zeros(len(self.sizes_K), np.int64)
        np.add.at(found_K, part_C[farther_C], self.counts_C[farther_C])
        return found_K

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as int64 arrays, for a file without pickle."""
        high = np.array([total >> 32 for total in self.totals], np.int64)
        low = np.array([total & _LOW_MASK for total in self.totals], np.int64)
        return {"cells": self.cells_C, "counts": self.counts_C, "sizes": self.sizes_K, "totals_high": high, "totals_low": low}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The inverse of `to_arrays`; other keys are left alone."""
        words = zip(arrays["totals_high"].tolist(), arrays["totals_low"].tolist(), strict=True)
        totals = [(high << 32) + low for high, low in words]
        return cls(arrays["cells"], arrays["counts"], arrays["sizes"], totals)
