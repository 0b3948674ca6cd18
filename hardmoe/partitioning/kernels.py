"""The three inner loops of a pass of k-means on a CPU, compiled: what NumPy needs a dozen passes over memory for.

`nearest` reads a block of products x.c and finds every row's nearest centroid, or says that float32 cannot tell. `distances`
measures by the definition of `neighbours.assignment`, bit for bit. `add_rows` adds rows as integers: adding 1.5 * 2^20 to a
float64 of magnitude below 2^19 leaves it rounded to a multiple of 2^-32 in its low bits, so that the bits of the sum, read as
an integer, can be added without rounding, and the constant's bits be taken off at the end, once per row. A pass over 1 M x 256
then costs 0.19 s on two cores for 8 clusters, of which the matrix product is 0.10; in NumPy it was 2.6 s.

Compiled in every process anew (1.3 s, once): Numba's cache on disk is unpickled. Rejected: `torch.index_add_` (1 us a row), a
float64 product with the one-hot assignment (2.6 s for 256 clusters).

Shape letters: B rows of a block, D feature dim, K centroids.
"""

# mypy: disable-error-code="untyped-decorator"

import numpy as np
from numba import njit
from numpy.typing import NDArray

_U = np.uint64

OFFSET = 1.5 * 2.0**20
OFFSET_BITS = int(np.array([OFFSET]).view(np.int64)[0])
LARGEST = 2.0**19
"""Rows with a norm of this or more are not for `add_rows`."""


@njit(nogil=True, error_model="numpy")
def nearest(
    products_BK: NDArray[np.float32],
    squares_K: NDArray[np.float32],
    margins_B: NDArray[np.float64],
    primary_B: NDArray[np.int32],
) -> None:
    """Nearest centroid of every row, into `primary_B`; -1 where the second is within the margin.

    Args:
        products_BK: x.c in float32.
        squares_K: |c|^2 in float32.
        margins_B: how far apart the best two must be, float64.
        primary_B: to be filled, int32.
    """
    num_rows, num_centroids = products_BK.shape
    for row in range(num_rows):
        best, second, at = np.float32(np.inf), np.float32(np.inf), 0
        for k in range(num_centroids):
            score = squares_K[k] - np.float32(2.0) * products_BK[row, k]
            if score < best:
                second, best, at = best, score, k
            elif score < second:
                second = score
        # False, too, where a score is no number.
        decided = np.float64(second) - np.float64(best) > margins_B[row]
        primary_B[row] = at if decided else -1


@njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def squared_norms(features_BD: NDArray[np.float32], squares_B: NDArray[np.float64]) -> None:
    """Float32 sums of squares in any order, into `squares_B`, float64."""
    num_rows, dim = features_BD.shape
    for row in range(num_rows):
        total = np.float32(0.0)
        for d in range(dim):
            total += features_BD[row, d] * features_BD[row, d]
        squares_B[row] = total


@njit(nogil=True, error_model="numpy")
def _in_lanes(values: NDArray[np.float64], start: np.uint64, count: np.uint64) -> float:
    """The sum of a multiple of eight values in the order in which NumPy adds them: in eight lanes."""
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = 0.0
    for d in range(start, start + count, _U(8)):
        s0 += values[d]
        s1 += values[d + _U(1)]
        s2 += values[d + _U(2)]
        s3 += values[d + _U(3)]
        s4 += values[d + _U(4)]
        s5 += values[d + _U(5)]
        s6 += values[d + _U(6)]
        s7 += values[d + _U(7)]
    return ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))


@njit(nogil=True, error_model="numpy")
def _pairwise(values: NDArray[np.float64], start: np.uint64, count: np.uint64) -> float:
    """The sum in the order in which NumPy adds a contiguous row: in eight lanes, and by halves past 128.

    Unsigned bounds, since a slice takes longer than the sum and a signed index is checked; a whole 128 by itself, which the
    compiler unrolls: 0.09 us a row of 256, with the differences, and not 0.13.
    """
    if count > _U(128):
        half = count // _U(2)
        half -= half % _U(8)
        halves: float = _pairwise(values, start, half) + _pairwise(values, start + half, count - half)
        return halves
    if count == _U(128):
        return float(_in_lanes(values, start, _U(128)))
    rest = count % _U(8)
    total = float(_in_lanes(values, start, count - rest)) if count >= _U(8) else 0.0
    for d in range(start + count - rest, start + count):
        total += values[d]
    return total


@njit(nogil=True, error_model="numpy")
def distances(
    features_BD: NDArray[np.float32],
    centroids_KD: NDArray[np.float32],
    primary_B: NDArray[np.int32],
    squared_B: NDArray[np.float64],
) -> None:
    """Squared distance of every row to its centroid, by definition, into `squared_B`; rows without one are left out."""
    num_rows, dim = features_BD.shape
    squares_D = np.empty(dim)
    for row in range(num_rows):
        k = primary_B[row]
        if k < 0:
            continue
        # A loop of its own, which the compiler turns into vectors: 0.04 us a row of 256.
        for d in range(dim):
            difference = np.float64(features_BD[row, d]) - np.float64(centroids_KD[k, d])
            squares_D[d] = difference * difference
        squared_B[row] = _pairwise(squares_D, _U(0), _U(dim))


@njit(nogil=True, error_model="numpy")
def add_rows(
    features_BD: NDArray[np.float32],
    primary_B: NDArray[np.int32],
    bits_KD: NDArray[np.int64],
    counts_K: NDArray[np.int64],
) -> None:
    """Add the bits of every row, with the offset, to its cluster's; rows without one are left out."""
    num_rows, dim = features_BD.shape
    for row in range(num_rows):
        k = primary_B[row]
        if k < 0:
            continue
        counts_K[k] += 1
        for d in range(dim):
            bits_KD[k, d] += np.float64(np.float64(features_BD[row, d]) + OFFSET).view(np.int64)
