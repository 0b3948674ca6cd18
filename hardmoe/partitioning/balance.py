"""Prices that make the parts as large as is allowed and no larger, at the least sum of squared distances.

With a price l_k >= 0 on every part and every row where d_ik + l_k is least, the rows cost no more than any assignment that
puts `capacity` rows into a part at most: g(l) = sum_i min_k (d_ik + l_k) - capacity * sum_k l_k is a lower bound for all of
these (Lagrangian duality), and reached where the parts with a price are just full. What is looked for is the best l, and who
goes where among the few rows that tie there. Both come from exact solutions (`transport`) of ever better excerpts:

1. A sample by hash, solved with the same share of the capacity. Its prices are wrong by the sample's noise. How wrong is seen
   from eight subsamples: the largest deviation of (l_k - l_j) among them, K x K numbers, is the `reach` within which the
   boundary of k and j is looked for. A pair that a dense cloud lies between has a short reach, an empty border a long one.
2. A pass over all rows at these prices. It counts every part exactly and collects the rows within reach of another part, the
   only ones that the true prices can still move; where these are too many, a part of them, drawn by hash. They are solved
   with the room that the others leave. That is repeated until all within reach were collected and the prices moved by no
   more than the reach. Then the rows that were not collected are provably in their parts at the new prices as well: the
   solution is optimal for all rows.

Millions of rows take one or two passes, 244 times as many as the sample holds three to five, and the exceptions are a few
dozen rows. Everything is an integer and a function of sets of rows, so sharding, workers and scheduling cannot change a bit.
Rejected: subgradient steps and one price at a time, which take many passes for the last per cent and oscillate where many rows
tie; balancing in the fit only (the parts come out unequal all the same); and the greedy rule "nearest with room", which depends
on the order of the rows and cost 7 % more than the least (`tests/benchmarks/RESULTS.md`).

Shape letters: N rows, S rows of the sample, M rows collected, R rows of one part, K parts, G subsamples.
"""

from collections.abc import Generator
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from hardmoe.hashing import hash_ids
from hardmoe.partitioning.balance_pass import Found, Plan, Scan, find_near
from hardmoe.partitioning.exact_sums import sort_order_of_ids
from hardmoe.partitioning.transport import Transport, solve_transport

_GROUPS = 8
_CHEAP_PASSES = 4  # each makes the prices' error 3 to 10 times smaller; for 244 times the sample's rows it takes 3 to 5
_LEAST_DEPTH = 4  # so many rows of an excerpt are within reach of every border, however sure its prices seem
_LONGEST_REACH = 2**58  # beyond any regret: all rows are within it
_MOST_ROWS = 2**18
_MOST_COSTS = 2**24  # of an excerpt on the driver: 128 MB


def capacity_of(num_rows: int, num_parts: int, slack: float) -> int:
    """How many rows a part may have: (1 + slack) times the mean, rounded down, but the mean rounded up at least."""
    # Of the decimal that the user wrote: in floats 1.15 * 100 / 5 is 22.999999999999996.
    generous = (1 + Fraction(repr(slack))) * num_rows / num_parts
    return min(num_rows, max(-(-num_rows // num_parts), int(generous)))


def most_rows(num_parts: int) -> int:
    """How many rows the driver looks at together."""
    return max(1, min(_MOST_ROWS, _MOST_COSTS // num_parts))


def find_plan(
    ids_S16: NDArray[np.uint8], costs_SK: NDArray[np.int64], num_rows: int, capacity: int, seed: int
) -> Generator[Scan, Found, Plan]:
    """The search described above, as a generator: it yields passes and expects to be sent what each found in all rows.

    Args:
        ids_S16: example ids of the sample, or of all rows, in any order, uint8 [S, 16].
        costs_SK: their costs, int64 [S, K].
        num_rows: of how many rows the sample was drawn.
        capacity: how many rows a part may have.
        seed: the recipe's seed.
    """
    ids_S16, costs_SK = _in_hash_order(ids_S16, costs_SK, seed)
    solved = _solve_sample(costs_SK, num_rows, capacity)
    if len(costs_SK) == num_rows:
        return Plan.of(ids_S16, costs_SK, solved, 0)
    reach_KK = np.maximum(_sample_spread(costs_SK, solved, num_rows, capacity), _depth(costs_SK, solved))
    expected = find_near(costs_SK, solved.prices_K, reach_KK)[1].sum() * num_rows / len(costs_SK)
    budget, number = most_rows(costs_SK.shape[1]), 0
    while True:
        scan = Scan(number, solved.prices_K, reach_KK, min(1.0, budget / max(1.0, float(expected))), budget)
        found = yield scan
        excerpt = _Excerpt(scan, found, capacity, seed)
        solved = excerpt.solve()
        number += 1
        if excerpt.is_settled(solved):
            return Plan.of(excerpt.ids_M16, excerpt.costs_MK, solved, number)
        if excerpt.is_complete or number >= _CHEAP_PASSES:
            budget *= 2  # in the end all rows are looked at together, so this ends, whatever the rows are like
        reach_KK = excerpt.next_reach(solved)
        expected = excerpt.expected_near(solved, reach_KK)


def _in_hash_order(
    ids_N16: NDArray[np.uint8], costs_NK: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The rows in an order that does not depend on how they came, and in which every stretch is a fair sample."""
    by_id = sort_order_of_ids(ids_N16)
    order = by_id[np.argsort(hash_ids(ids_N16[by_id], seed, "balance-order"), kind="stable")]
    return ids_N16[order], costs_NK[order]


def _shares(capacity: int, num_parts: int, count: int, num_rows: int) -> NDArray[np.int64]:
    return np.full(num_parts, -(-capacity * count // num_rows), np.int64)


def _solve_sample(costs_SK: NDArray[np.int64], num_rows: int, capacity: int) -> Transport:
    """Solve ever longer stretches of the sample, each from the prices of the last: the first one is small, the others near."""
    num_sampled, num_parts = costs_SK.shape
    size = min(num_sampled, max(256, 8 * num_parts))
    solved = solve_transport(costs_SK[:size], _shares(capacity, num_parts, size, num_rows))
    while size < num_sampled:
        size = min(num_sampled, 4 * size)
        solved = solve_transport(costs_SK[:size], _shares(capacity, num_parts, size, num_rows), solved.prices_K)
    return solved


def _sample_spread(costs_SK: NDArray[np.int64], solved: Transport, num_rows: int, capacity: int) -> NDArray[np.int64]:
    """How far prices of subsamples lie from the sample's, int64 [K, K]; see `_deviation`."""
    prices = []
    for group in range(_GROUPS):
        costs_GK = costs_SK[group::_GROUPS]
        room_K = _shares(capacity, costs_SK.shape[1], len(costs_GK), num_rows)
        prices.append(solve_transport(costs_GK, room_K, solved.prices_K).prices_K)
    return _deviation(prices, solved.prices_K)


def _deviation(several: list[NDArray[np.int64]], prices_K: NDArray[np.int64]) -> NDArray[np.int64]:
    """Largest deviation of a difference of two prices among the subsamples', int64 [K, K].

    A subsample of an eighth has errors sqrt(8) times the whole's, and the largest of eight lies about 1.4 standard deviations
    out: together some four of the whole's standard deviations.
    """
    shifts_GK = np.stack(several) - prices_K
    deviation_KK: NDArray[np.int64] = np.abs(shifts_GK[:, :, None] - shifts_GK[:, None, :]).max(axis=0)
    return deviation_KK


def _depth(costs_MK: NDArray[np.int64], solved: Transport) -> NDArray[np.int64]:
    """Regret of the few rows of every part that are nearest to every other, int64 [K, K]; -1 for a part without rows."""
    num_parts = costs_MK.shape[1]
    depth_KK = np.full((num_parts, num_parts), -1, np.int64)
    for part in range(num_parts):
        regrets_RK = costs_MK[solved.parts_M == part] + (solved.prices_K - solved.prices_K[part])
        if len(regrets_RK):
            regrets_RK -= regrets_RK[:, part, None]
            last = min(len(regrets_RK), _LEAST_DEPTH) - 1
            depth_KK[part] = np.partition(regrets_RK, last, axis=0)[last]
    return depth_KK


class _Excerpt:
    """The rows that a pass collected, and what is known of all others."""

    def __init__(self, scan: Scan, found: Found, capacity: int, seed: int) -> None:
        self.scan, self.found = scan, found
        self.ids_M16, self.costs_MK = _in_hash_order(found.ids_M16, found.costs_MK, seed)
        self.lacking_K = capacity - found.counts_K
        self.num_near = int(found.near_K.sum())
        self.is_complete = len(self.costs_MK) == self.num_near

    def solve(self, group: slice = slice(None)) -> Transport:
        """Solve these rows, or some of them as if they were all that was collected."""
        costs_MK = self.costs_MK[group]
        here_K = np.bincount((costs_MK + self.scan.prices_K).argmin(axis=1), minlength=len(self.lacking_K))
        # What all rows lack or have too much is known exactly; only who moves is left to the share that was drawn.
        room_K = here_K - (-self.lacking_K * len(costs_MK)) // max(1, self.num_near)
        return solve_transport(costs_MK, np.maximum(0, room_K), self.scan.prices_K)

    def _moved(self, solved: Transport) -> NDArray[np.int64]:
        """By how much part j became cheaper against part k, [k, j]."""
        shift_K = solved.prices_K - self.scan.prices_K
        moved_KK: NDArray[np.int64] = np.subtract.outer(shift_K, shift_K)
        return moved_KK

    def is_settled(self, solved: Transport) -> bool:
        """Whether the solution is optimal for all rows."""
        rests_K = self.found.counts_K > self.found.near_K
        fits = bool((self.lacking_K + self.found.near_K >= 0).all())
        return self.is_complete and fits and bool((self._moved(solved) <= self.scan.reach_KK)[rests_K].all())

    def next_reach(self, solved: Transport) -> NDArray[np.int64]:
        """Where the next pass has to look, int64 [K, K]."""
        reach_KK, moved_KK = self.scan.reach_KK, self._moved(solved)
        next_KK: NDArray[np.int64]
        if self.is_complete:
            next_KK = np.maximum(np.maximum(reach_KK, np.abs(moved_KK)), 1) * 4
            return next_KK.clip(max=_LONGEST_REACH)
        spread_KK = _deviation([self.solve(slice(group, None, _GROUPS)).prices_K for group in range(_GROUPS)], solved.prices_K)
        # Rows beyond the old reach were not collected, so of them this excerpt knows nothing.
        depth_KK = _depth(self.costs_MK, solved)
        depth_KK = np.where(depth_KK < 0, reach_KK, np.minimum(depth_KK, reach_KK))
        next_KK = np.maximum(np.maximum(spread_KK, depth_KK), 2 * (moved_KK - reach_KK))
        return next_KK.clip(max=_LONGEST_REACH)

    def expected_near(self, solved: Transport, reach_KK: NDArray[np.int64]) -> float:
        """About how many rows the next pass will find within reach."""
        if self.is_complete:
            return 4.0 * self.num_near
        return float(find_near(self.costs_MK, solved.prices_K, reach_KK)[1].sum()) * self.num_near / max(1, len(self.costs_MK))
