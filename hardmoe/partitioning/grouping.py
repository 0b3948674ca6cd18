"""Many fine clusters become few parts: those grow together that share the longest border for their size.

A border is where rows lie between two clusters: `Borders` counts, for every pair, the rows that have these two as their nearest
and second nearest. Of all pairs of groups that one is merged which has the most such rows for every pair of its members,
shared / (n_a n_b), until K groups are left; this is average linkage over the rows, so a large group must share more. Pairs that
tie, above all those that share no border, go by Ward's cost n_a n_b / (n_a + n_b) |c_a - c_b|^2 (Ward, JASA 1963), then to the
lower pair. Counts are integers, sums and means of the grouping float64 in one stated order: nothing depends on the sharding.

Rejected: Ward's cost alone. It is the objective of k-means, so its groups are what k-means with K clusters finds. Adjusted Rand
index of k-means, Ward and shared borders, 16 fine clusters to a group: two moons 0.25, 0.26, 1.00; two rings 0.00, 0.00, 1.00;
three strips 0.00, 0.04, 0.94. On the icons of `demo.yaml` (15,093 images, 128 fine clusters in 8 parts) 28 % of the images have
their second nearest fine cluster in another part, with Ward 34 %, and the parts say as much about the hashtags; the price is less
even parts, the largest 2.8 times the mean, with Ward 1.9. Rejected too: shared / min(n_a, n_b), by which one group swallows all
others where there is no structure (noise in 64 dimensions: 3,788 of 4,000 rows in one of 8), and a limit to the size of a group:
`balanced` has one that is optimal, while a greedy merge that may not exceed a size gets stuck, and what it then does no longer
goes by the borders.

Shape letters: N examples, D feature dim, F fine clusters, P pairs of fine clusters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hardmoe.neighbours.assignment import Assignment, sum_of_squares


@dataclass(frozen=True, eq=False)
class Borders:
    """How many rows every cluster has, and how many lie between every two; `+` joins disjoint sets of rows, in any order.

    Attributes:
        counts_F: rows nearest to each cluster, int64 [F].
        pairs_P: pairs a < b of clusters with rows between them, as a F + b, int64 [P], ascending.
        shared_P: rows whose nearest two they are, int64 [P].
    """

    counts_F: NDArray[np.int64]
    pairs_P: NDArray[np.int64]
    shared_P: NDArray[np.int64]

    @classmethod
    def none(cls, num_clusters: int) -> Self:
        """Of no rows."""
        return cls(np.zeros(num_clusters, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))

    @classmethod
    def of(cls, assignment: Assignment, num_clusters: int) -> Self:
        """Of rows with their nearest two clusters."""
        counts_F = np.bincount(assignment.primary_N, minlength=num_clusters).astype(np.int64)
        if num_clusters == 1:
            return cls(counts_F, np.zeros(0, np.int64), np.zeros(0, np.int64))
        lower_N = np.minimum(assignment.primary_N, assignment.second_N).astype(np.int64)
        higher_N = np.maximum(assignment.primary_N, assignment.second_N)
        pairs_P, shared_P = np.unique(lower_N * num_clusters + higher_N, return_counts=True)
        return cls(counts_F, pairs_P, shared_P.astype(np.int64))

    def __add__(self, other: "Borders") -> "Borders":
        if len(self.counts_F) != len(other.counts_F):
            raise ValueError(f"borders of {len(self.counts_F)} and {len(other.counts_F)} clusters cannot be added")
        pairs_P, where = np.unique(np.concatenate([self.pairs_P, other.pairs_P]), return_inverse=True)
        shared_P = np.zeros(len(pairs_P), np.int64)
        np.add.at(shared_P, where, np.concatenate([self.shared_P, other.shared_P]))
        return Borders(self.counts_F + other.counts_F, pairs_P, shared_P)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as arrays, for a file without pickle."""
        return {"counts": self.counts_F, "pairs": self.pairs_P, "shared": self.shared_P}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The inverse of `to_arrays`."""
        return cls(arrays["counts"], arrays["pairs"], arrays["shared"])


def group_clusters(centroids_FD: NDArray[np.float32], borders: Borders, num_groups: int) -> NDArray[np.int32]:
    """Group fine clusters; see the module.

    Args:
        centroids_FD: float32 [F, D].
        borders: of all rows.
        num_groups: K, 1 <= K <= F.

    Returns:
        The group of every cluster, int32 [F]; groups are numbered in the order of their lowest clusters.
    """
    if not 1 <= num_groups <= len(centroids_FD) == len(borders.counts_F):
        raise ValueError(f"{len(centroids_FD)} centroids and {len(borders.counts_F)} counts cannot make {num_groups} groups")
    merging = _Merging(centroids_FD, borders)
    lowest_F = np.arange(len(centroids_FD))
    for _ in range(len(centroids_FD) - num_groups):
        kept, gone = merging.merge_best()
        lowest_F[lowest_F == gone] = kept
    return np.unique(lowest_F, return_inverse=True)[1].reshape(-1).astype(np.int32)


class _Merging:
    """The groups that are left, each under the number of its lowest cluster, and the best partner of each.

    Every group's best partner is kept, so that a merge looks again only at the groups that had one of the two: O(F) each, and
    O(F D) where groups share no border. The pair that is best of all, the lowest among equals, is then the best partner of its
    lower group.
    """

    def __init__(self, centroids_FD: NDArray[np.float32], borders: Borders) -> None:
        num_clusters = len(centroids_FD)
        self._centres_FD = centroids_FD.astype(np.float64)
        # An empty cluster stands where one row lay that was farthest from all others: weighed as that row.
        self._weights_F = np.maximum(borders.counts_F, 1).astype(np.float64)
        self._shared_FF = np.zeros((num_clusters, num_clusters))
        lower_P, higher_P = np.divmod(borders.pairs_P, num_clusters)
        self._shared_FF[lower_P, higher_P] = self._shared_FF[higher_P, lower_P] = borders.shared_P
        self._is_left_F = np.ones(num_clusters, bool)
        self._partner_F = np.full(num_clusters, -1)
        self._affinity_F = np.full(num_clusters, -np.inf)
        self._cost_F = np.full(num_clusters, np.inf)
        for group in range(num_clusters if num_clusters > 1 else 0):
            self._find_partner(group)

    def merge_best(self) -> tuple[int, int]:
        """Merge the best pair; returns the number that stays and the one that goes."""
        best = np.flatnonzero(self._affinity_F == self._affinity_F.max())
        kept = int(best[self._cost_F[best].argmin()])
        gone = int(self._partner_F[kept])
        weight = self._weights_F[kept] + self._weights_F[gone]
        weighed_D = self._weights_F[kept] * self._centres_FD[kept] + self._weights_F[gone] * self._centres_FD[gone]
        self._centres_FD[kept], self._weights_F[kept] = weighed_D / weight, weight
        self._shared_FF[kept] += self._shared_FF[gone]
        self._shared_FF[:, kept] = self._shared_FF[kept]
        self._shared_FF[kept, kept] = 0.0
        self._is_left_F[gone], self._affinity_F[gone] = False, -np.inf
        others = np.flatnonzero(self._is_left_F)
        others = others[others != kept]
        if len(others):
            is_bereft = (self._partner_F[others] == kept) | (self._partner_F[others] == gone)
            for group in [kept, *others[is_bereft].tolist()]:
                self._find_partner(group)
            self._offer(kept, others[~is_bereft])
        return kept, gone

    def _find_partner(self, group: int) -> None:
        """Look for the best partner of a group among all."""
        others = np.flatnonzero(self._is_left_F)
        others = others[others != group]
        affinities = self._affinities(group, others)
        best = others[affinities == affinities.max()]
        costs = self._costs(group, best)
        chosen = int(costs.argmin())
        self._partner_F[group], self._affinity_F[group], self._cost_F[group] = best[chosen], affinities.max(), costs[chosen]

    def _offer(self, group: int, others: NDArray[np.intp]) -> None:
        """Make a group, which has changed, the partner of those to which it is a better one than theirs."""
        affinities = self._affinities(group, others)
        may = affinities >= self._affinity_F[others]
        others, affinities = others[may], affinities[may]
        costs = self._costs(group, others)
        is_closer = (costs < self._cost_F[others]) | ((costs == self._cost_F[others]) & (group < self._partner_F[others]))
        takes = (affinities > self._affinity_F[others]) | is_closer
        chosen = others[takes]
        self._partner_F[chosen], self._affinity_F[chosen], self._cost_F[chosen] = group, affinities[takes], costs[takes]

    def _affinities(self, group: int, others: NDArray[np.intp]) -> NDArray[np.float64]:
        """Rows on the common border for every pair of members."""
        affinities: NDArray[np.float64] = self._shared_FF[group, others] / (self._weights_F[group] * self._weights_F[others])
        return affinities

    def _costs(self, group: int, others: NDArray[np.intp]) -> NDArray[np.float64]:
        """By how much the sum of squared distances would grow."""
        weights: NDArray[np.float64] = (
            self._weights_F[group] * self._weights_F[others] / (self._weights_F[group] + self._weights_F[others])
        )
        return weights * sum_of_squares(self._centres_FD[others] - self._centres_FD[group])
