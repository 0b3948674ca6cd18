"""Where k-means begins its passes over all rows: the best of several starts, refined on ever larger samples.

    start_centroids(sample, attempt)   k-means++ on the first rung's rows, and passes over them; several attempts are compared
    climb(sample, best)                passes over four times as many rows, then over sixteen times as many

What passes over n rows converge to lies about K / n of the objective above what passes over all rows would (each of K means errs
by its cluster's variance over n / K rows), so the last rung's 1,024 rows per cluster leave a tenth of a per cent, for a pass or
two over all rows. A start costs little on few rows, and where clusters are few, eight of them are what it takes not to be
unlucky. The rungs are tenfold cheaper than the passes over everything that they save: on 1 M x 256 without any clusters
twenty such passes are left as one to three (`tests/benchmarks/kmeans.py`). A rung ends at a finer tolerance than a pass lowers
the objective by on a plateau, where Lloyd's descent is slow and steady.

The rows are those with the smallest hashes, the same however they are sharded or ordered, and a rung's are among the next one's.

Rejected: all attempts up to the last rung (eight times the time for the same centroids nearly always), k-means|| (its seeds are
good for many clusters, where one start is as good as any), mini-batches (the result depends on the order of the batches).

Shape letters: S examples of the sample, D feature dim, K clusters.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hardmoe.errors import DataError
from hardmoe.hashing import derive_seed, hash_ids
from hardmoe.partitioning.kmeans import KMeansFit, Mapper, refine_with, scan_in_memory
from hardmoe.partitioning.seeding import seed_centroids

_LEAST_ROWS = 2**10
_ROWS_PER_CLUSTER, _SEED_ROWS_PER_CLUSTER = 64, 16
_GROWTH, _RUNGS = 4, 3
_START_PASSES, _START_TOLERANCE = 25, 5e-4
_RUNG_PASSES, _RUNG_TOLERANCE = 60, 2e-4
_BATCH_ROWS = 2**13


def rung_rows(num_clusters: int) -> tuple[int, ...]:
    """How many rows the starts and the rungs above them look at."""
    first = max(_LEAST_ROWS, _ROWS_PER_CLUSTER * num_clusters)
    return tuple(first * _GROWTH**rung for rung in range(_RUNGS))


def start_centroids(
    sample_SD: NDArray[np.float32],
    ids_S16: NDArray[np.uint8],
    num_clusters: int,
    seed: int,
    attempt: int = 0,
    spherical: bool = False,
) -> KMeansFit:
    """One start: k-means++ and passes over the first rung.

    Args:
        sample_SD: float32 [S, D], finite, in any order.
        ids_S16: distinct example ids, uint8 [S, 16].
        num_clusters: K.
        seed: the recipe's seed.
        attempt: number of the start; each draws its own seeds over the same rows, so that their objectives can be compared.
        spherical: see `kmeans.update`; no centroid starts at a row that is zero then.

    Raises:
        DataError: the sample holds fewer distinct features than clusters, or NaN or infinity.
    """
    rows = _first_rows(ids_S16, seed, rung_rows(num_clusters)[0])
    seedable = _not_zero(sample_SD, rows) if spherical else rows
    first = seedable[: max(_LEAST_ROWS, _SEED_ROWS_PER_CLUSTER * num_clusters)]
    attempt_seed = seed if attempt == 0 else derive_seed(seed, "restart", attempt)
    try:
        seeds_KD = seed_centroids(sample_SD[first], ids_S16[first], num_clusters, attempt_seed)
    except DataError:
        every = np.arange(len(sample_SD))
        if spherical:
            every = _not_zero(sample_SD, every)
        if len(first) == len(every):
            raise
        # So many copies that a few rows do not hold K distinct ones; all rows may.
        seeds_KD = seed_centroids(sample_SD[every], ids_S16[every], num_clusters, attempt_seed)
    scan_first = scan_in_memory(sample_SD[rows], ids_S16[rows], _BATCH_ROWS, map)
    return refine_with(scan_first, seeds_KD, _START_PASSES, _START_TOLERANCE, spherical)


def best_start(starts: Sequence[KMeansFit]) -> KMeansFit:
    """The one with the smallest objective; of equal ones the first."""
    return min(starts, key=lambda start: start.objective_per_pass[-1])


def climb(
    sample_SD: NDArray[np.float32],
    ids_S16: NDArray[np.uint8],
    start_KD: NDArray[np.float32],
    seed: int,
    spherical: bool = False,
    run: Mapper = map,
) -> KMeansFit:
    """Refine a start on the rungs above the first; returns the fit on the last one.

    A rung that the sample has no rows for is the whole sample.

    Args:
        sample_SD: float32 [S, D], as for the starts.
        ids_S16: distinct example ids, uint8 [S, 16].
        start_KD: float32 [K, D].
        seed: the recipe's seed.
        spherical: see `kmeans.update`.
        run: scans batches of rows, at once if it likes.
    """
    highest = rung_rows(len(start_KD))[-1]
    rows = _first_rows(ids_S16, seed, highest)
    sample_SD, ids_S16 = sample_SD[rows], ids_S16[rows]
    for count in rung_rows(len(start_KD))[1:]:
        scan_rung = scan_in_memory(sample_SD[:count], ids_S16[:count], min(_BATCH_ROWS, count // _GROWTH), run)
        fit = refine_with(scan_rung, start_KD, _RUNG_PASSES, _RUNG_TOLERANCE, spherical)
        start_KD = fit.centroids_KD
        if count >= len(rows):
            break
    return fit


def _first_rows(ids_S16: NDArray[np.uint8], seed: int, count: int) -> NDArray[np.intp]:
    """The rows with the `count` smallest hashes, smallest first."""
    hashes_S = hash_ids(ids_S16, seed, "kmeans-start")
    rows = np.argpartition(hashes_S, count)[:count] if count < len(hashes_S) else np.arange(len(hashes_S))
    return rows[np.argsort(hashes_S[rows], kind="stable")]


def _not_zero(sample_SD: NDArray[np.float32], rows: NDArray[np.intp]) -> NDArray[np.intp]:
    return rows[sample_SD[rows].any(axis=1)]
