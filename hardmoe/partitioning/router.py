"""The router: feature transform and centroids, the one rule that sends a feature to an expert, in training and serving.

The same object routes a shard of ten million features and one image of a request, so every row is computed by itself in
one stated order; the answer depends on neither its neighbours nor the machine's BLAS. Rejected: `x / np.linalg.norm` in
float32 and distances from a matrix product, which send some rows elsewhere when they are batched differently.

Shape letters: N examples, D feature dim, K experts, F centroids where there are more of them than experts, P pairs of a row and
an expert.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self, cast, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from hardmoe.config import Json
from hardmoe.errors import CorruptFileError, DataError
from hardmoe.neighbours.assignment import Assignment, assign, squared_distances, sum_of_squares
from hardmoe.neighbours.engine import Engine, choose_engine
from hardmoe.neighbours.grouped import assign_groups, squared_distances_to_groups

TransformKind = Literal["none", "l2"]

CENTROIDS_FILE = "centroids.npy"
TRANSFORM_FILE = "transform.safetensors"
DESCRIPTION_FILE = "router.json"

_BLOCK_ELEMENTS = 2**16  # float64 values of a block: 512 kB stays in one core's cache


@dataclass(frozen=True)
class FeatureTransform:
    """What is done to a feature before distances are measured.

    Attributes:
        kind: `none`, or `l2`: divided by its length, which is summed in float64 in the order of `sum_of_squares`; the
            quotient is rounded to float32. A zero vector stays zero.
    """

    kind: TransformKind

    def __post_init__(self) -> None:
        if self.kind not in get_args(TransformKind):
            raise ValueError(f"unknown transform {self.kind!r}: expected one of {', '.join(get_args(TransformKind))}")

    def __call__(self, features_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """Transform every row by itself: float32 [N, D] to float32 [N, D]. The input is not changed; NaN stays NaN."""
        if features_ND.dtype != np.float32 or features_ND.ndim != 2:
            raise ValueError(f"features must be float32 [N, D], not {features_ND.dtype} {list(features_ND.shape)}")
        if self.kind == "none":
            return features_ND
        transformed_ND = np.empty(features_ND.shape, np.float32)
        block = max(1, _BLOCK_ELEMENTS // max(1, features_ND.shape[1]))
        for start in range(0, len(features_ND), block):
            transformed_ND[start : start + block] = _to_unit_length(features_ND[start : start + block])
        return transformed_ND


def _to_unit_length(features_ND: NDArray[np.float32]) -> NDArray[np.float64]:
    lengths_N = np.sqrt(sum_of_squares(features_ND.astype(np.float64, order="C")))
    with np.errstate(invalid="ignore"):  # an infinite feature becomes NaN here and is refused by the assignment
        return np.divide(features_ND, np.where(lengths_N == 0.0, 1.0, lengths_N)[:, None], dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Router:
    """Sends features to experts.

    Attributes:
        transform: applied to every feature first.
        centroids_KD: one per expert, in the transformed space, float32 [K, D]; or, with `group_F`, several: [F, D].
        group_F: the expert of every centroid, int32 [F], each of 0 to K - 1 at least once; None: the k-th centroid is expert k's.
    """

    transform: FeatureTransform
    centroids_KD: NDArray[np.float32]
    group_F: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        if self.centroids_KD.dtype != np.float32 or self.centroids_KD.ndim != 2 or 0 in self.centroids_KD.shape:
            raise ValueError(f"centroids must be float32 [K, D], not {self.centroids_KD.dtype} {list(self.centroids_KD.shape)}")
        if self.group_F is not None:
            _check_groups(self.group_F, len(self.centroids_KD))

    @property
    def num_experts(self) -> int:
        """K."""
        return len(self.centroids_KD) if self.group_F is None else int(self.group_F.max()) + 1

    @property
    def dim(self) -> int:
        """D, the width of the trunk's features."""
        return int(self.centroids_KD.shape[1])

    def route(self, features_ND: NDArray[np.float32], engine: Engine | None = None) -> Assignment:
        """Assign every feature to the expert with the nearest centroid; the same answer for a row alone as among any others.

        The second is the expert whose centroid is nearest of those that are not the first one's.

        Args:
            features_ND: the trunk's features, float32 [N, D].
            engine: who searches; by default the fastest that works here. The answer does not depend on it.

        Raises:
            DataError: the features have another width than the centroids, or are not finite.
        """
        if features_ND.ndim == 2 and features_ND.shape[1] != self.dim:
            raise DataError(
                f"features of width {features_ND.shape[1]} cannot be routed by centroids of width {self.dim}: "
                "use the trunk that this router was fitted with, or fit the router again"
            )
        transformed_ND, engine = self.transform(features_ND), engine or choose_engine()
        if self.group_F is None:
            return assign(transformed_ND, self.centroids_KD, engine)
        return assign_groups(transformed_ND, self.centroids_KD, self.group_F, engine)

    def squared_distances(
        self, transformed_ND: NDArray[np.float32], rows_P: NDArray[np.integer], experts_P: NDArray[np.integer]
    ) -> NDArray[np.float64]:
        """Squared distances of rows, already transformed, to experts: to the nearest centroid of each, float64 [P]."""
        if self.group_F is None:
            return squared_distances(transformed_ND, self.centroids_KD, rows_P, experts_P)
        return squared_distances_to_groups(transformed_ND, self.centroids_KD, self.group_F, (rows_P, experts_P), choose_engine())

    def to_files(self) -> dict[str, bytes]:
        """Contents of `centroids.npy`, `transform.safetensors` and `router.json`, by file name; equal routers, equal bytes.

        `router.json` has a key `groups`, the expert of every centroid, only where an expert has several.
        """
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(self.centroids_KD, dtype="<f4"), allow_pickle=False)
        description: dict[str, Json] = {
            "dim": self.dim,
            "distance": "squared_euclidean",
            "experts": self.num_experts,
            "transform": {"kind": self.transform.kind},
        }
        if self.group_F is not None:
            description["groups"] = self.group_F.tolist()
        return {
            CENTROIDS_FILE: buffer.getvalue(),
            TRANSFORM_FILE: safetensors_numpy.save({}, metadata={"kind": self.transform.kind}),
            DESCRIPTION_FILE: (json.dumps(description, indent=2, sort_keys=True) + "\n").encode(),
        }

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        """The router that `to_files` described.

        Raises:
            CorruptFileError: a file is missing, unreadable, or disagrees with another.
        """
        for name in (CENTROIDS_FILE, TRANSFORM_FILE, DESCRIPTION_FILE):
            if name not in files:
                raise CorruptFileError(f"the router has no {name}: fit the router again")
        try:
            centroids_KD = np.load(io.BytesIO(files[CENTROIDS_FILE]), allow_pickle=False).astype(np.float32, copy=False)
            safetensors_numpy.load(files[TRANSFORM_FILE])
            description = json.loads(files[DESCRIPTION_FILE])
            kind, shape = description["transform"]["kind"], (description["experts"], description["dim"])
            groups = _read_groups(description["groups"]) if "groups" in description else None
            router = cls(FeatureTransform(cast(TransformKind, kind)), centroids_KD, groups)
        except (ValueError, EOFError, KeyError, TypeError, SafetensorError) as error:
            raise CorruptFileError(f"the router's files cannot be read ({error}): fit the router again") from error
        if (router.num_experts, router.dim) != shape:
            holds = f"{list(centroids_KD.shape)}" + ("" if groups is None else f" for {router.num_experts} experts")
            raise CorruptFileError(
                f"{DESCRIPTION_FILE} speaks of {shape[0]} experts of width {shape[1]}, {CENTROIDS_FILE} holds "
                f"{holds}: fit the router again"
            )
        return router


def _check_groups(group_F: NDArray[np.int32], num_centroids: int) -> None:
    if group_F.dtype != np.int32 or group_F.shape != (num_centroids,):
        raise ValueError(f"groups must be int32 [F] for {num_centroids} centroids, not {group_F.dtype} {list(group_F.shape)}")
    present = np.unique(group_F)
    if not np.array_equal(present, np.arange(len(present))):
        raise ValueError(
            f"the groups of {num_centroids} centroids must be numbered from 0 without a gap, not {present[0]} to {present[-1]}"
        )


def _read_groups(groups: Json) -> NDArray[np.int32]:
    """Numbers as they stand in JSON, where 1.5, "1" and true are none."""
    if not isinstance(groups, list) or not all(type(group) is int and 0 <= group < len(groups) for group in groups):
        raise ValueError("its groups are not the numbers of experts")
    return np.array(groups, np.int32)
