"""What a pass of the balanced partition is asked, what it finds, and what comes of it: see `balance` for why.

All of it is arrays, so that passes can be phases of a cluster, and integers, so that the sums come out the same in whatever
order shards are added. Rejected: histograms of the regrets of every pair of parts, which are smaller where many rows are near
a border, but say nothing of a row that may go to a third part, and cannot be solved exactly.

Shape letters: N rows, M rows collected, K parts, E exceptions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hardmoe.data.ids import sortable
from hardmoe.hashing import hash_fractions
from hardmoe.partitioning.exact_sums import sort_order_of_ids
from hardmoe.partitioning.transport import Transport


@dataclass(frozen=True, eq=False)
class Scan:
    """What a pass over all rows is asked.

    Attributes:
        number: which pass, from 0.
        prices_K: int64 [K].
        reach_KK: rows of part k are collected that would cost no more than [k, j] more in part j, int64 [K, K].
        rate: this share of them, by hash.
        most: about so many are wanted; if there are far more, the driver draws again among them.
    """

    number: int
    prices_K: NDArray[np.int64]
    reach_KK: NDArray[np.int64]
    rate: float
    most: int


@dataclass(frozen=True, eq=False)
class Found:
    """What a pass found in some rows; `+` joins disjoint sets of rows, and their order means nothing.

    Attributes:
        counts_K: rows that are cheapest in every part, int64 [K].
        near_K: those of them within reach of another part, int64 [K].
        ids_M16: example ids of those that were collected, uint8 [M, 16].
        costs_MK: their costs, int64 [M, K].
    """

    counts_K: NDArray[np.int64]
    near_K: NDArray[np.int64]
    ids_M16: NDArray[np.uint8]
    costs_MK: NDArray[np.int64]

    @classmethod
    def zero(cls, num_parts: int) -> Self:
        """What a pass over no rows finds."""
        none_K = np.zeros(num_parts, np.int64)
        return cls(none_K, none_K, np.empty((0, 16), np.uint8), np.empty((0, num_parts), np.int64))

    @classmethod
    def in_batch(cls, costs_NK: NDArray[np.int64], ids_N16: NDArray[np.uint8], scan: Scan, seed: int) -> Self:
        """What a pass finds in a batch of int64 [N, K] costs with the uint8 [N, 16] ids of the same rows."""
        parts_N, is_near_N = find_near(costs_NK, scan.prices_K, scan.reach_KK)
        chosen = np.flatnonzero(is_near_N)
        near_K = np.bincount(parts_N[chosen], minlength=len(scan.prices_K))
        if scan.rate < 1.0:
            chosen = chosen[hash_fractions(ids_N16[chosen], seed, "balance-pass", scan.number) < scan.rate]
        return cls(np.bincount(parts_N, minlength=len(scan.prices_K)), near_K, ids_N16[chosen], costs_NK[chosen])

    def __add__(self, other: "Found") -> "Found":
        return Found.joined([self, other])

    @classmethod
    def joined(cls, several: "Sequence[Found]") -> "Found":
        """The sum of one or more."""
        return Found(
            np.sum([found.counts_K for found in several], axis=0),
            np.sum([found.near_K for found in several], axis=0),
            np.concatenate([found.ids_M16 for found in several]),
            np.concatenate([found.costs_MK for found in several]),
        )

    def thinned(self, scan: Scan, rate: float, seed: int) -> "Found":
        """As if the pass had collected this lower share only."""
        kept_M = hash_fractions(self.ids_M16, seed, "balance-pass", scan.number) < rate
        return Found(self.counts_K, self.near_K, self.ids_M16[kept_M], self.costs_MK[kept_M])

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as arrays, for a file without pickle."""
        return {"counts": self.counts_K, "near": self.near_K, "ids": self.ids_M16, "costs": self.costs_MK}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The inverse of `to_arrays`."""
        return cls(arrays["counts"], arrays["near"], arrays["ids"], arrays["costs"])


@dataclass(frozen=True, eq=False)
class Plan:
    """Where every row goes: where cost + price is least, the lower part among equals, but for the exceptions.

    Attributes:
        prices_K: int64 [K].
        ids_E16: the exceptions' ids, ascending, uint8 [E, 16].
        parts_E: where these go, int32 [E].
        passes: how many passes over all rows it took.
    """

    prices_K: NDArray[np.int64]
    ids_E16: NDArray[np.uint8]
    parts_E: NDArray[np.int32]
    passes: int

    @classmethod
    def of(cls, ids_M16: NDArray[np.uint8], costs_MK: NDArray[np.int64], solved: Transport, passes: int) -> Self:
        """The plan that puts these rows where they were solved to be, and all others where the prices send them."""
        differs = np.flatnonzero((costs_MK + solved.prices_K).argmin(axis=1) != solved.parts_M)
        differs = differs[sort_order_of_ids(ids_M16[differs])]
        return cls(solved.prices_K, ids_M16[differs], solved.parts_M[differs], passes)

    def place(self, costs_NK: NDArray[np.int64], ids_N16: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Where the prices alone send every row, and where it goes; int32 [N] each."""
        priced_N = (costs_NK + self.prices_K).argmin(axis=1).astype(np.int32)
        if not len(self.parts_E):
            return priced_N, priced_N
        known_E, keys_N = sortable(self.ids_E16), sortable(ids_N16)
        at_N = np.minimum(np.searchsorted(known_E, keys_N), len(known_E) - 1)
        return priced_N, np.where(known_E[at_N] == keys_N, self.parts_E[at_N], priced_N)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as arrays, for a file without pickle."""
        return {"prices": self.prices_K, "ids": self.ids_E16, "parts": self.parts_E, "passes": np.array([self.passes])}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The inverse of `to_arrays`."""
        return cls(arrays["prices"], arrays["ids"], arrays["parts"], int(arrays["passes"][0]))


def find_near(
    costs_NK: NDArray[np.int64], prices_K: NDArray[np.int64], reach_KK: NDArray[np.int64]
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Where every row is cheapest, intp [N], and whether another part is within reach, bool [N]."""
    regrets_NK = costs_NK + prices_K
    parts_N = regrets_NK.argmin(axis=1)
    regrets_NK -= np.take_along_axis(regrets_NK, parts_N[:, None], axis=1)
    elsewhere_KK = reach_KK.copy()
    np.fill_diagonal(elsewhere_KK, -1)
    return parts_N, (regrets_NK <= elsewhere_KK[parts_N]).any(axis=1)
