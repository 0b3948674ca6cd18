"""Lloyd's k-means whose result does not depend on how the data are sharded, batched or ordered.

    start_centroids(sample)                   several times, on a sample drawn by hash: k-means++ and passes over a part of it
    scan_batch(...) + scan_batch(...) + ...   per pass: every batch gives a `PassSums`, and they add up exactly
    update(pass_sums, centroids)              means in float64 from exact sums; empty clusters start anew
    refine(centroids)                         the loop, a generator: it asks for passes, whoever drives it scans the rows
    fit(features)                             all of it for features in memory

Three things make it order-free: the assignment is exact (`neighbours.assignment`), the sums are integers (`exact_sums`),
and chance is a hash of the seed, the step and the example id. Centroids keep the order in which they were seeded: number
k is the k-th point drawn, moved by the passes; sorting them afterwards by size or coordinate would let a small change of
the data renumber every expert. With unit features the centroids are plain means, unless k-means is asked to be spherical: then
every mean is scaled back to length 1, and a part is those rows whose angle with its centroid is smallest. The router measures
Euclidean distance either way, which among centroids of one length ranks as the cosine does, and the descent is as monotone:
of all points of the sphere the scaled mean is the one with the smallest sum of squared distances to its rows.

Rejected: `faiss.Kmeans` and `sklearn.cluster.KMeans` (float32 counts; everything in memory; the result depends on the
order of the rows), and mini-batch k-means (the result depends on the order of the batches by construction).

Shape letters: N examples, S examples of the sample, D feature dim, K clusters.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hardmoe.errors import DataError
from hardmoe.hashing import derive_seed, hash_ids
from hardmoe.neighbours.assignment import sum_of_squares
from hardmoe.neighbours.engine import Engine, choose_engine
from hardmoe.partitioning.exact_sums import ClusterSums, FarthestPoints
from hardmoe.partitioning.scan import blas_threads, scan
from hardmoe.partitioning.seeding import seed_centroids

_LEAST_SEED_ROWS, _SEED_ROWS_PER_CLUSTER = 2**11, 32
_LEAST_START_ROWS, _START_ROWS_PER_CLUSTER = 2**13, 256
_START_PASSES, _START_TOLERANCE = 25, 1e-3
_MOST_RESEEDS = 64  # farthest points a batch reports: what a pass can repair; any further empty cluster waits for the next


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
class FitOptions:
    """How far and how a fit in memory goes."""

    max_passes: int = 50
    """At most so many passes."""
    tolerance: float = 1e-4
    """See `has_converged`."""
    restarts: int = 1
    """Starts to choose the best of; see `start_centroids`."""
    batch_size: int = 65_536
    """Rows scanned at a time; changes nothing but the memory used."""
    num_threads: int = 1
    """Batches scanned at once."""
    spherical: bool = False
    """See `update`."""


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
        counts_K: rows of every cluster in the last pass, int64 [K].
    """

    centroids_KD: NDArray[np.float32]
    objective_per_pass: list[float]
    reseeded: list[tuple[int, int]]
    converged: bool
    counts_K: NDArray[np.int64]


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
    assignment, sums = scan(features_ND, centroids_KD, engine)
    return PassSums(sums, FarthestPoints.from_batch(features_ND, ids_N16, assignment, min(num_clusters, _MOST_RESEEDS)))


def update(found: PassSums, centroids_KD: NDArray[np.float32], spherical: bool = False) -> Updated:
    """Move every centroid to the mean of its rows, and empty clusters to the rows farthest from their centroids.

    The mean is the exact sum rounded to float64, divided, and rounded to float32. The k-th empty cluster, by number, takes
    the k-th farthest distinct point, by (distance, id).

    Args:
        found: in a pass over all rows.
        centroids_KD: those it went by, float32 [K, D].
        spherical: scale every mean to length 1 before it is rounded to float32, its length summed in float64 in the order of
            `sum_of_squares`. A mean of length 0 has no direction, so its cluster keeps its centroid; nor has a row that is
            zero, where no cluster starts anew.
    """
    counts_K = found.sums.counts_K
    occupied_K = counts_K > 0
    means_KD = found.sums.totals_KD[occupied_K] / counts_K[occupied_K, None]
    points_MD = found.farthest.features_MD
    moved_KD = centroids_KD.copy()
    if spherical:
        lengths_K = np.sqrt(sum_of_squares(means_KD.copy()))[:, None]
        means_KD = np.divide(means_KD, lengths_K, where=lengths_K > 0.0, out=centroids_KD[occupied_K].astype(np.float64))
        points_MD = points_MD[points_MD.any(axis=1)]
    moved_KD[occupied_K] = means_KD.astype(np.float32)
    empty = np.flatnonzero(~occupied_K)
    reseeded = empty[: len(points_MD)]
    moved_KD[reseeded] = points_MD[: len(reseeded)]
    return Updated(moved_KD, empty.tolist(), reseeded.tolist())


def has_converged(previous_objective: float | None, objective: float, tolerance: float) -> bool:
    """Whether a pass lowered the objective by no more than `tolerance` times it; False for the first pass (None)."""
    return previous_objective is not None and previous_objective - objective <= tolerance * previous_objective


def refine(
    centroids_KD: NDArray[np.float32], max_passes: int, tolerance: float, spherical: bool = False
) -> Generator[tuple[int, NDArray[np.float32]], PassSums, KMeansFit]:
    """Lloyd's passes until they converge, as a generator, so that a pass may be a loop here or a phase of a cluster.

    It yields a pass's number and its centroids, float32 [K, D], expects to be sent the sums over all rows, and returns the
    fit. Sending the stored sums of passes that finished brings a killed fit back to where it was, bit for bit.

    Args:
        centroids_KD: where to start, float32 [K, D].
        max_passes: at most this many passes.
        tolerance: see `has_converged`. A pass that started a cluster anew never counts as converged.
        spherical: see `update`; the centroids to start from must have length 1 then.
    """
    objectives: list[float] = []
    reseeded: list[tuple[int, int]] = []
    for number in range(max_passes):
        found = yield number, centroids_KD
        updated = update(found, centroids_KD, spherical)
        centroids_KD = updated.centroids_KD
        previous = objectives[-1] if objectives else None
        objectives.append(found.sums.objective)
        reseeded += [(number, cluster) for cluster in updated.reseeded]
        if has_converged(previous, objectives[-1], tolerance) and not updated.reseeded:
            return KMeansFit(centroids_KD, objectives, reseeded, True, found.sums.counts_K)
    return KMeansFit(centroids_KD, objectives, reseeded, False, found.sums.counts_K)


def refine_with(
    scan: Callable[[NDArray[np.float32]], PassSums],
    centroids_KD: NDArray[np.float32],
    max_passes: int,
    tolerance: float,
    spherical: bool = False,
) -> KMeansFit:
    """Drive `refine` with a function that scans all rows against the centroids it is given."""
    refining = refine(centroids_KD, max_passes, tolerance, spherical)
    try:
        _, centroids_KD = next(refining)
        while True:
            _, centroids_KD = refining.send(scan(centroids_KD))
    except StopIteration as stop:
        found: KMeansFit = stop.value
        return found


def start_rows(num_clusters: int) -> int:
    """How many rows `start_centroids` looks at."""
    return max(_LEAST_START_ROWS, _START_ROWS_PER_CLUSTER * num_clusters)


def start_centroids(
    sample_SD: NDArray[np.float32],
    ids_S16: NDArray[np.uint8],
    num_clusters: int,
    seed: int,
    attempt: int = 0,
    spherical: bool = False,
) -> KMeansFit:
    """Centroids to begin the passes over all rows with: k-means++ on a few rows of the sample, then passes over some more.

    A pass over 65,536 rows costs a fifteenth of one over a million and gets nearly as far, so that what is left to do over all
    rows is two or three passes instead of twenty. The rows are those with the smallest hashes, the same ones however they are
    sharded or ordered.

    Args:
        sample_SD: float32 [S, D], finite, in any order.
        ids_S16: distinct example ids, uint8 [S, 16].
        num_clusters: K.
        seed: the recipe's seed.
        attempt: number of the restart; each draws its own seeds over the same rows, so that their objectives can be compared.
        spherical: see `update`; no centroid starts at a row that is zero then.

    Raises:
        DataError: the sample holds fewer distinct features than clusters, or NaN or infinity.
    """
    order_S = np.argsort(hash_ids(ids_S16, seed, "kmeans-start"), kind="stable")
    seedable = order_S[np.count_nonzero(sample_SD, axis=1)[order_S] > 0] if spherical else order_S
    first = seedable[: max(_LEAST_SEED_ROWS, _SEED_ROWS_PER_CLUSTER * num_clusters)]
    more = order_S[: start_rows(num_clusters)]
    attempt_seed = seed if attempt == 0 else derive_seed(seed, "restart", attempt)
    try:
        seeds_KD = seed_centroids(sample_SD[first], ids_S16[first], num_clusters, attempt_seed)
    except DataError:
        if len(first) == len(seedable):
            raise
        # So many copies that a few rows do not hold K distinct ones; all rows may.
        seeds_KD = seed_centroids(sample_SD[seedable], ids_S16[seedable], num_clusters, attempt_seed)
    scan_some = _scan_in_memory(sample_SD[more], ids_S16[more], FitOptions.batch_size, map)
    return refine_with(scan_some, seeds_KD, _START_PASSES, _START_TOLERANCE, spherical)


def fit(
    features_ND: NDArray[np.float32], ids_N16: NDArray[np.uint8], num_clusters: int, seed: int, options: FitOptions | None = None
) -> KMeansFit:
    """K-means of features in memory, begun on some of them.

    Args:
        features_ND: float32 [N, D].
        ids_N16: distinct example ids, uint8 [N, 16].
        num_clusters: K.
        seed: the recipe's seed.
        options: see there.

    Raises:
        DataError: fewer distinct features than clusters, or a feature that is not finite or too large.
    """
    options = options or FitOptions()
    start = partial(start_centroids, features_ND, ids_N16, num_clusters, seed, spherical=options.spherical)
    with blas_threads(1), ThreadPoolExecutor(options.num_threads) as pool:
        start_KD = best_start(list(pool.map(start, range(options.restarts)))).centroids_KD
        scan_all = _scan_in_memory(features_ND, ids_N16, options.batch_size, pool.map)
        return refine_with(scan_all, start_KD, options.max_passes, options.tolerance, options.spherical)


def best_start(starts: Sequence[KMeansFit]) -> KMeansFit:
    """The one with the smallest objective; of equal ones the first."""
    return min(starts, key=lambda start: start.objective_per_pass[-1])


def _scan_in_memory(
    features_ND: NDArray[np.float32],
    ids_N16: NDArray[np.uint8],
    batch_size: int,
    run: Callable[[Callable[[int], PassSums], Iterable[int]], Iterable[PassSums]],
) -> Callable[[NDArray[np.float32]], PassSums]:
    """A pass over features in memory, for `refine_with`; `run` is `map` or a pool's."""
    engine = choose_engine()

    def scan_all(centroids_KD: NDArray[np.float32]) -> PassSums:
        def scan_from(start: int) -> PassSums:
            rows = slice(start, start + batch_size)
            return scan_batch(features_ND[rows], ids_N16[rows], centroids_KD, engine)

        starts = range(0, len(features_ND), batch_size)
        return sum(run(scan_from, starts), start=PassSums.zero(*centroids_KD.shape))

    return scan_all
