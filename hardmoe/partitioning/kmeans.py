"""Lloyd's k-means whose result does not depend on how the data are sharded, batched or ordered.

    seed_centroids(sample)                    once, on a sample drawn by hash
    scan_batch(...) + scan_batch(...) + ...   per pass: every batch gives a `PassSums`, and they add up exactly
    update(pass_sums, centroids)              means in float64 from exact sums; empty clusters start anew
    refine(centroids)                         the loop, a generator: it asks for passes, whoever drives it scans the rows
    fit(features)                             all of it for features in memory

Three things make it order-free: the assignment is exact (`neighbours.assignment`), the sums are integers (`exact_sums`),
and chance is a hash of the seed, the step and the example id. Centroids keep the order in which they were seeded: number
k is the k-th point drawn, moved by the passes; sorting them afterwards by size or coordinate would let a small change of
the data renumber every expert. With unit features the centroids are plain means, not scaled back to the sphere: the router
measures Euclidean distance, and Lloyd's monotone descent holds for means only.

Rejected: `faiss.Kmeans` and `sklearn.cluster.KMeans` (float32 counts; everything in memory; the result depends on the
order of the rows), and mini-batch k-means (the result depends on the order of the batches by construction).

Shape letters: N examples, S examples of the sample, D feature dim, K clusters, T trial points.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hardmoe.errors import DataError
from hardmoe.hashing import derive_seed, hash_ids
from hardmoe.neighbours.assignment import assign
from hardmoe.neighbours.engine import Engine, choose_engine
from hardmoe.partitioning.exact_sums import ClusterSums, FarthestPoints, sort_order_of_ids

_MOST_RESEEDS = 64  # farthest points a batch reports: what a pass can repair; any further empty cluster waits for the next
_BLOCK_ELEMENTS = 2**22  # float64 values of a block of the sample: 32 MB


@dataclass(frozen=True, eq=False)
class PassSums:
    """What a pass over some rows found; `+` joins disjoint sets of rows, in any order.

    Attributes:
        sums: counts, feature sums and objective.
        farthest: where empty clusters may start anew.
    """

    sums: ClusterSums
    farthest: FarthestPoints

    @classmethod
    def zero(cls, num_clusters: int, dim: int) -> Self:
        """What a pass over no rows finds."""
        return cls(ClusterSums.zero(num_clusters, dim), FarthestPoints.none(dim, min(num_clusters, _MOST_RESEEDS)))

    def __add__(self, other: "PassSums") -> "PassSums":
        return PassSums(self.sums + other.sums, self.farthest + other.farthest)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as arrays, for a file without pickle."""
        return {**self.sums.to_arrays(), **self.farthest.to_arrays()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The inverse of `to_arrays`."""
        return cls(ClusterSums.from_arrays(arrays), FarthestPoints.from_arrays(arrays))


@dataclass(frozen=True)
class Updated:
    """The centroids after a pass.

    Attributes:
        centroids_KD: float32 [K, D].
        empty: clusters that had no rows.
        reseeded: those of them that now start at a farthest point; the others keep their centroid until the next pass.
    """

    centroids_KD: NDArray[np.float32]
    empty: list[int]
    reseeded: list[int]


@dataclass(frozen=True)
class KMeansFit:
    """The outcome of k-means.

    Attributes:
        centroids_KD: float32 [K, D], in the order of seeding.
        objective_per_pass: sum of squared distances to the centroids each pass started from.
        reseeded: (pass, cluster) of every empty cluster that was started anew, passes counted from 0.
        converged: False if the passes ran out first.
    """

    centroids_KD: NDArray[np.float32]
    objective_per_pass: list[float]
    reseeded: list[tuple[int, int]]
    converged: bool


def scan_batch(
    features_ND: NDArray[np.float32], ids_N16: NDArray[np.uint8], centroids_KD: NDArray[np.float32], engine: Engine
) -> PassSums:
    """One batch's share of a pass.

    Args:
        features_ND: float32 [N, D], after the router's transform.
        ids_N16: example ids of these rows, uint8 [N, 16].
        centroids_KD: float32 [K, D].
        engine: does the fast part of the search.

    Raises:
        DataError: a feature is NaN, infinite or too large to be summed exactly.
    """
    num_clusters = len(centroids_KD)
    assignment = assign(features_ND, centroids_KD, engine)
    sums = ClusterSums.from_batch(features_ND, assignment, num_clusters)
    return PassSums(sums, FarthestPoints.from_batch(features_ND, ids_N16, assignment, min(num_clusters, _MOST_RESEEDS)))


def update(found: PassSums, centroids_KD: NDArray[np.float32]) -> Updated:
    """Move every centroid to the mean of its rows, and empty clusters to the rows farthest from their centroids.

    The mean is the exact sum rounded to float64, divided, and rounded to float32. The k-th empty cluster, by number, takes
    the k-th farthest distinct point, by (distance, id).
    """
    counts_K = found.sums.counts_K
    occupied_K = counts_K > 0
    means_KD = found.sums.totals_KD[occupied_K] / counts_K[occupied_K, None]
    moved_KD = centroids_KD.copy()
    moved_KD[occupied_K] = means_KD.astype(np.float32)
    empty = np.flatnonzero(~occupied_K)
    reseeded = empty[: len(found.farthest.features_MD)]
    moved_KD[reseeded] = found.farthest.features_MD[: len(reseeded)]
    return Updated(moved_KD, empty.tolist(), reseeded.tolist())


def has_converged(previous_objective: float | None, objective: float, tolerance: float) -> bool:
    """Whether a pass lowered the objective by no more than `tolerance` times it; False for the first pass (None)."""
    return previous_objective is not None and previous_objective - objective <= tolerance * previous_objective


def refine(
    centroids_KD: NDArray[np.float32], max_passes: int, tolerance: float
) -> Generator[tuple[int, NDArray[np.float32]], PassSums, KMeansFit]:
    """Lloyd's passes until they converge, as a generator, so that a pass may be a loop here or a phase of a cluster.

    It yields a pass's number and its centroids, float32 [K, D], expects to be sent the sums over all rows, and returns the
    fit. Sending the stored sums of passes that finished brings a killed fit back to where it was, bit for bit.

    Args:
        centroids_KD: where to start, float32 [K, D].
        max_passes: at most this many passes.
        tolerance: see `has_converged`. A pass that started a cluster anew never counts as converged.
    """
    objectives: list[float] = []
    reseeded: list[tuple[int, int]] = []
    for number in range(max_passes):
        found = yield number, centroids_KD
        updated = update(found, centroids_KD)
        centroids_KD = updated.centroids_KD
        previous = objectives[-1] if objectives else None
        objectives.append(found.sums.objective)
        reseeded += [(number, cluster) for cluster in updated.reseeded]
        if has_converged(previous, objectives[-1], tolerance) and not updated.reseeded:
            return KMeansFit(centroids_KD, objectives, reseeded, converged=True)
    return KMeansFit(centroids_KD, objectives, reseeded, converged=False)


def refine_with(
    scan: Callable[[NDArray[np.float32]], PassSums], centroids_KD: NDArray[np.float32], max_passes: int, tolerance: float
) -> KMeansFit:
    """Drive `refine` with a function that scans all rows against the centroids it is given."""
    refining = refine(centroids_KD, max_passes, tolerance)
    try:
        _, centroids_KD = next(refining)
        while True:
            _, centroids_KD = refining.send(scan(centroids_KD))
    except StopIteration as stop:
        found: KMeansFit = stop.value
        return found


def fit(
    features_ND: NDArray[np.float32],
    ids_N16: NDArray[np.uint8],
    num_clusters: int,
    seed: int,
    max_passes: int = 50,
    tolerance: float = 1e-4,
    batch_size: int = 65_536,
) -> KMeansFit:
    """K-means of features in memory, seeded from all of them.

    Args:
        features_ND: float32 [N, D].
        ids_N16: distinct example ids, uint8 [N, 16].
        num_clusters: K.
        seed: the recipe's seed.
        max_passes: at most this many passes.
        tolerance: see `has_converged`.
        batch_size: rows scanned at a time; changes nothing but the memory used.

    Raises:
        DataError: fewer distinct features than clusters, or a feature that is not finite or too large.
    """
    engine = choose_engine()

    def scan(centroids_KD: NDArray[np.float32]) -> PassSums:
        total = PassSums.zero(*centroids_KD.shape)
        for start in range(0, len(features_ND), batch_size):
            rows = slice(start, start + batch_size)
            total += scan_batch(features_ND[rows], ids_N16[rows], centroids_KD, engine)
        return total

    return refine_with(scan, seed_centroids(features_ND, ids_N16, num_clusters, seed), max_passes, tolerance)


def seed_centroids(
    sample_SD: NDArray[np.float32], ids_S16: NDArray[np.uint8], num_clusters: int, seed: int
) -> NDArray[np.float32]:
    """Choose the first centroids by greedy k-means++ (Arthur and Vassilvitskii, SODA 2007).

    Every next centroid is drawn with probability proportional to the squared distance to the nearest chosen one; of
    2 + ln K such draws the one that lowers the sum of these distances most is taken.

    Args:
        sample_SD: float32 [S, D], finite, in any order: rows are sorted by id first.
        ids_S16: distinct example ids, uint8 [S, 16].
        num_clusters: K.
        seed: the recipe's seed.

    Returns:
        K distinct rows of the sample, float32 [K, D], in the order drawn.

    Raises:
        DataError: the sample holds fewer distinct features than clusters, or NaN or infinity.
    """
    if sample_SD.dtype != np.float32 or len(ids_S16) != len(sample_SD):
        raise ValueError(f"a sample needs float32 features and one id per row, not {sample_SD.dtype}, {len(ids_S16)} ids")
    order_S = sort_order_of_ids(ids_S16)
    sample_SD, ids_S16 = sample_SD[order_S], ids_S16[order_S]
    if (ids_S16[1:] == ids_S16[:-1]).all(axis=1).any():
        raise ValueError("the ids of a sample must be distinct")
    if not np.isfinite(sample_SD).all():
        raise DataError("the sample of features holds NaN or infinity: the trunk diverged or overflows float16")
    if len(sample_SD) < num_clusters:
        raise _too_few(len(sample_SD), num_clusters)
    grid = _SampleGrid(sample_SD)
    chosen = [int(hash_ids(ids_S16, seed, "kmeans++").argmin())]
    nearest_S = grid.squared_distances(chosen)[0]
    num_trials = 2 + int(np.log(num_clusters))
    while len(chosen) < num_clusters:
        cumulative_S = np.cumsum(nearest_S)
        if cumulative_S[-1] == 0.0:
            chosen += _distinct_rest(sample_SD, chosen, num_clusters)
            break
        draws_T = [derive_seed(seed, "kmeans++", len(chosen), trial) * 2.0**-63 for trial in range(num_trials)]
        trials_T = np.searchsorted(cumulative_S, np.array(draws_T) * cumulative_S[-1], side="right")
        trials_T = np.minimum(trials_T, np.flatnonzero(nearest_S)[-1])  # a draw may round up to the very end
        nearest_TS = np.minimum(grid.squared_distances(trials_T), nearest_S)
        best = int(nearest_TS.sum(axis=1).argmin())
        chosen.append(int(trials_T[best]))
        nearest_S = nearest_TS[best]
    return sample_SD[chosen]


class _SampleGrid:
    """The sample rounded to integers so small that float64 matrix products of them are exact, in whatever order BLAS adds.

    With |q| <= 2^b a squared distance of D terms is at most 2^(2b + 2) D, which for b = (51 - log2 D) / 2 stays within
    2^53; b is 20 for D = 2,048. That is plenty for choosing seeds, which are then the unrounded rows.
    """

    def __init__(self, sample_SD: NDArray[np.float32]) -> None:
        dim = sample_SD.shape[1]
        lowest_D, highest_D = sample_SD.min(axis=0).astype(np.float64), sample_SD.max(axis=0).astype(np.float64)
        middle_D = (lowest_D + highest_D) / 2.0  # a common offset would waste the bits
        exponent = int(np.frexp(np.maximum(highest_D - middle_D, middle_D - lowest_D).max())[1])
        bits = min(24, (51 - (dim - 1).bit_length()) // 2)  # 24: the integers are kept as float32
        self._grid_SD = np.empty_like(sample_SD)
        self._norms_S = np.empty(len(sample_SD), np.float64)
        self._block = max(1, _BLOCK_ELEMENTS // dim)
        for start in range(0, len(sample_SD), self._block):
            rows = slice(start, start + self._block)
            steps = np.rint(np.ldexp(sample_SD[rows] - middle_D, bits - exponent))
            self._grid_SD[rows] = steps
            self._norms_S[rows] = np.square(steps).sum(axis=1)

    def squared_distances(self, points_T: NDArray[np.intp] | list[int]) -> NDArray[np.float64]:
        """Exact squared distances from some rows to all rows, in grid steps, float64 [T, S]."""
        points_TD = self._grid_SD[points_T].astype(np.float64)
        distances_TS = np.empty((len(points_TD), len(self._grid_SD)), np.float64)
        for start in range(0, len(self._grid_SD), self._block):
            rows = slice(start, start + self._block)
            products_TB = points_TD @ self._grid_SD[rows].astype(np.float64).T
            distances_TS[:, rows] = self._norms_S[points_T][:, None] + self._norms_S[rows] - 2.0 * products_TB
        return distances_TS


def _distinct_rest(sample_SD: NDArray[np.float32], chosen: list[int], num_clusters: int) -> list[int]:
    """Rows that complete the seeds when all others coincide with a chosen one on the grid: distinct ones, lowest id first."""
    _, first_rows, groups_S = np.unique(sample_SD + 0.0, axis=0, return_index=True, return_inverse=True)
    if len(first_rows) < num_clusters:
        raise _too_few(len(first_rows), num_clusters)
    rest = np.delete(first_rows, groups_S.reshape(-1)[chosen])
    return [int(row) for row in np.sort(rest)[: num_clusters - len(chosen)]]


def _too_few(num_distinct: int, num_clusters: int) -> DataError:
    return DataError(
        f"{num_clusters} experts need as many distinct features to start from, but the sample holds {num_distinct}: "
        "lower partition.experts, raise partition.sample_size, or look for copies among the images"
    )
