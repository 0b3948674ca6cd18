"""The router: feature transform and centroids, the one rule that sends a feature to an expert, in training and serving.

The same object routes a shard of ten million features and one image of a request, so every row is computed by itself in
one stated order; the answer depends on neither its neighbours nor the machine's BLAS. Rejected: `x / np.linalg.norm` in
float32 and distances from a matrix product, which send some rows elsewhere when they are batched differently.

Shape letters: N examples, W width of the trunk's features, D feature dim after the transform (W but for a projection), K experts,
F centroids where there are more of them than experts, P pairs of a row and an expert.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from hardmoe.config import Json
from hardmoe.errors import CorruptFileError, DataError
from hardmoe.neighbours.assignment import Assignment, assign, squared_distances
from hardmoe.neighbours.engine import Engine, choose_engine
from hardmoe.neighbours.grouped import assign_groups, squared_distances_to_groups
from hardmoe.partitioning.transform import FeatureTransform

CENTROIDS_FILE = "centroids.npy"
TRANSFORM_FILE = "transform.safetensors"
DESCRIPTION_FILE = "router.json"


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
        projection, width = self.transform.projection, self.centroids_KD.shape[1]
        if projection is not None and len(projection.directions_PD) != width:
            raise ValueError(f"centroids of width {width} do not fit {len(projection.directions_PD)} principal directions")
        if self.group_F is not None:
            _check_groups(self.group_F, len(self.centroids_KD))

    @property
    def num_experts(self) -> int:
        """K."""
        return len(self.centroids_KD) if self.group_F is None else int(self.group_F.max()) + 1

    @property
    def dim(self) -> int:
        """W, the width of the trunk's features."""
        projection = self.transform.projection
        return int(self.centroids_KD.shape[1]) if projection is None else projection.dim

    def route(self, features_NW: NDArray[np.float32], engine: Engine | None = None) -> Assignment:
        """Assign every feature to the expert with the nearest centroid; the same answer for a row alone as among any others.

        The second is the expert whose centroid is nearest of those that are not the first one's.

        Args:
            features_NW: the trunk's features, float32 [N, W].
            engine: who searches; by default the fastest that works here. The answer does not depend on it.

        Raises:
            DataError: the features have another width than those it was fitted on, are not finite, or too large to be projected.
        """
        return self.assign(self.transformed(features_NW), engine)

    def transformed(self, features_NW: NDArray[np.float32]) -> NDArray[np.float32]:
        """The trunk's features, float32 [N, W], in the space of the centroids, float32 [N, D].

        Raises:
            DataError: they have another width than those it was fitted on, or are too large to be projected.
        """
        if features_NW.ndim == 2 and features_NW.shape[1] != self.dim:
            raise DataError(
                f"features of width {features_NW.shape[1]} cannot be routed by a router that was fitted on width {self.dim}: "
                "use the trunk that it was fitted with, or fit the router again"
            )
        return self.transform(features_NW)

    def assign(self, transformed_ND: NDArray[np.float32], engine: Engine | None = None) -> Assignment:
        """As `route`, of rows that are already transformed, float32 [N, D].

        Raises:
            DataError: one is not finite.
        """
        engine = engine or choose_engine()
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

    def nearest(self, features_NW: NDArray[np.float32], top_k: int) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """The k nearest experts of every feature, int32 [N, k], the nearest first, and the squared distances to them [N, k].

        Args:
            features_NW: the trunk's features, float32 [N, W].
            top_k: k, at most K.

        Raises:
            DataError: as `transformed`.
        """
        rows_P = np.repeat(np.arange(len(features_NW)), self.num_experts)
        experts_P = np.tile(np.arange(self.num_experts), len(features_NW))
        squared_P = self.squared_distances(self.transformed(features_NW), rows_P, experts_P)
        squared_NK = squared_P.reshape(len(features_NW), self.num_experts)
        nearest_Nk = np.argsort(squared_NK, axis=1, kind="stable")[:, :top_k]
        return nearest_Nk.astype(np.int32), np.take_along_axis(squared_NK, nearest_Nk, axis=1)

    def to_files(self) -> dict[str, bytes]:
        """Contents of `centroids.npy`, `transform.safetensors` and `router.json`, by file name; equal routers, equal bytes.

        `router.json` has a key `groups`, the expert of every centroid, only where an expert has several.
        """
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(self.centroids_KD, dtype="<f4"), allow_pickle=False)
        description = {**self._description(), "distance": "squared_euclidean"}
        if self.group_F is not None:
            description["groups"] = self.group_F.tolist()
        return {
            CENTROIDS_FILE: buffer.getvalue(),
            TRANSFORM_FILE: self.transform.to_bytes(),
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
            description = json.loads(files[DESCRIPTION_FILE])
            told = {key: description[key] for key in ("experts", "dim", "transform")}
            groups = _read_groups(description["groups"]) if "groups" in description else None
            router = cls(FeatureTransform.from_bytes(files[TRANSFORM_FILE]), centroids_KD, groups)
        except (ValueError, EOFError, KeyError, TypeError, SafetensorError) as error:
            raise CorruptFileError(f"the router's files cannot be read ({error}): fit the router again") from error
        if told != (found := router._description()):
            held = f"{CENTROIDS_FILE} and {TRANSFORM_FILE} hold" if groups is None else "its groups and the other files make"
            raise CorruptFileError(
                f"{DESCRIPTION_FILE} speaks of {_in_words(told)}, {held} {_in_words(found)}: fit the router again"
            )
        return router

    def _description(self) -> dict[str, Json]:
        """What `router.json` says that the other files must agree with."""
        transform: dict[str, Json] = {"kind": self.transform.kind}
        if self.transform.projection is not None:
            transform["components"] = len(self.transform.projection.directions_PD)
        return {"dim": self.dim, "experts": self.num_experts, "transform": transform}


def _in_words(description: Mapping[str, Json]) -> str:
    """A description as a part of a sentence, whatever it holds."""
    transform = json.dumps(description["transform"], sort_keys=True)
    return f"{description['experts']} experts for features of width {description['dim']} and the transform {transform}"


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
