"""The router: feature transform and centroids, the one rule that sends a feature to an expert, in training and serving.

The same object routes a shard of ten million features and one image of a request, so every row is computed by itself in
one stated order; the answer depends on neither its neighbours nor the machine's BLAS. Rejected: `x / np.linalg.norm` in
float32 and distances from a matrix product, which send some rows elsewhere when they are batched differently.

Shape letters: N examples, F width of the trunk's features, D feature dim after the transform (F but for a projection), K experts.
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
from hardmoe.neighbours.assignment import Assignment, assign
from hardmoe.neighbours.engine import Engine, choose_engine
from hardmoe.partitioning.transform import FeatureTransform

CENTROIDS_FILE = "centroids.npy"
TRANSFORM_FILE = "transform.safetensors"
DESCRIPTION_FILE = "router.json"


@dataclass(frozen=True, eq=False)
class Router:
    """Sends features to experts.

    Attributes:
        transform: applied to every feature first.
        centroids_KD: one per expert, in the transformed space, float32 [K, D].
    """

    transform: FeatureTransform
    centroids_KD: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.centroids_KD.dtype != np.float32 or self.centroids_KD.ndim != 2 or 0 in self.centroids_KD.shape:
            raise ValueError(f"centroids must be float32 [K, D], not {self.centroids_KD.dtype} {list(self.centroids_KD.shape)}")
        projection, width = self.transform.projection, self.centroids_KD.shape[1]
        if projection is not None and len(projection.directions_PD) != width:
            raise ValueError(f"centroids of width {width} do not fit {len(projection.directions_PD)} principal directions")

    @property
    def num_experts(self) -> int:
        """K."""
        return len(self.centroids_KD)

    @property
    def dim(self) -> int:
        """F, the width of the trunk's features."""
        projection = self.transform.projection
        return int(self.centroids_KD.shape[1]) if projection is None else projection.dim

    def route(self, features_NF: NDArray[np.float32], engine: Engine | None = None) -> Assignment:
        """Assign every feature to an expert; the same answer for a row alone as among any others.

        Args:
            features_NF: the trunk's features, float32 [N, F].
            engine: who searches; by default the fastest that works here. The answer does not depend on it.

        Raises:
            DataError: the features have another width than those it was fitted on, are not finite, or too large to be projected.
        """
        if features_NF.ndim == 2 and features_NF.shape[1] != self.dim:
            raise DataError(
                f"features of width {features_NF.shape[1]} cannot be routed by a router that was fitted on width {self.dim}: "
                "use the trunk that it was fitted with, or fit the router again"
            )
        return assign(self.transform(features_NF), self.centroids_KD, engine or choose_engine())

    def to_files(self) -> dict[str, bytes]:
        """Contents of `centroids.npy`, `transform.safetensors` and `router.json`, by file name; equal routers, equal bytes."""
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(self.centroids_KD, dtype="<f4"), allow_pickle=False)
        description = {**self._description(), "distance": "squared_euclidean"}
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
            router = cls(FeatureTransform.from_bytes(files[TRANSFORM_FILE]), centroids_KD)
            told = json.loads(files[DESCRIPTION_FILE])
            told = {key: told[key] for key in ("experts", "dim", "transform")}
        except (ValueError, EOFError, KeyError, TypeError, SafetensorError) as error:
            raise CorruptFileError(f"the router's files cannot be read ({error}): fit the router again") from error
        if told != (found := router._description()):
            raise CorruptFileError(
                f"{DESCRIPTION_FILE} speaks of {_in_words(told)}, {CENTROIDS_FILE} and {TRANSFORM_FILE} hold {_in_words(found)}: "
                "fit the router again"
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
