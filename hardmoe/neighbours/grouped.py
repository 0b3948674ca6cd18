"""The exact assignment where several centroids stand for one group: nearest group, second group, distance to any group.

Definition. A row is as far from a group as from the nearest of its centroids, by the distance of `assignment`. The primary
group has the nearest centroid of all; the second has the nearest of those that belong to another group; equal distances go to
the lower centroid. Everything is asked of `assign`, so the answer depends on neither the engine nor the batch.

The nearest two of all centroids settle a row between two groups. Of the others, deep inside a group, the second group is asked
for again among the centroids that are not of theirs. Rejected: asking the engine for more neighbours until one is of another
group, of which there may be as many as the largest group has centroids, each with an error of its own.

Shape letters: N examples, D feature dim, F centroids, P pairs of a row and a group, R rows asked again.
"""

import numpy as np
from numpy.typing import NDArray

from hardmoe.neighbours.assignment import Assignment, assign
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
    inside_N = primary_N == second_N  # also where there is a single centroid, whose second, -1, is itself
    for group in np.unique(primary_N[inside_N]).tolist():
        rows_R, others = np.flatnonzero(inside_N & (primary_N == group)), np.flatnonzero(group_F != group)
        if len(others):
            second_N[rows_R] = group_F[others[assign(features_ND[rows_R], centroids_FD[others], engine).primary_N]]
        else:
            second_N[rows_R] = -1
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
