"""Lloyd's k-means whose result does not depend on how the data are sharded, batched or ordered.

    scan_batch(...) + scan_batch(...) + ...   per pass: every batch gives a `PassSums`, and they add up exactly
    update(pass_sums, centroids)              means in float64 from exact sums; empty clusters start anew
    refine(centroids)                         the loop, a generator: it asks for passes, whoever drives it scans the rows

Where it starts is the matter of `starting`; `in_memory` does all of it for features in memory. Three things make it
order-free: the assignment is exact (`neighbours.assignment`), the sums are integers (`exact_sums`), and chance is a hash of
the seed, the step and the example id. Centroids keep the order in which they were seeded: number k is the k-th point drawn,
moved by the passes; sorting them afterwards by size or coordinate would let a small change of the data renumber every expert.
With unit features the centroids are plain means, unless k-means is asked to be spherical: then every mean is scaled back to
length 1, and a part is those rows whose angle with its centroid is smallest. The router measures Euclidean distance either
way, which among centroids of one length ranks as the cosine does, and the descent is as monotone: of all points of the sphere
the scaled mean is the one with the smallest sum of squared distances to its rows.

Rejected: `faiss.Kmeans` and `sklearn.cluster.KMeans` (float32 counts; everything in memory; the result depends on the
order of the rows), and mini-batch k-means (the result depends on the order of the batches by construction).

Shape letters: N examples, D feature dim, K clusters.
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from hardmoe.neighbours.assignment import sum_of_squares
from hardmoe.neighbours.engine import Engine, choose_engine, device_of
from hardmoe.partitioning.exact_sums import ClusterSums, FarthestPoints
from hardmoe.partitioning.scan import scan

if TYPE_CHECKING:
    from hardmoe.partitioning.device_features import Piece

_MOST_RESEEDS = 64  # farthest points a batch reports: what a pass can repair; any further empty cluster waits for the next


@dataclass(frozen=True, eq=False)
class PassSums:
    """What a pass over some rows found; `+` joins disjoint sets of rows, in any order.

    Attributes:
        sums: counts, feature sums and objective.
        farthest: where empty clusters may start anew.
    """

    sums: ClusterSums
    farthest: FarthestPoints

    @classmethod
    def zero(cls, num_clusters: int, dim: int) -> Self:
        """What a pass over no rows finds."""
        return cls(ClusterSums.zero(num_clusters, dim), FarthestPoints.none(dim, min(num_clusters, _MOST_RESEEDS)))

    def __add__(self, other: "PassSums") -> "PassSums":
        return PassSums(self.sums + other.sums, self.farthest + other.farthest)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as arrays, for a file without pickle."""
        return {**self.sums.to_arrays(), **self.farthest.to_arrays()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The inverse of `to_arrays`."""
        return cls(ClusterSums.from_arrays(arrays), FarthestPoints.from_arrays(arrays))


Mapper = Callable[[Callable[[int], PassSums], Iterable[int]], Iterable[PassSums]]
"""`map`, or that of a pool of threads."""


@dataclass(frozen=True)
class Updated:
    """The centroids after a pass.

    Attributes:
        centroids_KD: float32 [K, D].
        empty: clusters that had no rows.
        reseeded: those of them that now start at a farthest point; the others keep their centroid until the next pass.
    """

    centroids_KD: NDArray[np.float32]
    empty: list[int]
    reseeded: list[int]


@dataclass(frozen=True)
class KMeansFit:
    """The outcome of k-means.

    Attributes:
        centroids_KD: float32 [K, D], in the order of seeding.
        objective_per_pass: sum of squared distances to the centroids each pass started from.
        reseeded: (pass, cluster) of every empty cluster that was started anew, passes counted from 0.
        converged: False if the passes ran out first.
        counts_K: rows of every cluster in the last pass, int64 [K].
    """

    centroids_KD: NDArray[np.float32]
    objective_per_pass: list[float]
    reseeded: list[tuple[int, int]]
    converged: bool
    counts_K: NDArray[np.int64]


def scan_batch(
    features_ND: NDArray[np.float32], ids_N16: NDArray[np.uint8], centroids_KD: NDArray[np.float32], engine: Engine
) -> PassSums:
    """One batch's share of a pass.

    Args:
        features_ND: float32 [N, D], after the router's transform.
        ids_N16: example ids of these rows, uint8 [N, 16].
        centroids_KD: float32 [K, D].
        engine: does the fast part of the search.

    Raises:
        DataError: a feature is NaN, infinite or too large to be summed exactly.
    """
    num_clusters = len(centroids_KD)
    assignment, sums = scan(features_ND, centroids_KD, engine)
    return PassSums(sums, FarthestPoints.from_batch(features_ND, ids_N16, assignment, min(num_clusters, _MOST_RESEEDS)))


def scan_batches(
    batches: Iterable[tuple[NDArray[np.float32], NDArray[np.uint8]]], centroids_KD: NDArray[np.float32], engine: Engine
) -> PassSums:
    """A pass over batches that come one after the other, such as a shard's: features and ids, as of `scan_batch`."""
    if (device := device_of(engine)) is None:
        found = (scan_batch(features_ND, ids_N16, centroids_KD, engine) for features_ND, ids_N16 in batches)
        return sum(found, start=PassSums.zero(*centroids_KD.shape))
    import torch

    from hardmoe.partitioning.device_features import as_tensor, staged

    pieces = staged(((as_tensor(features_ND), ids_N16) for features_ND, ids_N16 in batches), torch.device(device))
    return _scan_pieces(pieces, centroids_KD, device)


def update(found: PassSums, centroids_KD: NDArray[np.float32], spherical: bool = False) -> Updated:
    """Move every centroid to the mean of its rows, and empty clusters to the rows farthest from their centroids.

    The mean is the exact sum rounded to float64, divided, and rounded to float32. The k-th empty cluster, by number, takes
    the k-th farthest distinct point, by (distance, id).

    Args:
        found: in a pass over all rows.
        centroids_KD: those it went by, float32 [K, D].
        spherical: scale every mean to length 1 before it is rounded to float32, its length summed in float64 in the order of
            `sum_of_squares`. A mean of length 0 has no direction, so its cluster keeps its centroid; nor has a row that is
            zero, where no cluster starts anew.
    """
    counts_K = found.sums.counts_K
    occupied_K = counts_K > 0
    means_KD = found.sums.totals_KD[occupied_K] / counts_K[occupied_K, None]
    points_MD = found.farthest.features_MD
    moved_KD = centroids_KD.copy()
    if spherical:
        lengths_K = np.sqrt(sum_of_squares(means_KD.copy()))[:, None]
        means_KD = np.divide(means_KD, lengths_K, where=lengths_K > 0.0, out=centroids_KD[occupied_K].astype(np.float64))
        points_MD = points_MD[points_MD.any(axis=1)]
    moved_KD[occupied_K] = means_KD.astype(np.float32)
    empty = np.flatnonzero(~occupied_K)
    reseeded = empty[: len(points_MD)]
    moved_KD[reseeded] = points_MD[: len(reseeded)]
    return Updated(moved_KD, empty.tolist(), reseeded.tolist())


def has_converged(previous_objective: float | None, objective: float, tolerance: float) -> bool:
    """Whether a pass lowered the objective by no more than `tolerance` times it; False for the first pass (None)."""
    return previous_objective is not None and previous_objective - objective <= tolerance * previous_objective


def refine(
    centroids_KD: NDArray[np.float32], max_passes: int, tolerance: float, spherical: bool = False
) -> Generator[tuple[int, NDArray[np.float32]], PassSums, KMeansFit]:
    """Lloyd's passes until they converge, as a generator, so that a pass may be a loop here or a phase of a cluster.

    It yields a pass's number and its centroids, float32 [K, D], expects to be sent the sums over all rows, and returns the
    fit. Sending the stored sums of passes that finished brings a killed fit back to where it was, bit for bit.

    Args:
        centroids_KD: where to start, float32 [K, D].
        max_passes: at most this many passes.
        tolerance: see `has_converged`. A pass that started a cluster anew never counts as converged.
        spherical: see `update`; the centroids to start from must have length 1 then.
    """
    objectives: list[float] = []
    reseeded: list[tuple[int, int]] = []
    for number in range(max_passes):
        found = yield number, centroids_KD
        updated = update(found, centroids_KD, spherical)
        centroids_KD = updated.centroids_KD
        previous = objectives[-1] if objectives else None
        objectives.append(found.sums.objective)
        reseeded += [(number, cluster) for cluster in updated.reseeded]
        if has_converged(previous, objectives[-1], tolerance) and not updated.reseeded:
            return KMeansFit(centroids_KD, objectives, reseeded, True, found.sums.counts_K)
    return KMeansFit(centroids_KD, objectives, reseeded, False, found.sums.counts_K)


def refine_with(
    scan: Callable[[NDArray[np.float32]], PassSums],
    centroids_KD: NDArray[np.float32],
    max_passes: int,
    tolerance: float,
    spherical: bool = False,
) -> KMeansFit:
    """Drive `refine` with a function that scans all rows against the centroids it is given."""
    refining = refine(centroids_KD, max_passes, tolerance, spherical)
    try:
        _, centroids_KD = next(refining)
        while True:
            _, centroids_KD = refining.send(scan(centroids_KD))
    except StopIteration as stop:
        found: KMeansFit = stop.value
        return found


def scan_in_memory(
    features_ND: NDArray[np.float32],
    ids_N16: NDArray[np.uint8],
    batch_size: int,
    run: Mapper,
) -> Callable[[NDArray[np.float32]], PassSums]:
    """A pass over features in memory, for `refine_with`; `run` is `map` or a pool's.

    Where there is a GPU the features are put there, once for all passes if they fit, and batches are what suits it.
    """
    engine = choose_engine()
    if (device := device_of(engine)) is not None:
        import torch

        from hardmoe.partitioning.device_features import place

        placed = place(features_ND, ids_N16, torch.device(device))
        return lambda centroids_KD: _scan_pieces(placed.pieces(), centroids_KD, device)

    def scan_all(centroids_KD: NDArray[np.float32]) -> PassSums:
        def scan_from(start: int) -> PassSums:
            rows = slice(start, start + batch_size)
            return scan_batch(features_ND[rows], ids_N16[rows], centroids_KD, engine)

        starts = range(0, len(features_ND), batch_size)
        return sum(run(scan_from, starts), start=PassSums.zero(*centroids_KD.shape))

    return scan_all


def _scan_pieces(pieces: "Iterable[Piece]", centroids_KD: NDArray[np.float32], device: str) -> PassSums:
    """A pass over features on a device."""
    import torch

    from hardmoe.partitioning.device_features import scan_pieces

    return PassSums(*scan_pieces(pieces, centroids_KD, torch.device(device), min(len(centroids_KD), _MOST_RESEEDS)))
