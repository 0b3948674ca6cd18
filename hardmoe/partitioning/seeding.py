"""Where k-means begins: seeds drawn by greedy k-means++ on a small sample, exact whatever the order of the rows.

Shape letters: S examples of the sample, D feature dim, K clusters, T trial points, B rows of a block.
"""

import numpy as np
from numpy.typing import NDArray

from hardmoe.errors import DataError
from hardmoe.hashing import derive_seed, hash_ids
from hardmoe.partitioning.exact_sums import sort_order_of_ids

_BLOCK_ELEMENTS = 2**22  # float64 values of a block of the sample: 32 MB
_KEPT_ELEMENTS = 2**25  # up to so many, the grid is kept as float64 and not converted anew for every seed: 256 MB


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
        bits = min(24, (51 - (dim - 1).bit_length()) // 2)  # 24: the integers may be kept as float32
        self._grid_SD = np.empty(sample_SD.shape, np.float64 if sample_SD.size <= _KEPT_ELEMENTS else np.float32)
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
            products_TB = points_TD @ self._grid_SD[rows].astype(np.float64, copy=False).T
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
        f"{num_clusters} clusters need as many distinct features to start from, but the sample holds {num_distinct}: "
        "lower partition.experts (with two_level, partition.fine_clusters), raise partition.sample_size, "
        "or look for copies among the images"
    )
