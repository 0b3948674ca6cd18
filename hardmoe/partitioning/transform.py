"""What is done to a feature before distances are measured: nothing, unit length, or principal directions and unit length.

Every row is computed by itself: a row alone and the same row among thousands give the same bits. That is easy for the length,
which is summed in one stated order, and not for a projection, which wants a matrix product. So the directions are rounded to
multiples of 2^-24 (float32 holds them exactly) and a feature is split into high and low bits (`moments.split_steps`). By
Cauchy and Schwarz no partial sum of a direction times the high or low parts, in whatever order and of whichever terms, exceeds
|w| |x|: (2^24 + 2^6) * 2^20 * 2^6.5 < 2^51 for 2^13 features up to 2^16, so both products are exact in float64, and
high * 2^20 + low rounds the true value once. Of a row no longer than 31 the product needs no split, for |w| |x| is below 2^53
as it is: the same bits for half the work. The mean's own projection is subtracted from it, and the difference scaled, both in
float64.

On one thread of an EPYC a row of 256 features takes 0.6 us to unit length, 1.5 us on 64 principal directions, and 2.8 us where
rows are longer than 31. Rejected: a plain float64 product (1.3 us, but BLAS adds in an order that depends on the batch's
shape), `np.einsum` (5.4 us), and directions in float64, which are no truer than the eigenvectors of rounded features
and which no two machines' LAPACK give alike to the last bit.

Shape letters: N examples, D feature dim, P principal directions, B rows of a block.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, cast, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import numpy as safetensors_numpy

from hardmoe.neighbours.assignment import sum_of_squares
from hardmoe.partitioning.moments import GRID_BITS, LARGEST, SPLIT_BITS, WIDEST, split_steps, to_steps, too_large

TransformKind = Literal["none", "l2", "pca", "whiten"]
PROJECTIONS = ("pca", "whiten")
"""Kinds that know principal directions."""

_BLOCK_ELEMENTS = 2**16  # float64 values of a block: 512 kB stays in one core's cache
_UNSPLIT_LENGTH = 31.0  # times the length of a direction, 1 + 2^-18 at most, it is below 2^(53 - 48)


@dataclass(frozen=True, eq=False)
class Projection:
    """Features seen from their mean along principal directions.

    Attributes:
        directions_PD: of length 1 but for the rounding to multiples of 2^-24, most variance first, float32 [P, D].
        offset_P: the projection of the mean, float64 [P].
        scale_P: what the differences from it are multiplied by, float64 [P].
    """

    directions_PD: NDArray[np.float32]
    offset_P: NDArray[np.float64]
    scale_P: NDArray[np.float64]

    def __post_init__(self) -> None:
        directions_PD, shape = self.directions_PD, self.directions_PD.shape
        if directions_PD.dtype != np.float32 or len(shape) != 2 or not 1 <= shape[0] <= shape[1] <= WIDEST:
            raise ValueError(f"directions must be float32 [P, D], P <= D, not {directions_PD.dtype} {list(shape)}")
        for name, array_P in (("offset", self.offset_P), ("scale", self.scale_P)):
            if array_P.dtype != np.float64 or array_P.shape != shape[:1] or not np.isfinite(array_P).all():
                raise ValueError(
                    f"{name} must be {shape[0]} finite numbers in float64, not {array_P.dtype} {list(array_P.shape)}"
                )
        lengths_P = np.sqrt(sum_of_squares(directions_PD.astype(np.float64)))
        if not (np.abs(lengths_P - 1.0) < 2.0**-16).all() or (self._steps_DP != np.rint(self._steps_DP)).any():
            raise ValueError("directions must have length 1 and be multiples of 2^-24")

    @property
    def dim(self) -> int:
        """D, the width of the features."""
        return int(self.directions_PD.shape[1])

    def __call__(self, features_BD: NDArray[np.float32]) -> NDArray[np.float64]:
        """Project rows, float32 [B, D], to float64 [B, P]; not finite where a feature is not.

        Raises:
            DataError: a feature is finite and beyond `moments.LARGEST`.
        """
        steps_BD = to_steps(features_BD)
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity end as NaN, in their own rows
            longest = np.sqrt(np.einsum("bd,bd->b", steps_BD, steps_BD).max(initial=0.0))
            if longest <= _UNSPLIT_LENGTH * 2.0**GRID_BITS:
                units_BP = steps_BD @ self._steps_DP
            else:
                _refuse_too_large(features_BD)
                high_BD = split_steps(steps_BD)
                units_BP = high_BD @ self._steps_DP
                units_BP *= 2.0**SPLIT_BITS
                units_BP += steps_BD @ self._steps_DP
            units_BP *= 2.0 ** (-2 * GRID_BITS)
            projected_BP: NDArray[np.float64] = (units_BP - self.offset_P) * self.scale_P
        return projected_BP

    @cached_property
    def _steps_DP(self) -> NDArray[np.float64]:
        """The directions in steps of 2^-24."""
        return np.ascontiguousarray((self.directions_PD.astype(np.float64) * 2.0**GRID_BITS).T)


@dataclass(frozen=True, eq=False)
class FeatureTransform:
    """What is done to a feature before distances are measured.

    Attributes:
        kind: `none`; `l2`: divided by its length, which is summed in float64 in the order of `sum_of_squares`; the quotient is
            rounded to float32, and a zero vector stays zero; `pca`: projected, then as `l2`; `whiten`: the same, with
            directions of variance 1.
        projection: of `pca` and `whiten`.
    """

    kind: TransformKind
    projection: Projection | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(TransformKind):
            raise ValueError(f"unknown transform {self.kind!r}: expected one of {', '.join(get_args(TransformKind))}")
        if (self.kind in PROJECTIONS) != (self.projection is not None):
            raise ValueError(f"a transform of kind {self.kind!r} {'lacks' if self.kind in PROJECTIONS else 'has no'} directions")

    def __call__(self, features_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """Transform every row by itself: float32 [N, D] to float32 [N, D], or [N, P] where there are directions.

        The input is not changed; NaN stays NaN. Where there are directions, what is no multiple of 2^-24 (every float16 is
        one) is rounded to one first.

        Raises:
            DataError: a feature is too large to be projected.
        """
        if features_ND.dtype != np.float32 or features_ND.ndim != 2:
            raise ValueError(f"features must be float32 [N, D], not {features_ND.dtype} {list(features_ND.shape)}")
        if self.kind == "none":
            return features_ND
        if self.projection is not None and features_ND.shape[1] != self.projection.dim:
            raise ValueError(f"features of width {features_ND.shape[1]} on directions of width {self.projection.dim}")
        transformed_ND = np.empty((len(features_ND), self.width(features_ND.shape[1])), np.float32)
        block = max(1, _BLOCK_ELEMENTS // max(1, features_ND.shape[1]))
        for start in range(0, len(features_ND), block):
            block_BD = features_ND[start : start + block]
            projected_BP = block_BD if self.projection is None else self.projection(block_BD)
            transformed_ND[start : start + block] = _to_unit_length(projected_BP)
        return transformed_ND

    def width(self, dim: int) -> int:
        """The width of what becomes of features of width `dim`."""
        return dim if self.projection is None else len(self.projection.directions_PD)

    def to_bytes(self) -> bytes:
        """Contents of `transform.safetensors`; equal transforms, equal bytes."""
        arrays: dict[str, NDArray[Any]] = {}
        if self.projection is not None:
            projection = self.projection
            arrays = {"directions": projection.directions_PD, "offset": projection.offset_P, "scale": projection.scale_P}
        packed: bytes = safetensors_numpy.save(arrays, metadata={"kind": self.kind})
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The transform that `to_bytes` described.

        Raises:
            ValueError, KeyError, TypeError, SafetensorError: these bytes are none.
        """
        arrays = safetensors_numpy.load(data)
        # safetensors gives metadata for files only: JSON after its length in eight bytes.
        kind = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["kind"]
        projection = Projection(arrays["directions"], arrays["offset"], arrays["scale"]) if arrays else None
        return cls(cast(TransformKind, kind), projection)


def _to_unit_length(features_ND: NDArray[np.float32] | NDArray[np.float64]) -> NDArray[np.float64]:
    lengths_N = np.sqrt(sum_of_squares(features_ND.astype(np.float64, order="C")))
    with np.errstate(invalid="ignore"):  # an infinite feature becomes NaN here and is refused by the assignment
        return np.divide(features_ND, np.where(lengths_N == 0.0, 1.0, lengths_N)[:, None], dtype=np.float64)


def _refuse_too_large(features_BD: NDArray[np.float32]) -> None:
    largest = float(np.abs(features_BD, where=np.isfinite(features_BD), out=np.zeros_like(features_BD)).max(initial=0.0))
    if largest > LARGEST:
        raise too_large(largest)
