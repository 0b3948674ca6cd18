"""The exact assignment where several centroids stand for one group: nearest group, second group, distance to any group.

Definition. A row is as far from a group as from the nearest of its centroids, by the distance of `assignment`. The primary
group has the nearest centroid of all; the second has the nearest of those that belong to another group; equal distances go to
the lower centroid. The answer depends on neither the engine nor the batch.

The nearest two of all centroids, by `assign`, settle a row between two groups. For the others, deep inside a group, all
centroids are ranked again in float64 without those of that group, as `assign` does with what float32 cannot decide: where all
rows are such, the whole takes three times as long as `assign` (2,048 centroids of 512 dimensions, 65,536 rows: 5.6 s, not 1.9).
Rejected: asking the engine once more for every group, among the centroids of the others (16 s there, and a hundred times as
long as `assign` for 512 groups, whose batches are small), and asking it for more neighbours until one is of another group, before
which there may be as many as the largest group has centroids.

Shape letters: N examples, D feature dim, F centroids, P pairs of a row and a group, R rows inside a group.
"""

import numpy as np
from numpy.typing import NDArray

from hardmoe.neighbours.assignment import Assignment, assign, exact_nearest_elsewhere
from hardmoe.neighbours.engine import Engine


def assign_groups(
    features_ND: NDArray[np.float32], centroids_FD: NDArray[np.float32], group_F: NDArray[np.int32], engine: Engine
) -> Assignment:
    """Assign every row to the group of its nearest centroid, exactly.

    Args:
        features_ND: float32 [N, D]; N may be 0.
        centroids_FD: float32 [F, D], finite, F >= 1.
        group_F: the group of every centroid, int32 [F].
        engine: does the fast ranking; the answer does not depend on it.

    Returns:
        The assignment, in groups; `squared_distance_N` is to the nearest centroid. `second_N` is -1 where there is one group.

    Raises:
        DataError: a feature is NaN or infinite.
    """
    nearest = assign(features_ND, centroids_FD, engine)
    primary_N, second_N = group_F[nearest.primary_N], group_F[nearest.second_N]
    inside_R = np.flatnonzero(primary_N == second_N)  # also where there is a single centroid, whose second, -1, is itself
    if (group_F == group_F[0]).all():
        second_N[:] = -1
    elif len(inside_R):
        features_ND, centroids_FD = np.ascontiguousarray(features_ND), np.ascontiguousarray(centroids_FD)
        nearest_R = exact_nearest_elsewhere(features_ND, centroids_FD, inside_R, group_F, primary_N[inside_R])
        second_N[inside_R] = group_F[nearest_R]
    return Assignment(primary_N, second_N, nearest.squared_distance_N)


def squared_distances_to_groups(
    features_ND: NDArray[np.float32],
    centroids_FD: NDArray[np.float32],
    group_F: NDArray[np.int32],
    pairs: tuple[NDArray[np.integer], NDArray[np.integer]],
    engine: Engine,
) -> NDArray[np.float64]:
    """Squared distances of pairs (row [P], group [P]) to the nearest centroid of the group, float64 [P].

    Raises:
        DataError: a feature is NaN or infinite.
    """
    rows_P, groups_P = pairs
    distances_P = np.empty(len(rows_P), np.float64)
    for group in np.unique(groups_P).tolist():
        here_P = groups_P == group
        distances_P[here_P] = assign(features_ND[rows_P[here_P]], centroids_FD[group_F == group], engine).squared_distance_N
    return distances_P
