"""The exact assignment of features to centroids: the same for every engine, batch size and number of threads.

Definition. The squared distance of x and c is the float64 sum over the dimensions of (x - c)^2, each difference and
square rounded to float64, added in NumPy's pairwise order along a contiguous row; the primary centroid has the smallest,
the second the next one; equal distances go to the lower index. It equals the brute force
`((x64[:, None] - c64[None]) ** 2).sum(-1)` bit for bit.

Getting there fast. An engine ranks the centroids in float32, and only rows it cannot have decided are looked at again.
With u = 2^-24 and gamma(n) = n u / (1 - n u), a float32 dot product of D terms in any order errs by at most gamma(D)
times the dot product of magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), so |x|^2, |c|^2
and 2 x.c err by gamma(D) of |x|^2, |c|^2 and 2 |x| |c| at most, and the two additions that join them add gamma(2):

    |computed - true| <= gamma(D + 2) * (|x| + |c|)^2 = E.

Two candidates whose computed distances differ by more than 2 E are therefore in their true order. E is doubled to cover
the rounding of the norms, of the float64 definition (smaller by 2^29) and of E itself, and a few smallest normal numbers
are added for products that underflow. If the nearest two, and the second and third, are that far apart, the row is
decided. Otherwise the same argument is repeated in float64 over all centroids, where u = 2^-53, and the few candidates
left are measured by definition. Rejected: float64 for every row (twice the time, and still dependent on the batch's
shape through BLAS), and a tie tolerance (the answer would depend on which side of it an engine falls).

Shape letters: N examples, D feature dim, K centroids, R undecided rows, P pairs of a row and a centroid.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hardmoe.errors import DataError
from hardmoe.neighbours.engine import Engine

_BLOCK_ELEMENTS = 2**16  # float64 values of a block of differences: 512 kB stays in one core's cache
_RETRY_ELEMENTS = 2**22  # float64 values of one block of undecided rows
UNDERFLOW = 2.0**-124  # 4 smallest normal float32 numbers: what flushing a few terms to zero may cost, per dimension
LARGEST_NORM = 2.0**60  # beyond it |x|^2 + |c|^2 may overflow float32 although the distance is small


@dataclass(frozen=True)
class Assignment:
    """Where every row goes.

    Attributes:
        primary_N: index of the nearest centroid, int32 [N].
        second_N: index of the second nearest, int32 [N]; -1 where there is one centroid only.
        squared_distance_N: squared distance to the primary centroid, float64 [N].
    """

    primary_N: NDArray[np.int32]
    second_N: NDArray[np.int32]
    squared_distance_N: NDArray[np.float64]


def assign(features_ND: NDArray[np.float32], centroids_KD: NDArray[np.float32], engine: Engine) -> Assignment:
    """Assign every row to its nearest centroid, exactly.

    Args:
        features_ND: float32 [N, D]; N may be 0.
        centroids_KD: float32 [K, D], finite, K >= 1.
        engine: does the fast ranking; the answer does not depend on it.

    Returns:
        The assignment, in the order of the rows.

    Raises:
        DataError: a feature is NaN or infinite.
    """
    features_ND, centroids_KD = _checked(features_ND), _checked(centroids_KD)
    num_centroids, dim = centroids_KD.shape
    if num_centroids == 0 or features_ND.shape[1] != dim:
        raise ValueError(f"features {list(features_ND.shape)} cannot be assigned to centroids {list(centroids_KD.shape)}")
    if not np.isfinite(centroids_KD).all():
        raise ValueError("the centroids hold NaN or infinity")
    norms_N = _norms(features_ND)
    refuse_non_finite(features_ND, norms_N)
    count = min(3, num_centroids)
    indices_NC, approximate_NC = engine.nearest(features_ND, centroids_KD, count)
    best_N2 = np.full((len(features_ND), 2), -1, np.int32)
    best_N2[:, : min(count, 2)] = indices_NC[:, :2]
    if num_centroids > 1:
        margin_N = decision_margins(norms_N, float(_norms(centroids_KD).max()), dim)
        with np.errstate(invalid="ignore"):  # overflowed distances: inf - inf is no number, which is larger than nothing
            gaps_NC = np.diff(approximate_NC.astype(np.float64), axis=1)
        undecided_R = np.flatnonzero(~(gaps_NC > margin_N[:, None]).all(axis=1))
        best_N2[undecided_R] = _exact_best_two(features_ND, centroids_KD, undecided_R)
    primary_N = np.ascontiguousarray(best_N2[:, 0])
    squared_distance_N = squared_distances(features_ND, centroids_KD, np.arange(len(features_ND)), primary_N)
    return Assignment(primary_N, np.ascontiguousarray(best_N2[:, 1]), squared_distance_N)


def decision_margins(norms_N: NDArray[np.float64], largest: float, dim: int) -> NDArray[np.float64]:
    """How far apart two float32 distances of a row must be for their order to be certain, float64 [N]; see the module.

    Args:
        norms_N: |x| of every row, computed in float32 in any order.
        largest: the largest |c|.
        dim: D.
    """
    margins_N = 2.0 * _error_bound(norms_N, largest, dim, 2.0**-24, UNDERFLOW)
    margins_N[norms_N + largest > LARGEST_NORM] = np.inf
    return margins_N


def margin_terms(dim: int, unit: float, underflow: float = UNDERFLOW) -> tuple[float, float]:
    """The margin of `decision_margins` as a factor of (|x| + largest)^2 and a constant, for who computes it elsewhere.

    Args:
        dim: D.
        unit: of the arithmetic's rounding, at least half of what one addition can lose.
        underflow: what flushing one dimension's product to zero may cost.
    """
    factor = 2.0 * float(_error_bound(np.ones(1), 0.0, dim, unit, 0.0)[0])
    return factor, 2.0 * (dim + 2) * underflow


def exact_nearest(
    features_ND: NDArray[np.float32], centroids_KD: NDArray[np.float32], rows_R: NDArray[np.intp]
) -> NDArray[np.intp]:
    """The nearest centroid of some rows by definition, [R]; K >= 2."""
    return _exact_best_two(features_ND, centroids_KD, rows_R)[:, 0]


def exact_nearest_elsewhere(
    features_ND: NDArray[np.float32],
    centroids_KD: NDArray[np.float32],
    rows_R: NDArray[np.intp],
    group_K: NDArray[np.int32],
    own_R: NDArray[np.int32],
) -> NDArray[np.intp]:
    """The nearest centroid of some rows by definition, of those in another group than the row's own, [R]; there are 2 groups."""
    return _exact_best_two(features_ND, centroids_KD, rows_R, (group_K, own_R))[:, 0]


def squared_distances(
    features_ND: NDArray[np.float32],
    centroids_KD: NDArray[np.float32],
    rows_P: NDArray[np.integer],
    columns_P: NDArray[np.integer],
) -> NDArray[np.float64]:
    """Squared distances of pairs by definition (see the module), float64 [P]: feature `rows_P`, centroid `columns_P`."""
    distances_P = np.empty(len(rows_P), np.float64)
    block = max(1, _BLOCK_ELEMENTS // features_ND.shape[1])
    for start in range(0, len(rows_P), block):
        pairs = slice(start, start + block)
        differences_PD = np.subtract(features_ND[rows_P[pairs]], centroids_KD[columns_P[pairs]], dtype=np.float64)
        distances_P[pairs] = sum_of_squares(differences_PD)
    return distances_P


def sum_of_squares(values_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row sums of squares, float64 [N], each row summed in the same order however many there are; destroys its input."""
    assert values_ND.dtype == np.float64 and values_ND.flags.c_contiguous  # else NumPy may add in another order
    np.square(values_ND, out=values_ND)
    return np.asarray(values_ND.sum(axis=1), dtype=np.float64)


def _exact_best_two(
    features_ND: NDArray[np.float32],
    centroids_KD: NDArray[np.float32],
    rows_R: NDArray[np.intp],
    barred: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None,
) -> NDArray[np.intp]:
    """The two nearest centroids of some rows by definition, [R, 2]; K >= 2.

    `barred` are the groups of the centroids, [K], and of the rows, [R], whose centroids do not count.
    """
    num_centroids, dim = centroids_KD.shape
    best_R2 = np.empty((len(rows_R), 2), np.intp)
    centroids64_KD = centroids_KD.astype(np.float64)
    centroid_norms_K = _norms(centroids64_KD)
    block = max(1, _RETRY_ELEMENTS // (num_centroids + dim))
    for start in range(0, len(rows_R), block):
        rows = rows_R[start : start + block]
        features64_RD = features_ND[rows].astype(np.float64)
        norms_R = _norms(features64_RD)
        near_RK = np.square(norms_R)[:, None] + np.square(centroid_norms_K) - 2.0 * (features64_RD @ centroids64_KD.T)
        if barred is not None:
            near_RK[barred[0] == barred[1][start : start + block, None]] = np.inf
        margin_R = 2.0 * _error_bound(norms_R, float(centroid_norms_K.max()), dim, 2.0**-53, 0.0)
        limit_R = np.partition(near_RK, 1, axis=1)[:, 1] + margin_R
        candidate_rows_P, candidates_P = np.nonzero((near_RK <= limit_R[:, None]) & (near_RK < np.inf))
        exact_RK = np.full_like(near_RK, np.inf)
        exact_RK[candidate_rows_P, candidates_P] = squared_distances(
            features_ND, centroids_KD, rows[candidate_rows_P], candidates_P
        )
        best_R2[start : start + block] = _two_smallest(exact_RK)
    return best_R2


def _two_smallest(values_RK: NDArray[np.float64]) -> NDArray[np.intp]:
    """Columns of the two smallest values of every row, lower column first among equals, [R, 2]; destroys its input."""
    first_R = values_RK.argmin(axis=1)
    values_RK[np.arange(len(values_RK)), first_R] = np.inf
    return np.stack([first_R, values_RK.argmin(axis=1)], axis=1)


def _error_bound(norms_N: NDArray[np.float64], largest: float, dim: int, unit: float, underflow: float) -> NDArray[np.float64]:
    """2 gamma(D + 2) (|x| + max |c|)^2 plus underflow, float64 [N]; the derivation stands above."""
    gamma = (dim + 2) * unit / (1.0 - (dim + 2) * unit)
    return 2.0 * gamma * np.square(norms_N + largest) + (dim + 2) * underflow


def _norms(values_ND: NDArray[np.float32] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Euclidean norms in the input's precision, as float64 [N]; infinite where a float32 square overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares_N: NDArray[np.float64] = np.einsum("nd,nd->n", values_ND, values_ND).astype(np.float64)
        return np.sqrt(squares_N)


def _checked(values: NDArray[np.float32]) -> NDArray[np.float32]:
    if values.dtype != np.float32 or values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"expected float32 [rows, dim >= 1], not {values.dtype} {list(values.shape)}")
    return np.ascontiguousarray(values)


def refuse_non_finite(features_ND: NDArray[np.float32], norms_N: NDArray[np.float64]) -> None:
    """Raise if a row holds NaN or infinity; a finite norm proves that it does not, so few rows are looked at.

    Raises:
        DataError: one does.
    """
    suspects = np.flatnonzero(~np.isfinite(norms_N))
    num_bad = int((~np.isfinite(features_ND[suspects]).all(axis=1)).sum())
    if num_bad:
        raise non_finite(num_bad, len(features_ND))


def non_finite(num_bad: int, num_rows: int) -> DataError:
    """What is said of features that hold NaN or infinity."""
    return DataError(
        f"{num_bad} of {num_rows} features hold NaN or infinity: the trunk diverged or overflows float16, "
        "so train it again with a lower learning rate or take another one"
    )
