"""Principal directions of all training features, as durable work: the phases before k-means where the transform needs them.

    moments       exact sums of products, of groups of shards (`moments`)
    directions    one unit: the sum of these, their covariance, and its eigenvectors

The eigenvectors are LAPACK's, whose last bits differ between machines, so they are computed once, by a unit that leaves them
in a file: a driver that replays the fit, or a second one, reads what the first one had. Within a machine they are the same for
every sharding, as the covariance is exact and one thread decomposes it. Rounding them to multiples of 2^-24, and variances to
float32, makes other machines agree nearly always. Rejected: the decomposition on the driver, and a unit of moments for every
shard, which for 2,048 features leaves 67 MB for each.

Shape letters: D feature dim, P principal directions.
"""

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from hardmoe.arrays import load_arrays, save_arrays
from hardmoe.config import Json
from hardmoe.errors import CorruptFileError, DataError
from hardmoe.partitioning.config import PartitionConfig
from hardmoe.partitioning.moments import GRID_BITS, Moments
from hardmoe.partitioning.scan import blas_threads
from hardmoe.partitioning.transform import PROJECTIONS, FeatureTransform, Projection, TransformKind
from hardmoe.stage import Completion, DriverContext, Phase, Unit, UnitContext
from hardmoe.storage import Storage

MOMENTS, DIRECTIONS = TRANSFORM_PHASES = ("moments", "directions")

_SCRATCH_BYTES = 2**33
"""Of all files of moments together, at most."""
_MOST_UNITS = 1024
"""Units of moments, each with a file of its own, at most."""


@dataclass(frozen=True)
class Fitted:
    """A transform, and what others are to know of it.

    Attributes:
        transform: ready for use.
        explained: share of the features' variance that lies along its directions; None where there are none.
        arguments: of units that use the transform, see `load_transform`.
    """

    transform: FeatureTransform
    explained: float | None = None
    arguments: Mapping[str, Json] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Json]:
        """What the record says; nothing where nothing was fitted."""
        if self.transform.projection is None:
            return {}
        components, width = self.transform.projection.directions_PD.shape
        return {"transform": {"kind": self.transform.kind, "components": components, "of": width, "explained": self.explained}}


def transform_phases(
    context: DriverContext, config: PartitionConfig, paths: Sequence[str], dim: int
) -> Generator[Phase, list[Completion], Fitted]:
    """Fit the transform on all features: no phase where there is nothing to fit.

    Args:
        context: of the driver.
        config: the recipe's section.
        paths: of the shards, as `run_transform`'s caller understands them.
        dim: the width of the features.
    """
    if config.transform not in PROJECTIONS:
        return Fitted(FeatureTransform(config.transform))
    zero = Moments.zero(dim)  # refuses what is too wide
    num_units = min(len(paths), _MOST_UNITS, max(1, _SCRATCH_BYTES // (zero.high_AA.nbytes + zero.low_AA.nbytes)))
    bounds = [len(paths) * unit // num_units for unit in range(num_units + 1)]
    groups = [paths[low:high] for low, high in pairwise(bounds)]
    summed = yield Phase(MOMENTS, [Unit(f"{i:05d}", {"paths": group}, cost=len(group)) for i, group in enumerate(groups)])
    moments = [done.scratch["moments"] for done in summed]
    (found,) = yield Phase(DIRECTIONS, [Unit("all", {"moments": moments})])
    path = found.scratch["transform"]
    return Fitted(read_transform(context.storage, path), found.payload["explained"], {"transform": path})


def run_transform(context: UnitContext, features: Iterable[NDArray[np.float32]], config: PartitionConfig) -> Json:
    """A unit of one of these phases; `features` are those of its shards, float32 [N, D] each, and only read for the moments."""
    if context.phase == MOMENTS:
        with blas_threads(context.stage.resources.num_cpus):
            total = sum_moments(features)
        save_arrays(context.scratch("moments"), total.to_arrays())
        return {"rows": total.num_rows}
    paths = context.unit.arguments["moments"]
    total = Moments.from_arrays(load_arrays(context.storage, paths[0]))
    for path in paths[1:]:
        total += Moments.from_arrays(load_arrays(context.storage, path))
    fitted = fit_transform(total, config.transform, config.components)
    with context.scratch("transform") as sink:
        sink.write(fitted.transform.to_bytes())
    return {"explained": fitted.explained}


def load_transform(context: UnitContext, config: PartitionConfig) -> FeatureTransform:
    """The transform that a unit with `Fitted.arguments` uses."""
    path = context.unit.arguments.get("transform")
    return FeatureTransform(config.transform) if path is None else read_transform(context.storage, path)


def read_transform(storage: Storage, path: str) -> FeatureTransform:
    """The transform that a file holds.

    Raises:
        CorruptFileError: the file is truncated or damaged.
    """
    try:
        return FeatureTransform.from_bytes(storage.read_bytes(path))
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CorruptFileError(f"{storage.where(path)} is damaged: {error}") from error


def sum_moments(features: Iterable[NDArray[np.float32]]) -> Moments:
    """The moments of all rows of one or more batches."""
    total: Moments | None = None
    for batch_ND in features:
        found = Moments.from_batch(batch_ND)
        total = found if total is None else total + found
    assert total is not None, "a table has at least one batch"
    return total


def fit_transform(moments: Moments, kind: TransformKind, components: int | None) -> Fitted:
    """The transform of features with these moments.

    Directions are numbered by variance, and the coordinate of largest magnitude is positive (the first of equal ones). Only
    those count whose variance exceeds what rounding to float16 alone would give them, and what LAPACK errs by.

    Args:
        moments: of all features.
        kind: `pca` or `whiten`.
        components: so many directions; None for all that count.

    Raises:
        DataError: the features differ in fewer directions.
    """
    covariance_DD = moments.covariance()
    with blas_threads(1):
        variances_D, vectors_DD = np.linalg.eigh(covariance_DD)
    variances_D, vectors_DD = variances_D[::-1], vectors_DD[:, ::-1]
    # Half a unit in the last place of x is 2^-11 |x|, or 2^-25; a uniform error of up to e has the variance e^2 / 3.
    noise_D = (moments.mean_squares() * 2.0**-22 + 2.0**-50) / 3.0
    lost_D = (vectors_DD**2 * noise_D[:, None]).sum(axis=0) + moments.dim * 2.0**-52 * variances_D[0]
    usable = np.flatnonzero(variances_D > lost_D)
    wanted = len(usable) if components is None else components
    _check_enough(wanted, len(usable), moments, kind)
    kept = usable[:wanted]
    directions_PD = np.rint(vectors_DD[:, kept].T * 2.0**GRID_BITS) * 2.0**-GRID_BITS
    largest_P = np.abs(directions_PD).argmax(axis=1)
    directions_PD *= np.sign(directions_PD[np.arange(wanted), largest_P])[:, None]
    variances_P = variances_D[kept].astype(np.float32).astype(np.float64)
    scale_P = 1.0 / np.sqrt(variances_P) if kind == "whiten" else np.ones(wanted)
    projection = Projection((directions_PD + 0.0).astype(np.float32), _offsets(directions_PD, moments), scale_P)
    explained = min(1.0, math.fsum(variances_P) / math.fsum(np.diag(covariance_DD)))
    return Fitted(FeatureTransform(kind, projection), explained)


def _offsets(directions_PD: NDArray[np.float64], moments: Moments) -> NDArray[np.float64]:
    """The mean's projections, each rounded once, so that a feature that is the mean is projected to exactly nothing."""
    sums_D = np.array(moments.sums_units(), object)
    units_P = (directions_PD * 2.0**GRID_BITS).astype(np.int64).astype(object) @ sums_D
    scale = moments.num_rows << (3 * GRID_BITS)
    return np.array([float(Fraction(units, scale)) for units in units_P])


def _check_enough(wanted: int, usable: int, moments: Moments, kind: TransformKind) -> None:
    if not usable:
        raise DataError(
            f"the {moments.num_rows} training features are all the same, so they have no principal directions for "
            f"partition.transform {kind}: train the trunk longer, or set partition.transform to l2"
        )
    if wanted > usable:
        raise DataError(
            f"partition.components is {wanted}, but the {moments.num_rows} training features of width {moments.dim} vary in "
            f"{usable} directions only; set it to {usable} or less, or leave it out"
        )
