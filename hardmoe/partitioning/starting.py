"""Where k-means begins its passes over all rows: the best of several starts, refined on ever larger samples.

    Ladder(sample).start(attempt)   k-means++ on the first rung's rows, and passes over them; several attempts are compared
    Ladder(sample).climb(best)      passes over four times as many rows, then over sixteen times as many

What passes over n rows converge to lies about K / n of the objective above what passes over all rows would (each of K means errs
by its cluster's variance over n / K rows), so the last rung's 1,024 rows per cluster leave a tenth of a per cent, for a pass or
two over all rows. A start costs little on few rows, and where clusters are few, eight of them are what it takes not to be
unlucky. The rungs are tenfold cheaper than the passes over everything that they save: on 1 M x 256 without any clusters
twenty such passes are left as one to three (`tests/benchmarks/kmeans.py`). On a plateau Lloyd's descent is slow and steady, so
the passes of a rung have momentum: of 1 M x 256 without any clusters at K = 256 the rungs took 28 passes to a tolerance of 2e-4
without, and 18 to 5e-4 with it, which leave fewer passes over all rows (2.3 and 1.3 in the mean of three seeds).

The rows are those with the smallest hashes, the same however they are sharded or ordered, and a rung's are among the next one's.

Rejected: all attempts up to the last rung (eight times the time for the same centroids nearly always), k-means|| (its seeds are
good for many clusters, where one start is as good as any), mini-batches (the result depends on the order of the batches).

Shape letters: S examples of the sample, D feature dim, K clusters.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from hardmoe.errors import DataError
from hardmoe.hashing import derive_seed, hash_ids
from hardmoe.neighbours.assignment import sum_of_squares
from hardmoe.partitioning.kmeans import KMeansFit, Mapper, PassSums, has_converged, refine_with, scan_in_memory, update
from hardmoe.partitioning.seeding import seed_centroids

_LEAST_ROWS = 2**10
_ROWS_PER_CLUSTER, _SEED_ROWS_PER_CLUSTER = 64, 16
_GROWTH, _RUNGS = 4, 3
_START_PASSES, _START_TOLERANCE = 25, 5e-4
_RUNG_PASSES, _RUNG_TOLERANCE = 60, 5e-4
_MOMENTUM = 0.85
_SHORTEST = 2.0**-60
"""Of a centroid to be scaled to length 1; a shorter one has no direction."""
_BATCH_ROWS = 2**13


def rung_rows(num_clusters: int) -> tuple[int, ...]:
    """How many rows the starts and the rungs above them look at."""
    first = max(_LEAST_ROWS, _ROWS_PER_CLUSTER * num_clusters)
    return tuple(first * _GROWTH**rung for rung in range(_RUNGS))


class Ladder:
    """A sample, and the rows of it that the starts and the rungs look at: those with the smallest hashes, smallest first.

    Only these rows' features are read, and of a start only the first rung's: the sample's may not fit in memory beside others.
    """

    def __init__(
        self,
        ids_S16: NDArray[np.uint8],
        read: Callable[[NDArray[np.intp]], NDArray[np.float32]],
        num_clusters: int,
        seed: int,
        spherical: bool = False,
    ) -> None:
        """Choose the rows.

        Args:
            ids_S16: distinct example ids, uint8 [S, 16].
            read: gives the features of some rows of the sample, in the order asked for, float32 [n, D], finite; such as
                `sample_SD.__getitem__`.
            num_clusters: K.
            seed: the recipe's seed.
            spherical: see `kmeans.update`; no centroid starts at a row that is zero then.
        """
        self._ids_S16, self._read = ids_S16, read
        self._num_clusters, self._seed, self._spherical = num_clusters, seed, spherical
        self._rungs = rung_rows(num_clusters)
        hashes_S, count = hash_ids(ids_S16, seed, "kmeans-start"), self._rungs[-1]
        rows = np.argpartition(hashes_S, count)[:count] if count < len(hashes_S) else np.arange(len(hashes_S))
        self._rows: NDArray[np.intp] = rows[np.argsort(hashes_S[rows], kind="stable")]

    def start(self, attempt: int = 0) -> KMeansFit:
        """One start: k-means++ and passes over the first rung.

        Args:
            attempt: number of the start; each draws its own seeds over the same rows, so that their objectives can be compared.

        Raises:
            DataError: the sample holds fewer distinct features than clusters, or NaN or infinity.
        """
        features_SD, ids_S16 = self._rung(self._rungs[0])
        attempt_seed = self._seed if attempt == 0 else derive_seed(self._seed, "restart", attempt)
        count = max(_LEAST_ROWS, _SEED_ROWS_PER_CLUSTER * self._num_clusters)
        try:
            seeds_KD = self._seeds(features_SD, ids_S16, attempt_seed, count)
        except DataError:
            # So many copies that a few rows do not hold K distinct ones; all rows may.
            seeds_KD = self._seeds(self._read(np.arange(len(self._ids_S16))), self._ids_S16, attempt_seed)
        scan_first = scan_in_memory(features_SD, ids_S16, _BATCH_ROWS, map)
        return refine_with(scan_first, seeds_KD, _START_PASSES, _START_TOLERANCE, self._spherical)

    def _rung(self, count: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Features and ids of the first rows, or of all that there are."""
        rows = self._rows[:count]
        return self._read(rows), self._ids_S16[rows]

    def _seeds(
        self, features_SD: NDArray[np.float32], ids_S16: NDArray[np.uint8], seed: int, count: int | None = None
    ) -> NDArray[np.float32]:
        if self._spherical:
            seedable_S = features_SD.any(axis=1)
            features_SD, ids_S16 = features_SD[seedable_S], ids_S16[seedable_S]
        return seed_centroids(features_SD[:count], ids_S16[:count], self._num_clusters, seed)

    def climb(self, start_KD: NDArray[np.float32], run: Mapper = map) -> KMeansFit:
        """Refine a start on the rungs above the first; returns the fit on the last one.

        A rung that the sample has no rows for is the whole sample.

        Args:
            start_KD: float32 [K, D].
            run: scans batches of rows, at once if it likes.
        """
        features_SD, ids_S16 = self._rung(self._rungs[-1])
        for count in self._rungs[1:]:
            scan_rung = scan_in_memory(features_SD[:count], ids_S16[:count], min(_BATCH_ROWS, count // _GROWTH), run)
            fit = refine_with_momentum(scan_rung, start_KD, _RUNG_PASSES, _RUNG_TOLERANCE, self._spherical)
            start_KD = fit.centroids_KD
            if count >= len(ids_S16):
                break
        return fit


def best_start(starts: Sequence[KMeansFit]) -> KMeansFit:
    """The one with the smallest objective; of equal ones the first."""
    return min(starts, key=lambda start: start.objective_per_pass[-1])


def refine_with_momentum(
    scan: Callable[[NDArray[np.float32]], PassSums],
    centroids_KD: NDArray[np.float32],
    max_passes: int,
    tolerance: float,
    spherical: bool = False,
) -> KMeansFit:
    """Lloyd's passes that do not stop at the means: each goes on by a share of what they moved (Nesterov 1983).

    Where going on raised the objective, the next pass starts at the best means there were, from rest. What is returned are means,
    those of the pass with the smallest objective. Arguments as of `kmeans.refine_with`.
    """
    objectives: list[float] = []
    best: float | None = None
    best_KD, last_KD = centroids_KD, None
    for _ in range(max_passes):
        found = scan(centroids_KD)
        objective = found.sums.objective
        objectives.append(objective)
        if best is not None and objective > best:
            if last_KD is None:  # a pass of Lloyd's own: what is left to be won is less than rounding
                return KMeansFit(best_KD, objectives, [], True, found.sums.counts_K)
            centroids_KD, last_KD = best_KD, None
            continue
        moved = update(found, centroids_KD, spherical)
        if has_converged(best, objective, tolerance) and not moved.reseeded:
            return KMeansFit(moved.centroids_KD, objectives, [], True, found.sums.counts_K)
        best, best_KD = objective, moved.centroids_KD
        centroids_KD = best_KD
        if last_KD is not None and not moved.reseeded:
            centroids_KD = _further(best_KD, last_KD, spherical)
        last_KD = best_KD
    return KMeansFit(best_KD, objectives, [], False, found.sums.counts_K)


def _further(means_KD: NDArray[np.float32], last_KD: NDArray[np.float32], spherical: bool) -> NDArray[np.float32]:
    """Beyond the means, away from those of the pass before."""
    ahead_KD = means_KD + _MOMENTUM * (means_KD.astype(np.float64) - last_KD)
    if spherical:
        ahead_KD /= np.maximum(np.sqrt(sum_of_squares(ahead_KD.copy())), _SHORTEST)[:, None]
    return ahead_KD.astype(np.float32)
