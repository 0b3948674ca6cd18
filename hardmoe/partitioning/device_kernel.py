"""A whole pass over rows in one Triton kernel: one read of the features, where `device_tiles` reads and writes them ten times.

For NVIDIA GPUs, widths that are powers of two up to 256, and up to 8,192 numbers in the centroids; `device_tiles` does the rest,
and is the reference. A program takes 2,048 rows, block by block:

search    Products on tensor cores: a centroid is two float16, scaled by a power of two (22 bits of its 24), a float32 feature
          likewise, and float16 features are what they are. Tensor cores cut what they add and align it to the largest term, so
          the margin is that of arithmetic with 2^-22 for float32's 2^-24: more rows are searched again, in float64.
measure   The squared distance of `device_tiles.measure`, lane by lane in float64; rows are in the first cache then. Compiled
          without fusing products and sums, which would round once where the definition rounds twice.
add       Rows as integers, in three digits of 2^-2, 2^-13 and 2^-24 (for float32 a fourth, of 2^-32), each at most 2^11 and so
          exact in float16, times the one-hot assignment on tensor cores: sums of 2,048 such digits stay below 2^23, where
          float32 adds them exactly in any order. Then they are added to the cluster's int64, atomically.

Rejected: atomic additions of every feature (five times as long as reading them); int8 digits, which take as many shifts and masks
in 64 bits as all else together; TF32, half as fast for the same bits.

Shape letters: N rows, D feature dim, K clusters, X clusters padded to a power of two, B rows of a block, P programs, G groups.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call"

import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

from hardmoe.neighbours.assignment import margin_terms
from hardmoe.partitioning.device_tiles import GRID_BITS, DeviceCentroids, add_rows, measure

logger = logging.getLogger(__name__)

_DIMS = (16, 32, 64, 128, 256)
_MOST_ELEMENTS = 8192
_LEAST_LARGEST, _MOST_LARGEST = 2.0**-40, 2.0**20
_LONGEST = 512.0
_PROGRAM_ROWS = 2048
_SHAPE = [64, 8]
"""Rows of a block, warps of a program: by ptxas, 4 warps spill three times as many registers (sm_90, 128 x 32)."""
_GROUP = 1024
"""Programs that share a table of sums: 2^21 rows of norms below 2^9, in steps of 2^-32, stay below 2^62."""
_UNIT = 2.0**-22
_SCALE_BITS = 6
"""A float32 feature below 512, times 2^6, is in the range of float16."""


@dataclass(frozen=True)
class KernelPass:
    """What the kernel made of rows.

    Attributes:
        primary_N: int32; -1 where another search must decide.
        squared_N: float64; 0 there.
        high_KD: integer part of the feature sums, int64.
        low_KD: the rest in units of 2^-32, int64, not brought into its range.
        counts_K: int64.
        objective: as of `device_tiles.objective_parts`.
    """

    primary_N: torch.Tensor
    squared_N: torch.Tensor
    high_KD: torch.Tensor
    low_KD: torch.Tensor
    counts_K: torch.Tensor
    objective: torch.Tensor


def suits(centroids: DeviceCentroids) -> bool:
    """Whether the kernel is made for centroids of this size and magnitude."""
    num_clusters, dim = centroids.host_KD.shape
    fits = dim in _DIMS and dim * _padded(num_clusters) <= _MOST_ELEMENTS
    return fits and _LEAST_LARGEST <= centroids.largest <= _MOST_LARGEST


@lru_cache
def works(device: torch.device, num_clusters: int, dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernel for this size can be compiled and run here, and measures and adds as `device_tiles` does; warns if not.

    Triton needs a C compiler, and may be of a version that was not tested.
    """
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if not (device.type == "cuda" or interprets) or find_spec("triton") is None:
        return False
    generator = torch.Generator().manual_seed(0)
    features_ND = torch.randn((100, dim), generator=generator).to(device, dtype)
    centroids = DeviceCentroids.of(torch.randn((num_clusters, dim), generator=generator).numpy(), device)
    try:
        found = Kernel(centroids).run(features_ND)
        expected_N = measure(features_ND, centroids, found.primary_N)
        units_XD = torch.zeros((num_clusters + 1, dim), dtype=torch.int64, device=device)
        add_rows(features_ND, found.primary_N, units_XD, units_XD.new_zeros(num_clusters + 1))
        same = bool(torch.equal(found.squared_N, expected_N))
        same &= bool(torch.equal((found.high_KD << GRID_BITS) + found.low_KD, units_XD[:-1]))
        problem = "" if same else "its bits are not the definition's"
    except Exception as error:  # noqa: BLE001 - whatever a compiler or a driver may raise
        problem = f"{type(error).__name__}: {error}"
    if problem:
        logger.warning("k-means does without its Triton kernel on %s (%s): passes are slower", device, problem)
    return not problem


class Kernel:
    """The kernel with a pass's centroids."""

    def __init__(self, centroids: DeviceCentroids) -> None:
        """Of centroids that it `suits`."""
        double_KD, squares_K = centroids.by_precision[torch.float64]
        num_clusters, dim = double_KD.shape
        self._num_clusters, self._dim, self._padded = num_clusters, dim, _padded(num_clusters)
        self._double_KD, self._largest = double_KD, centroids.largest
        # The largest coordinate in [2^13, 2^14): its low half is far from where float16 loses bits.
        self._shift = 14 - int(torch.frexp(double_KD.abs().max()).exponent)
        scaled_DX = double_KD.new_zeros((dim, self._padded))
        scaled_DX[:, :num_clusters] = double_KD.T * 2.0**self._shift
        self._high_DX = scaled_DX.half()
        self._low_DX = (scaled_DX - self._high_DX.double()).half()
        self._squares_X = torch.full((self._padded,), torch.inf, device=double_KD.device)
        self._squares_X[:num_clusters] = squares_K.float()

    def run(self, features_ND: torch.Tensor) -> KernelPass:
        """Over float16 or float32 features, [N, D], contiguous."""
        num_rows, device = len(features_ND), features_ND.device
        wide = features_ND.dtype == torch.float32
        programs = -(-num_rows // _PROGRAM_ROWS)
        groups = -(-programs // _GROUP)
        primary_N = torch.empty(num_rows, dtype=torch.int32, device=device)
        squared_N = torch.empty(num_rows, dtype=torch.float64, device=device)
        units_GDX = torch.zeros((groups, self._dim, self._padded), dtype=torch.int64, device=device)
        counts_X = torch.zeros(self._padded, dtype=torch.int64, device=device)
        objective_P2 = torch.zeros((groups * _GROUP, 2), dtype=torch.int64, device=device)
        if programs:
            tables = (self._high_DX, self._low_DX, self._squares_X, self._double_KD.contiguous())
            found = (primary_N, squared_N, units_GDX, counts_X, objective_P2)
            numbers = (num_rows, 2.0 ** (1 - self._shift - _SCALE_BITS * wide), self._largest, *self._margin(wide), _LONGEST)
            _launch(programs, (features_ND.contiguous(), *tables, *found, *numbers), self._dim, self._padded, wide)
        high_KD, low_KD = (
            each.sum(0).T[: self._num_clusters] for each in (units_GDX >> GRID_BITS, units_GDX & (2**GRID_BITS - 1))
        )
        objective_G2 = objective_P2.view(groups, _GROUP, 2).sum(1)  # 2^21 fractions of at most 2^40 steps
        objective = torch.nn.functional.pad(objective_G2, (1, 0))
        return KernelPass(primary_N, squared_N, high_KD, low_KD, counts_X[: self._num_clusters], objective)

    def _margin(self, wide: bool) -> tuple[float, float]:
        """Factor and constant; a hundredth more, as the kernel computes the margin in float32.

        Eight dimensions more hold what splitting into halves loses: 2^-22 of a product each for the centroid, the feature and
        the product of their low halves. What a float32 feature's low half loses at the bottom of float16's range, 2^-25 / 2^6
        in every dimension, is no share of it and stands in the constant.
        """
        factor, least = margin_terms(self._dim + 8, _UNIT)
        return 1.01 * factor, 1.01 * (least + wide * 8.0 * self._dim**0.5 * 2.0 ** (-25 - _SCALE_BITS) * self._largest)


def _launch(programs: int, arguments: tuple[Any, ...], dim: int, padded: int, wide: bool) -> None:
    from hardmoe.partitioning.device_triton import pass_over_rows

    block, num_warps = _SHAPE
    sizes = {"D": dim, "X": padded, "B": block, "BLOCKS": _PROGRAM_ROWS // block, "GROUP": _GROUP, "WIDE": wide}
    pass_over_rows[(programs,)](*arguments, **sizes, num_warps=num_warps, enable_fp_fusion=False)


def _padded(num_clusters: int) -> int:
    """A power of two, of at least the 16 columns of a tensor core's product."""
    return max(16, 1 << (num_clusters - 1).bit_length())
