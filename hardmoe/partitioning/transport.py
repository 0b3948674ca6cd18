"""Rows to parts of limited room at the least cost: the transportation problem with few destinations, solved exactly.

    minimise sum_i costs[i, k_i]   so that part k gets at most room[k] rows

Costs are integers, so there is no tolerance anywhere. Every part k has a price l_k and every row is in a part where
costs + price is least: an optimum of the problem in which the parts' sizes are whatever they happen to be. Then rows are moved
out of parts that are too full, one shortest path at a time, over a graph whose nodes are the *parts*: going from k to j costs
the least regret (costs[i, j] + l_j) - (costs[i, k] + l_k) among the rows i now in k. Prices follow the distances (Johnson's
potentials), so no regret ever turns negative, and when no part is too full the assignment is optimal and the prices prove it
(successive shortest paths; Ahuja, Magnanti, Orlin, Network Flows, section 9.7). Unused room is one more kind of row: it costs
nothing anywhere, so it lies where the price is zero, and a part with a price is full.

The work is proportional to the number of rows that start in the wrong part, not to the number of rows: good starting prices
are what make it fast. Only the few cheapest rows of a pair of parts are ever sorted. Rejected: a general assignment solver
(N^3, and every part repeated by its room), auction and Sinkhorn (near-optimal only, slow to tell near-ties apart, and float
sums that depend on their order), and raising prices one part at a time (goes round in circles where many rows tie).

Shape letters: M rows, K parts, R rows of one part, T rows kept sorted for a pair of parts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COST_BITS = 55
"""Costs must be below 2^55 in magnitude, so that no sum below overflows."""

_NO_EDGE = 2**60  # longer than any path: regrets are below 2^56, and prices differ by no more than the largest of them
_UNREACHED = 2**62
_SORTED = 64  # of a pair of parts so many cheapest rows are sorted at a time
_SPARE = -1


@dataclass(frozen=True, eq=False)
class Transport:
    """An optimal assignment and the prices that prove it.

    Attributes:
        prices_K: int64 [K], the least is 0; every row is where costs + prices is least, and a part with a price is full.
        parts_M: the part of every row, int32 [M].
    """

    prices_K: NDArray[np.int64]
    parts_M: NDArray[np.int32]


def solve_transport(
    costs_MK: NDArray[np.int64], room_K: NDArray[np.int64], start_K: NDArray[np.int64] | None = None
) -> Transport:
    """Solve the problem above; equal regrets are resolved by the order of the rows and of the parts.

    Args:
        costs_MK: int64 [M, K] below 2^COST_BITS in magnitude.
        room_K: how many rows every part may get, int64 [K], together M at least.
        start_K: prices to start from, int64 [K]; they decide how long it takes, and which optimum where there are several.
    """
    if room_K.min() < 0 or room_K.sum() < len(costs_MK):
        raise ValueError(f"{len(costs_MK)} rows do not fit into parts with room for {room_K.tolist()}")
    start_K = np.zeros(len(room_K), np.int64) if start_K is None else start_K - start_K.min()
    flow = _Flow(costs_MK, room_K, start_K)
    for part in range(len(room_K)):
        while flow.excess_K[part] > 0:
            flow.relieve(part)
    return Transport(flow.prices_K - flow.prices_K.min(), flow.parts_M)


class _Flow:
    """The rows where they are now; `excess_K` says how many more than fit."""

    def __init__(self, costs_MK: NDArray[np.int64], room_K: NDArray[np.int64], prices_K: NDArray[np.int64]) -> None:
        num_parts = len(room_K)
        self.costs_MK = costs_MK
        self.prices_K = prices_K.copy()
        self.parts_M = (costs_MK + prices_K).argmin(axis=1).astype(np.int32)
        self.excess_K = np.bincount(self.parts_M, minlength=num_parts) - room_K
        self.spare_K = self._lay_out_spare(int(room_K.sum()) - len(costs_MK))
        self.excess_K += self.spare_K
        # Of every pair of parts the row that moves at the least cost, and that cost without prices; once a part was looked at.
        self._regrets_KK = np.full((num_parts, num_parts), _NO_EDGE, np.int64)
        self._movers_KK = np.full((num_parts, num_parts), _SPARE, np.int64)
        self._is_known_K = np.zeros(num_parts, bool)
        self._queues: dict[tuple[int, int], _Queue] = {}
        self._arrivals: list[list[int]] = [[] for _ in range(num_parts)]

    def _lay_out_spare(self, spare: int) -> NDArray[np.int64]:
        """Unused room where the price is zero, as far as there is room; the rest in the first such part."""
        spare_K = np.zeros_like(self.excess_K)
        free_K = np.flatnonzero(self.prices_K == 0)
        for part in free_K:
            spare_K[part] = min(spare, max(0, -int(self.excess_K[part])))
            spare -= int(spare_K[part])
        spare_K[free_K[0]] += spare
        return spare_K

    def relieve(self, source: int) -> None:
        """Move one row (or unused room, as much as goes the same way) from a part to the nearest one that has room."""
        distance_K, origin_K, target, settled = self._shortest_paths(source)
        self.prices_K[settled] += distance_K[target] - distance_K[settled]
        path = [target]
        while path[-1] != source:
            path.append(int(origin_K[path[-1]]))
        steps = list(zip(path[:0:-1], path[-2::-1], strict=True))
        # Where unused room moves for nothing, no row needs to.
        movers = [_SPARE if self._moves_spare(a, b) else int(self._movers_KK[a, b]) for a, b in steps]
        amount = 1
        if all(mover == _SPARE for mover in movers):
            limits = (self.excess_K[source], -self.excess_K[target], *(self.spare_K[a] for a, _ in steps))
            amount = int(min(limits))
        self.excess_K[source] -= amount
        self.excess_K[target] += amount
        for (a, b), mover in zip(steps, movers, strict=True):
            if mover == _SPARE:
                self.spare_K[a] -= amount
                self.spare_K[b] += amount
            else:
                self._move(mover, a, b)

    def _moves_spare(self, a: int, b: int) -> bool:
        return bool(self.spare_K[a] > 0 and self._regrets_KK[a, b] >= 0)

    def _shortest_paths(self, source: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int, list[int]]:
        """Dijkstra until the first part with room: distances, where each was reached from, that part, and those before it."""
        distance_K = np.full(len(self.prices_K), _UNREACHED, np.int64)
        distance_K[source] = 0
        waiting_K, origin_K = distance_K.copy(), np.full(len(self.prices_K), -1, np.int64)
        settled: list[int] = []
        while True:
            part = int(waiting_K.argmin())
            assert distance_K[part] < _NO_EDGE // 2, "a part that is too full must have something to give"
            if self.excess_K[part] < 0:
                return distance_K, origin_K, part, settled
            settled.append(part)
            waiting_K[part] = _UNREACHED
            through_K = self._regrets_from(part) + (self.prices_K + (distance_K[part] - self.prices_K[part]))
            nearer_K = through_K < distance_K
            distance_K[nearer_K] = waiting_K[nearer_K] = through_K[nearer_K]
            origin_K[nearer_K] = part

    def _regrets_from(self, part: int) -> NDArray[np.int64]:
        """Least cost, without prices, of a move from this part to every other one, int64 [K]."""
        if not self._is_known_K[part]:
            self._is_known_K[part] = True
            rows_R = np.flatnonzero(self.parts_M == part)
            if len(rows_R):
                regrets_RK = self.costs_MK[rows_R] - self.costs_MK[rows_R, part, None]
                first_K = regrets_RK.argmin(axis=0)
                self._regrets_KK[part] = regrets_RK[first_K, np.arange(len(first_K))]
                self._movers_KK[part] = rows_R[first_K]
            self._regrets_KK[part, part], self._movers_KK[part, part] = _NO_EDGE, _SPARE
        regrets_K: NDArray[np.int64] = self._regrets_KK[part]
        if self.spare_K[part] > 0:
            regrets_K = np.minimum(regrets_K, 0)
            regrets_K[part] = _NO_EDGE
        return regrets_K

    def _move(self, row: int, a: int, b: int) -> None:
        self.parts_M[row] = b
        for part in np.flatnonzero(self._movers_KK[a] == row).tolist():
            self._find_next(a, part)
        self._arrivals[b].append(row)
        if self._is_known_K[b]:
            regrets_K = self.costs_MK[row] - self.costs_MK[row, b]
            cheaper_K = regrets_K < self._regrets_KK[b]
            cheaper_K[b] = False
            self._regrets_KK[b, cheaper_K] = regrets_K[cheaper_K]
            self._movers_KK[b, cheaper_K] = row

    def _find_next(self, a: int, b: int) -> None:
        """Find anew which row moves from a to b at the least cost."""
        arrivals, queue = self._arrivals[a], self._queues.get((a, b))
        if queue is None or len(arrivals) - queue.arrivals > _SORTED or not queue.advance(self.parts_M, a):
            rows_R = np.flatnonzero(self.parts_M == a)
            queue = self._queues[a, b] = _Queue.of(self._regrets(rows_R, a, b), rows_R, len(arrivals))
        candidates = [row for row in arrivals[queue.arrivals :] if self.parts_M[row] == a]
        if queue.at < len(queue.rows_T):
            candidates.append(int(queue.rows_T[queue.at]))
        if not candidates:
            self._regrets_KK[a, b], self._movers_KK[a, b] = _NO_EDGE, _SPARE
            return
        rows_R = np.sort(candidates)
        regrets_R = self._regrets(rows_R, a, b)
        best = int(regrets_R.argmin())
        self._regrets_KK[a, b], self._movers_KK[a, b] = regrets_R[best], rows_R[best]

    def _regrets(self, rows_R: NDArray[np.intp], a: int, b: int) -> NDArray[np.int64]:
        regrets_R: NDArray[np.int64] = self.costs_MK[rows_R, b] - self.costs_MK[rows_R, a]
        return regrets_R


@dataclass
class _Queue:
    """The rows of one part that move to another one at the least cost, cheapest first.

    Rows that have left are passed over; those that came later are not in it (`arrivals` says from which one on).
    """

    rows_T: NDArray[np.intp]
    holds_all: bool
    arrivals: int
    at: int = 0

    @classmethod
    def of(cls, regrets_R: NDArray[np.int64], rows_R: NDArray[np.intp], arrivals: int) -> "_Queue":
        """The cheapest of these rows, ties in their order."""
        holds_all = len(rows_R) <= _SORTED
        if not holds_all:
            # All that tie at the edge, so that nothing depends on how a partial sort treats equal values.
            chosen_R = regrets_R <= np.partition(regrets_R, _SORTED - 1)[_SORTED - 1]
            regrets_R, rows_R = regrets_R[chosen_R], rows_R[chosen_R]
        return cls(rows_R[np.argsort(regrets_R, kind="stable")], holds_all, arrivals)

    def advance(self, parts_M: NDArray[np.int32], part: int) -> bool:
        """Pass over the rows that have left; False if the queue ended and there may be more."""
        while self.at < len(self.rows_T) and parts_M[self.rows_T[self.at]] != part:
            self.at += 1
        return self.at < len(self.rows_T) or self.holds_all
