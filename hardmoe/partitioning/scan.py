"""One batch of a pass of k-means: every row to its nearest centroid, and all rows into exact sums.

On a CPU a block of rows goes through the matrix product and the three compiled loops of `kernels` while it is in the cache.
Where Numba is not installed or the batch is small, `assign` and `ClusterSums.from_batch` give the same bits by several passes
over memory; where there is a GPU, `device_pass` gives them without copying rows back. Rejected: skipping the search for rows
whose centroid cannot have changed (Hamerly, Elkan), which needs a bound per row kept between the passes, and so state that a
killed pass would lose.

Shape letters: N examples, B rows of a block, D feature dim, K clusters.
"""

from contextlib import AbstractContextManager
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from hardmoe.neighbours.assignment import Assignment, assign, decision_margins, exact_nearest, refuse_non_finite
from hardmoe.neighbours.engine import Engine, device_of
from hardmoe.partitioning.exact_sums import ClusterSums

_BLOCK_PRODUCTS = 2**17
_LEAST_BLOCK, _LARGEST_BLOCK = 256, 4096
_LEAST_VALUES = 2**17
"""A smaller batch is not worth the 2.4 s that compiling takes once a process: several passes over it take 2 ms more."""
_ROOM = 2.0**30
"""Of a sum of magnitudes, half of what 63 bits hold in steps of 2^-32."""


def scan(features_ND: NDArray[np.float32], centroids_KD: NDArray[np.float32], engine: Engine) -> tuple[Assignment, ClusterSums]:
    """Nearest centroids and sums; `second_N` of the assignment is not searched for, and -1.

    Args:
        features_ND: float32 [N, D].
        centroids_KD: float32 [K, D], finite.
        engine: who searches where the compiled loops are not used; the answer does not depend on it.

    Raises:
        DataError: a feature is NaN, infinite or too large to be summed exactly.
    """
    if (device := device_of(engine)) is not None:
        import torch

        from hardmoe.partitioning.device_pass import scan_on

        return scan_on(torch.device(device), features_ND, centroids_KD)
    if engine.on_gpu or len(centroids_KD) == 1 or features_ND.size < _LEAST_VALUES or find_spec("numba") is None:
        assignment = assign(features_ND, centroids_KD, engine)
        nowhere_N = np.full(len(features_ND), -1, np.int32)
        found = Assignment(assignment.primary_N, nowhere_N, assignment.squared_distance_N)
        return found, ClusterSums.from_batch(features_ND, found, len(centroids_KD))
    return _Fused(centroids_KD).scan(np.ascontiguousarray(features_ND))


def blas_threads(count: int) -> AbstractContextManager[object]:
    """Bound the threads of NumPy's matrix products, process-wide, while a block runs.

    Two scanning threads whose products start two threads each take 2.1 times as long as with one each.
    """
    import threadpoolctl  # not needed by a machine that scans on its GPU only

    limits: AbstractContextManager[object] = threadpoolctl.threadpool_limits(count, user_api="blas")
    return limits


class _Fused:
    """The compiled loops over blocks, and the memory they share."""

    def __init__(self, centroids_KD: NDArray[np.float32]) -> None:
        self._centroids_KD = np.ascontiguousarray(centroids_KD)
        squares_K = np.square(self._centroids_KD, dtype=np.float64).sum(axis=1)
        self._squares_K, self._largest = squares_K.astype(np.float32), float(np.sqrt(squares_K.max()))
        num_clusters, dim = self._centroids_KD.shape
        self._block = max(_LEAST_BLOCK, min(_LARGEST_BLOCK, _BLOCK_PRODUCTS // num_clusters))
        self._products_BK = np.empty((self._block, num_clusters), np.float32)
        self._bits_KD = np.zeros((num_clusters, dim), np.int64)
        self._counts_K = np.zeros(num_clusters, np.int64)
        self._used = 0.0
        self._sums = ClusterSums.zero(num_clusters, dim)

    def scan(self, features_ND: NDArray[np.float32]) -> tuple[Assignment, ClusterSums]:
        primary_N = np.empty(len(features_ND), np.int32)
        squared_N = np.empty(len(features_ND), np.float64)
        for start in range(0, len(features_ND), self._block):
            rows = slice(start, start + self._block)
            largest = self._search(features_ND[rows], primary_N[rows], squared_N[rows])
            self._take_in(features_ND[rows], primary_N[rows], squared_N[rows], largest)
        # All that float32 could not tell at once: what it costs to ask is mostly per call.
        undecided_R = np.flatnonzero(primary_N < 0)
        if len(undecided_R):
            features_RD = features_ND[undecided_R]
            nearest_R = exact_nearest(features_RD, self._centroids_KD, np.arange(len(undecided_R))).astype(np.int32)
            squared_R = squared_N[undecided_R]
            self._take_in(features_RD, nearest_R, squared_R, float(np.sqrt(squared_R.max())))
            primary_N[undecided_R], squared_N[undecided_R] = nearest_R, squared_R
        assignment = Assignment(primary_N, np.full(len(features_ND), -1, np.int32), squared_N)
        self._flush()
        return assignment, self._sums.with_distances(squared_N)

    def _search(self, features_BD: NDArray[np.float32], primary_B: NDArray[np.int32], squared_B: NDArray[np.float64]) -> float:
        """Find the block's centroids, -1 where float32 cannot tell; leaves |x|^2 in `squared_B`, returns the largest |x|."""
        from hardmoe.partitioning import kernels

        kernels.squared_norms(features_BD, squared_B)
        norms_B = np.sqrt(squared_B)
        refuse_non_finite(features_BD, norms_B)
        # NumPy's OpenBLAS takes half the time of torch's product for matrices as narrow as these (0.16 us a row, not 0.32).
        with np.errstate(over="ignore", invalid="ignore"):  # where products overflow, nothing is decided
            products_BK = np.dot(features_BD, self._centroids_KD.T, out=self._products_BK[: len(features_BD)])
        margins_B = decision_margins(norms_B, self._largest, features_BD.shape[1])
        kernels.nearest(products_BK, self._squares_K, margins_B, primary_B)
        return float(norms_B.max())

    def _take_in(
        self, features_BD: NDArray[np.float32], primary_B: NDArray[np.int32], squared_B: NDArray[np.float64], largest: float
    ) -> None:
        """Measure and add the rows that have a centroid; `largest` is their largest norm, or more."""
        from hardmoe.partitioning import kernels

        kernels.distances(features_BD, self._centroids_KD, primary_B, squared_B)
        if largest >= kernels.LARGEST:
            found_B = primary_B >= 0
            far = Assignment(primary_B[found_B], primary_B[found_B], np.zeros(int(found_B.sum())))
            if len(far.primary_N):
                self._sums += ClusterSums.from_batch(features_BD[found_B], far, len(self._centroids_KD))
            return
        # Norms are float32 sums, hence the few per cent more.
        needed = 1.05 * largest * len(features_BD)
        if self._used + needed >= _ROOM:
            self._flush()
        self._used += needed
        kernels.add_rows(features_BD, primary_B, self._bits_KD, self._counts_K)

    def _flush(self) -> None:
        from hardmoe.partitioning import kernels

        units_KD = self._bits_KD - self._counts_K[:, None] * kernels.OFFSET_BITS
        self._sums += ClusterSums.from_units(self._counts_K.copy(), units_KD)
        self._bits_KD[:] = 0
        self._counts_K[:] = 0
        self._used = 0.0
