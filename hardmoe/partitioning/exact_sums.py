"""What one pass of k-means needs to know of the features, as sums that come out the same in whatever order they are added.

Integers add without rounding, so every feature is rounded once, by itself, to a fixed grid, and only integers are summed.
The grid of features is 2^-32 up to magnitude 2^20. It holds every float16 exactly (multiples of 2^-24 up to 65,504), and
every float32 of magnitude 2^-9 and above; smaller ones, such as coordinates of a unit vector, move by 2^-33 at most. The
grid of squared distances is 2^-40. A sum is kept as high + low * 2^-32 with 0 <= low < 2^32 and both int64, which
overflows past 2^43 rows of magnitude 2^20 and is unique: equal sums have equal bytes. The objective is a Python integer.

Rejected: float64 sums in a fixed order (the result still depends on where the shards are cut); `np.add.at` (some twenty
times slower); a float64 product with the one-hot assignment (exact too when the values are split, and as fast at 8
clusters, but its cost grows with their number). Sorting a block of rows and summing its runs costs 34 ms for
100,000 x 96 on one thread, whatever the number of clusters.

Shape letters: N examples, D feature dim, K clusters, M farthest points kept, B rows of a block.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hardmoe.data.ids import id_words
from hardmoe.errors import DataError
from hardmoe.neighbours.assignment import Assignment

FEATURE_LIMIT = 2.0**20
"""Features beyond this magnitude are refused."""

_FEATURE_BITS = 32
_DISTANCE_BITS = 40
_LOW_MASK = 2**_FEATURE_BITS - 1
_BLOCK_ELEMENTS = 2**18  # float64 values of a block: 2 MB
_BLOCK_ROWS = 2**10  # 2^10 rows of at most 2^52 grid steps stay below 2^63
_OBJECTIVE_WORDS = 6  # of 32 bits: 16,384 dims * (2^21)^2 * 2^40 steps * 2^60 rows fit


@dataclass(frozen=True, eq=False)
class ClusterSums:
    """Counts, feature sums and objective of a set of assigned rows; `+` joins two disjoint sets, in any order.

    Attributes:
        counts_K: rows of every cluster, int64 [K].
        high_KD: integer part of every feature sum, rounded down, int64 [K, D].
        low_KD: the rest, in units of 2^-32, int64 [K, D] in [0, 2^32).
        objective_units: sum of the squared distances, in units of 2^-40.
    """

    counts_K: NDArray[np.int64]
    high_KD: NDArray[np.int64]
    low_KD: NDArray[np.int64]
    objective_units: int

    @classmethod
    def zero(cls, num_clusters: int, dim: int) -> Self:
        """The sums of no rows at all."""
        shape = (num_clusters, dim)
        return cls(np.zeros(num_clusters, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64), 0)

    @classmethod
    def from_batch(cls, features_ND: NDArray[np.float32], assignment: Assignment, num_clusters: int) -> Self:
        """The sums of a batch.

        Args:
            features_ND: float32 [N, D], after the router's transform.
            assignment: of these rows.
            num_clusters: K.

        Raises:
            DataError: a feature is NaN or lies beyond `FEATURE_LIMIT`.
        """
        counts_K = np.bincount(assignment.primary_N, minlength=num_clusters).astype(np.int64)
        if len(counts_K) != num_clusters or len(features_ND) != len(assignment.primary_N):
            raise ValueError(f"{len(features_ND)} rows do not fit their assignment to {num_clusters} clusters")
        total = cls.zero(num_clusters, features_ND.shape[1])
        for clusters, run_sums in _run_sums(features_ND, assignment.primary_N):
            total.high_KD[clusters] += run_sums >> _FEATURE_BITS
            total.low_KD[clusters] += run_sums & _LOW_MASK
        _carry(total.high_KD, total.low_KD)
        return cls(counts_K, total.high_KD, total.low_KD, _objective_units(assignment.squared_distance_N))

    @classmethod
    def from_units(cls, counts_K: NDArray[np.int64], units_KD: NDArray[np.int64]) -> Self:
        """From sums in steps of the grid, int64 [K, D], without distances."""
        return cls(counts_K, units_KD >> _FEATURE_BITS, units_KD & _LOW_MASK, 0)

    def with_distances(self, squared_distances_N: NDArray[np.float64]) -> "ClusterSums":
        """The same sums, with these squared distances, float64 [N], in the objective besides."""
        units = self.objective_units + _objective_units(squared_distances_N)
        return ClusterSums(self.counts_K, self.high_KD, self.low_KD, units)

    def __add__(self, other: "ClusterSums") -> "ClusterSums":
        if self.high_KD.shape != other.high_KD.shape:
            raise ValueError(f"sums of shapes {self.high_KD.shape} and {other.high_KD.shape} cannot be added")
        high_KD, low_KD = self.high_KD + other.high_KD, self.low_KD + other.low_KD
        _carry(high_KD, low_KD)
        objective_units = self.objective_units + other.objective_units
        return ClusterSums(self.counts_K + other.counts_K, high_KD, low_KD, objective_units)

    @property
    def num_rows(self) -> int:
        """Rows in all clusters together."""
        return int(self.counts_K.sum())

    @property
    def objective(self) -> float:
        """Sum of squared distances, rounded once."""
        return self.objective_units / (1 << _DISTANCE_BITS)

    @property
    def totals_KD(self) -> NDArray[np.float64]:
        """Feature sums, float64 [K, D], each rounded once."""
        return self.high_KD + self.low_KD * 2.0**-_FEATURE_BITS

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as int64 arrays, for a file without pickle."""
        words = [(self.objective_units >> (32 * word)) & 0xFFFFFFFF for word in range(_OBJECTIVE_WORDS)]
        return {
            "counts": self.counts_K,
            "sums_high": self.high_KD,
            "sums_low": self.low_KD,
            "objective_words": np.array(words, np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The inverse of `to_arrays`; other keys are left alone."""
        objective_units = sum(int(word) << (32 * place) for place, word in enumerate(arrays["objective_words"]))
        return cls(arrays["counts"], arrays["sums_high"], arrays["sums_low"], objective_units)


@dataclass(frozen=True, eq=False)
class FarthestPoints:
    """The distinct points farthest from their centroids: where empty clusters start anew. `+` joins, in any order.

    Ordered by distance, largest first, then by id. Of several rows with the same feature the lowest id is kept, so two
    clusters never start at one point; points that lie on their centroid are left out.

    Attributes:
        distances_M: squared distances, float64 [M].
        ids_M16: example ids, uint8 [M, 16].
        features_MD: features after the transform, float32 [M, D].
        capacity: M is never larger.
    """

    distances_M: NDArray[np.float64]
    ids_M16: NDArray[np.uint8]
    features_MD: NDArray[np.float32]
    capacity: int

    @classmethod
    def none(cls, dim: int, capacity: int) -> Self:
        """No points yet."""
        return cls(np.empty(0), np.empty((0, 16), np.uint8), np.empty((0, dim), np.float32), capacity)

    @classmethod
    def from_batch(
        cls, features_ND: NDArray[np.float32], ids_N16: NDArray[np.uint8], assignment: Assignment, capacity: int
    ) -> Self:
        """The farthest points of a batch: float32 [N, D] features with the uint8 [N, 16] ids of the same rows."""
        distances_N = assignment.squared_distance_N
        wanted = capacity
        while True:
            rows = _at_least(distances_N, wanted)
            kept = _farthest_distinct(distances_N[rows], ids_N16[rows], features_ND[rows], capacity)
            if len(kept) == capacity or wanted >= len(distances_N):
                chosen = rows[kept]
                return cls(distances_N[chosen], ids_N16[chosen], features_ND[chosen], capacity)
            wanted *= 8  # copies crowded the distinct points out

    @classmethod
    def among(
        cls,
        features_ND: NDArray[np.float32],
        ids_N16: NDArray[np.uint8],
        distances_N: NDArray[np.float64],
        capacity: int,
    ) -> Self:
        """The farthest points of rows that are all looked at; `from_batch` looks at as few as it can."""
        kept = _farthest_distinct(distances_N, ids_N16, features_ND, capacity)
        return cls(distances_N[kept], ids_N16[kept], features_ND[kept], capacity)

    def __add__(self, other: "FarthestPoints") -> "FarthestPoints":
        if self.capacity != other.capacity:
            raise ValueError(f"farthest points of capacities {self.capacity} and {other.capacity} cannot be joined")
        distances_M = np.concatenate([self.distances_M, other.distances_M])
        ids_M16 = np.concatenate([self.ids_M16, other.ids_M16])
        features_MD = np.concatenate([self.features_MD, other.features_MD])
        kept = _farthest_distinct(distances_M, ids_M16, features_MD, self.capacity)
        return FarthestPoints(distances_M[kept], ids_M16[kept], features_MD[kept], self.capacity)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as arrays, for a file without pickle."""
        return {
            "farthest_distances": self.distances_M,
            "farthest_ids": self.ids_M16,
            "farthest_features": self.features_MD,
            "farthest_capacity": np.array([self.capacity], np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The inverse of `to_arrays`; other keys are left alone."""
        capacity = int(arrays["farthest_capacity"][0])
        return cls(arrays["farthest_distances"], arrays["farthest_ids"], arrays["farthest_features"], capacity)


def sort_order_of_ids(ids_N16: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Rows in ascending order of their 16 bytes, intp [N]."""
    high_N, low_N = id_words(ids_N16)
    return np.lexsort((low_N, high_N))


def _run_sums(
    features_ND: NDArray[np.float32], primary_N: NDArray[np.int32]
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
    """Per block of rows, the clusters in it and the sums of their grid steps, int64 [clusters, D]."""
    block = max(1, min(_BLOCK_ROWS, _BLOCK_ELEMENTS // features_ND.shape[1]))
    for start in range(0, len(features_ND), block):
        primary_B = primary_N[start : start + block]
        order_B = np.argsort(primary_B, kind="stable")
        steps_BD = np.multiply(features_ND[start : start + block][order_B], 2.0**_FEATURE_BITS, dtype=np.float64)
        magnitude = np.maximum(steps_BD.max(), -steps_BD.min()) * 2.0**-_FEATURE_BITS
        if not magnitude <= FEATURE_LIMIT:
            raise DataError(
                f"a feature of magnitude {magnitude:g} is beyond {FEATURE_LIMIT:g}, the largest that can be summed exactly: "
                "set partition.transform to l2, or take a trunk whose features are normalised"
            )
        sorted_B = primary_B[order_B]
        starts = np.flatnonzero(np.diff(sorted_B, prepend=-1))
        yield sorted_B[starts], np.add.reduceat(np.rint(steps_BD, out=steps_BD).astype(np.int64), starts, axis=0)


def _carry(high_KD: NDArray[np.int64], low_KD: NDArray[np.int64]) -> None:
    """Bring `low` back to [0, 2^32), in place."""
    high_KD += low_KD >> _FEATURE_BITS
    low_KD &= _LOW_MASK


def _objective_units(squared_distances_N: NDArray[np.float64]) -> int:
    """Sum of the distances, each rounded to a multiple of 2^-40, in such units."""
    units = 0
    for start in range(0, len(squared_distances_N), 2**20):
        distances = squared_distances_N[start : start + 2**20]
        whole = np.floor(distances)
        top = np.floor(whole * 2.0**-32)
        parts = ((top, 32 + _DISTANCE_BITS), (whole - top * 2.0**32, _DISTANCE_BITS))
        units += sum(int(part.astype(np.int64).sum()) << shift for part, shift in parts)
        units += int(np.rint((distances - whole) * 2.0**_DISTANCE_BITS).astype(np.int64).sum())
    return units


def _at_least(distances_N: NDArray[np.float64], wanted: int) -> NDArray[np.intp]:
    """All rows as far as the `wanted`-th farthest, so that ties at the edge are never cut by position."""
    if wanted >= len(distances_N):
        return np.arange(len(distances_N))
    edge = np.partition(distances_N, -wanted)[-wanted]
    return np.flatnonzero(distances_N >= edge)


def _farthest_distinct(
    distances_M: NDArray[np.float64], ids_M16: NDArray[np.uint8], features_MD: NDArray[np.float32], capacity: int
) -> list[int]:
    """Rows to keep, farthest first; see `FarthestPoints`."""
    kept: list[int] = []
    seen: set[bytes] = set()
    high_M, low_M = id_words(ids_M16)
    for row in np.lexsort((low_M, high_M, -distances_M)):
        feature = (features_MD[row] + 0.0).tobytes()  # + 0.0 makes -0.0 and 0.0 one
        if distances_M[row] > 0.0 and feature not in seen:
            seen.add(feature)
            kept.append(int(row))
        if len(kept) == capacity:
            break
    return kept
