"""What a pass of k-means does with a tile of rows on a device, in torch: search, measure, add.

Every function gives the CPU path's bits wherever it gives an answer. `search` decides by the margins of `neighbours.assignment`
and says -1 where its precision cannot tell. `measure` adds squares in NumPy's pairwise order, one operation a kernel, so that
no product and sum are fused into one rounding. `add_rows` adds integers. It runs on any device; the compiled form of the same
for NVIDIA GPUs is `device_kernel`.

Rejected: TF32 products, whose margin is 2^13 times as wide, so that most rows would be searched twice; a float64 product with
the one-hot assignment for the sums, exact only while the rows' magnitudes leave room in 53 bits, and as slow at 32 clusters.

Shape letters: T rows of a tile, D feature dim, K clusters.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from hardmoe.neighbours.assignment import LARGEST_NORM, UNDERFLOW, margin_terms

GRID_BITS = 32
"""Features are summed in steps of 2^-32, as in `exact_sums`."""
_UNITS = {torch.float32: 2.0**-24, torch.float64: 2.0**-51}
"""Of rounding; of float64 four times what it is, which decides as many rows and does not ask how a device adds."""
_OBJECTIVE_ROWS = 2**20


@dataclass(frozen=True, eq=False)
class DeviceCentroids:
    """The centroids as a device needs them.

    Attributes:
        host_KD: float32 [K, D], in host memory.
        by_precision: the same on the device in float32 and float64, [K, D], and their |c|^2, [K], rounded from float64.
        largest: the largest |c|.
    """

    host_KD: NDArray[np.float32]
    by_precision: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]]
    largest: float

    @classmethod
    def of(cls, centroids_KD: NDArray[np.float32], device: torch.device) -> Self:
        """Of finite centroids, float32 [K, D]."""
        if centroids_KD.dtype != np.float32 or not np.isfinite(centroids_KD).all():
            raise ValueError("centroids must be finite and float32")
        squares_K = np.square(centroids_KD, dtype=np.float64).sum(axis=1)
        double_KD = torch.tensor(centroids_KD, dtype=torch.float64, device=device)
        squares = torch.tensor(squares_K, device=device)
        both = {dtype: (double_KD.to(dtype), squares.to(dtype)) for dtype in (torch.float32, torch.float64)}
        return cls(centroids_KD, both, float(np.sqrt(squares_K.max())))


def search(features_TD: torch.Tensor, centroids: DeviceCentroids, dtype: torch.dtype, longest: float) -> torch.Tensor:
    """The nearest centroid of every row, int32 [T]; -1 where `dtype` cannot tell, or the row is not finite or too long.

    Args:
        features_TD: float16 or float32 [T, D].
        centroids: K of them.
        dtype: float32 or float64, in which products are computed.
        longest: rows of this norm or more are not decided.
    """
    rows_TD = features_TD.to(dtype)
    centroids_KD, squares_K = centroids.by_precision[dtype]
    norms_T = torch.linalg.vector_norm(rows_TD, dim=1).double()
    # One score's row in memory after the other: its minimum over the centroids is then read in stride.
    scores_KT = torch.addmm(squares_K[:, None], centroids_KD, rows_TD.T, alpha=-2)
    best_T, primary_T = scores_KT.min(dim=0)
    scores_KT.scatter_(0, primary_T[None], torch.inf)
    second_T = scores_KT.amin(dim=0)  # infinite where there is one centroid only
    factor, least = margin_terms(rows_TD.shape[1], _UNITS[dtype], UNDERFLOW if dtype == torch.float32 else 0.0)
    margins_T = (norms_T + centroids.largest).square_().mul_(factor).add_(least)
    certain_T = second_T.double() - best_T.double() > margins_T  # False, too, where a score is no number
    certain_T &= norms_T < longest
    if dtype == torch.float32:
        certain_T &= norms_T + centroids.largest <= LARGEST_NORM
    return torch.where(certain_T, primary_T, -1).int()


def measure(features_TD: torch.Tensor, centroids: DeviceCentroids, primary_T: torch.Tensor) -> torch.Tensor:
    """Squared distance of every row to its centroid as `neighbours.assignment` defines it, float64 [T]; 0 without a centroid."""
    centroids_KD, _ = centroids.by_precision[torch.float64]
    differences_TD = features_TD.double() - centroids_KD[primary_T.clamp(min=0).long()]
    squared_T = _pairwise_sum(differences_TD.square_(), 0, differences_TD.shape[1])
    return torch.where(primary_T >= 0, squared_T, 0.0)


def add_rows(features_TD: torch.Tensor, primary_T: torch.Tensor, units_XD: torch.Tensor, counts_X: torch.Tensor) -> None:
    """Add rows in steps of the grid to their cluster's; those without one (-1) to the row after the last cluster's.

    Args:
        features_TD: float16 or float32 [T, D], norms times T below 2^30.
        primary_T: int32 [T].
        units_XD: int64 [K + 1, D].
        counts_X: int64 [K + 1].
    """
    places_T = torch.where(primary_T >= 0, primary_T, len(counts_X) - 1).long()
    units_TD = features_TD.double().mul_(2.0**GRID_BITS).round_().long()  # halves to even, as `numpy.rint`
    units_XD.index_add_(0, places_T, units_TD)
    counts_X.index_add_(0, places_T, torch.ones_like(places_T))


def objective_parts(squared_N: torch.Tensor) -> torch.Tensor:
    """Sums of the distances, each rounded to a multiple of 2^-40, as integers [blocks, 3]: of 2^32, of 1, of 2^-40."""
    parts = []
    for squared_T in torch.split(squared_N, _OBJECTIVE_ROWS):
        whole_T = squared_T.floor()
        top_T = (whole_T * 2.0**-32).floor_()
        fraction_T = (squared_T - whole_T).mul_(2.0**40).round_()
        parts.append(torch.stack([each.long().sum() for each in (top_T, whole_T - top_T * 2.0**32, fraction_T)]))
    return torch.stack(parts) if parts else torch.zeros((0, 3), dtype=torch.int64, device=squared_N.device)


def objective_units(parts: torch.Tensor) -> int:
    """What `objective_parts` amount to, in units of 2^-40."""
    top, whole, fraction = (sum(column) for column in zip(*parts.tolist(), strict=True)) if len(parts) else (0, 0, 0)
    return (top << 72) + (whole << 40) + fraction


def _pairwise_sum(values_TD: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Row sums, float64 [T], in the order in which NumPy adds a contiguous row: in eight lanes, and by halves past 128."""
    if count > 128:
        half = count // 2
        half -= half % 8
        return _pairwise_sum(values_TD, start, half) + _pairwise_sum(values_TD, start + half, count - half)
    rest = count % 8
    if count < 8:
        total_T = values_TD.new_zeros(len(values_TD))
    else:
        lanes_T8 = values_TD[:, start : start + 8].clone()
        for place in range(start + 8, start + count - rest, 8):
            lanes_T8 += values_TD[:, place : place + 8]
        pairs_T4 = lanes_T8[:, 0::2] + lanes_T8[:, 1::2]
        fours_T2 = pairs_T4[:, 0::2] + pairs_T4[:, 1::2]
        total_T = fours_T2[:, 0] + fours_T2[:, 1]
    for place in range(start + count - rest, start + count):
        total_T = total_T + values_TD[:, place]
    return total_T
