"""Neighbours in a system's space: the share of the nearest images that have a hashtag in common with the image asked about.

Three sets of neighbours are looked at: of all test images, of those of the image's own part, and of those of other parts. The
last says whether a space is *one* space: experts whose features mean different things find nothing across their borders. Images
of other parts resemble an image less to begin with, so what counts is the same number in the space of one dense network, divided
by the same parts.

Nearest is by cosine, of float32 vectors, exhaustively; of equal ones the lower id. Hits are integers per image and weighed by the
bootstrap's own weights, so two systems' numbers are paired.

Shape letters: N images, D dims, k neighbours, T hashtags of an image, R = 1 + B rows (the point estimate first).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hardmoe.config import Json
from hardmoe.data.ids import order_of_distinct
from hardmoe.data.ragged import take_rows
from hardmoe.data.reading import Labels
from hardmoe.evaluation.bootstrap import interval_result, null_result, paired_result, poisson_weights

NEIGHBOURS = 10
AMONG = ("all", "own", "other")
"""All images, those of the image's own part, those of other parts."""
_CHUNK_SIMILARITIES = 2**24


@dataclass(frozen=True)
class Points:
    """Images in a system's space, ids in ascending order."""

    ids_N16: NDArray[np.uint8]
    vectors_ND: NDArray[np.float32]
    experts_N: NDArray[np.int64]
    """The parts by which own and other are told apart: the mixture's, for every system."""
    labels: Labels

    @classmethod
    def of(
        cls,
        ids_N16: NDArray[np.uint8],
        vectors_ND: NDArray[np.float32],
        experts_N: NDArray[np.int64],
        labels: Labels,
    ) -> "Points":
        """Labelled images in any order; those without a label are left out, and vectors are scaled to length 1."""
        labelled_N = np.flatnonzero(np.diff(labels.offsets) > 0)
        kept_N = labelled_N[order_of_distinct(ids_N16[labelled_N])]
        kept_labels = Labels(*take_rows(labels.indices_L, labels.offsets, kept_N))
        return cls(ids_N16[kept_N], unit_vectors(vectors_ND[kept_N]), experts_N[kept_N], kept_labels)


def unit_vectors(vectors_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every row at length 1, float32 [N, D]; a zero row stays zero."""
    lengths_N1 = np.linalg.norm(vectors_ND.astype(np.float64), axis=1, keepdims=True)
    scaled_ND: NDArray[np.float32] = (vectors_ND / np.where(lengths_N1 > 0, lengths_N1, 1.0)).astype(np.float32)
    return scaled_ND


def neighbour_hits(points: Points) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Of every image, its neighbours that share a hashtag with it and all its neighbours (fewer than 10 where there are no more).

    Returns:
        By `AMONG`: hits int64 [N] and neighbours int64 [N].
    """
    count = len(points.ids_N16)
    tags = [frozenset(row.tolist()) for row in np.split(points.labels.indices_L, points.labels.offsets[1:-1])]
    found = {among: (np.zeros(count, np.int64), np.zeros(count, np.int64)) for among in AMONG}
    chunk = max(1, _CHUNK_SIMILARITIES // max(1, count))
    for start in range(0, count, chunk):
        rows_n = np.arange(start, min(start + chunk, count))
        similarity_nN = points.vectors_ND[rows_n] @ points.vectors_ND.T
        similarity_nN[np.arange(len(rows_n)), rows_n] = -np.inf
        same_nN = points.experts_N[rows_n, None] == points.experts_N
        for among, barred_nN in (("all", None), ("own", ~same_nN), ("other", same_nN)):
            allowed_nN = similarity_nN if barred_nN is None else np.where(barred_nN, -np.inf, similarity_nN)
            hits_N, totals_N = found[among]
            for row, nearest in zip(rows_n.tolist(), nearest_columns(allowed_nN, NEIGHBOURS), strict=True):
                totals_N[row] = len(nearest)
                hits_N[row] = sum(not tags[row].isdisjoint(tags[other]) for other in nearest)
    return found


def nearest_columns(similarity_nN: NDArray[np.float32], wanted: int) -> list[list[int]]:
    """The columns of the largest values of every row, at most so many, the lower column of equal ones; -inf never counts.

    Args:
        similarity_nN: float32 [n, N], of at least one column.
        wanted: how many, at least 1.
    """
    count = similarity_nN.shape[1]
    wanted = min(wanted, count)
    edge_n1 = np.partition(similarity_nN, count - wanted, axis=1)[:, count - wanted, None]
    found = []
    for values_N, at_least_N in zip(similarity_nN, similarity_nN >= edge_n1, strict=True):
        columns = np.flatnonzero(at_least_N & (values_N > -np.inf))
        found.append(columns[np.argsort(-values_N[columns], kind="stable")][:wanted].tolist())
    return found


def replicated_shares(points: Points, num_replicates: int, seed: int) -> dict[str, list[float] | None]:
    """The share of right neighbours in every row of the bootstrap, [R] by `AMONG`; None where no image has such a neighbour."""
    weights_RN = np.ones((1 + num_replicates, len(points.ids_N16)))
    weights_RN[1:] = poisson_weights(points.ids_N16, num_replicates, seed)
    shares: dict[str, list[float] | None] = {}
    for among, (hits_N, totals_N) in neighbour_hits(points).items():
        totals_R = weights_RN @ totals_N
        # A replicate of nothing but images without such neighbours says as little as the others' mean.
        shares[among] = (weights_RN @ hits_N / np.maximum(totals_R, 1)).tolist() if totals_N.any() else None
    return shares


def share_results(shares: Json, compared: Json | None) -> dict[str, Json]:
    """A system's shares with intervals, and those of another one minus them, from what `replicated_shares` gave of both."""
    results = {}
    for among in AMONG:
        name = f"neighbours@{NEIGHBOURS}:{among}"
        if shares[among] is None or (compared is not None and compared[among] is None):
            results[name] = null_result("no test image has such neighbours")
        elif compared is None:
            results[name] = interval_result(np.array(shares[among]))
        else:
            results[name] = paired_result(np.array(compared[among]), np.array(shares[among]))
    return results
