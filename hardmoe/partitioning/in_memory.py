"""K-means of features in memory, from the starts to the last pass: what the router stage does on shards, for the sweep and tests.

Shape letters: N examples, D feature dim.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hardmoe.partitioning.config import default_starts
from hardmoe.partitioning.kmeans import KMeansFit, refine_with, scan_in_memory
from hardmoe.partitioning.scan import blas_threads
from hardmoe.partitioning.starting import Ladder, best_start


@dataclass(frozen=True)
class FitOptions:
    """How far and how a fit in memory goes."""

    max_passes: int = 50
    """At most so many passes."""
    tolerance: float = 1e-4
    """See `kmeans.has_converged`."""
    restarts: int | None = None
    """Starts to choose the best of; None for `config.default_starts`."""
    batch_size: int = 65_536
    """Rows scanned at a time; changes nothing but the memory used."""
    num_threads: int = 1
    """Batches scanned at once."""
    spherical: bool = False
    """See `kmeans.update`."""


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
    ladder = Ladder(ids_N16, features_ND.__getitem__, num_clusters, seed, options.spherical)
    with blas_threads(1), ThreadPoolExecutor(options.num_threads) as pool:
        starts = list(pool.map(ladder.start, range(options.restarts or default_starts(num_clusters))))
        climbed = ladder.climb(best_start(starts).centroids_KD, pool.map)
        scan_all = scan_in_memory(features_ND, ids_N16, options.batch_size, pool.map)
        return refine_with(scan_all, climbed.centroids_KD, options.max_passes, options.tolerance, options.spherical)
