"""A finished run as one object: route an image, embed it by its expert, align, decode.

An image costs one pass of the trunk and one of its expert, however many experts there are; where experts branch off the trunk
(`experts.branch_at`), one of the stages that they share and two of the short rests. Experts are loaded when the first
image is routed to them. What comes out is what the evaluation measured: features and embeddings pass through float16 here as
they do on disk, so an image is sent to the same expert in use as in training.

Shape letters: N images, n some of them, S side in pixels, C channels of a map, H and W its sides, D features, Z unified dims,
V tags.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from hardmoe.artifacts.gate import has_features_from_elsewhere, has_random_parts
from hardmoe.artifacts.names import expert_name
from hardmoe.artifacts.store import Artifact, ArtifactStore
from hardmoe.data.config import PILLOW_MAX_PIXELS
from hardmoe.data.images import UndecodableImageError, load_square
from hardmoe.data.reading import tag_names
from hardmoe.errors import DataError
from hardmoe.evaluation.topk import log_weights
from hardmoe.models.backbones import TagClassifier
from hardmoe.models.branching import split
from hardmoe.models.shared_decoder import SharedDecoder, load_shared_decoder
from hardmoe.partitioning.regroup import load_router
from hardmoe.partitioning.router import Router
from hardmoe.storage import open_storage
from hardmoe.training.inference import predict_features, predict_from_maps
from hardmoe.training.network import architecture_of, load_network
from hardmoe.training.staging import inference_batch_size

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Prediction:
    """One image's tags, best first."""

    expert: int
    """Which expert answered."""
    tags: list[str]
    probabilities: list[float]


@dataclass(frozen=True)
class _Seen:
    """Images on their way through the mixture."""

    image_size: int
    pixels_N3SS: NDArray[np.uint8]
    maps_NCHW: torch.Tensor | None = None
    """What the stages that all networks share make of them; None where they share none."""

    def __len__(self) -> int:
        return len(self.pixels_N3SS)


class Mixture:
    """Trunk, router, experts and decoder of a finished run.

    Args:
        store: the artifacts of the run.
    """

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._experts: dict[int, TagClassifier] = {}
        trunk = store.get("trunk")
        architecture = architecture_of(trunk)
        self._reduced = architecture.reduced
        self.image_size = architecture.image_size
        """S: images are resized (shorter side, then centre crop) to so many pixels."""
        self._trunk = load_network(trunk)
        self._backbone_name = architecture.backbone

    @classmethod
    def load(cls, root: str) -> "Mixture":
        """Open the mixture of a run.

        Raises:
            MissingRecordError: the run is not finished; names the artifact that is missing.
            DataError: its partition is random, or goes by features that were computed elsewhere.
        """
        store = ArtifactStore(open_storage(root))
        for name in ("trunk", "partition", "decoder", "vocabulary"):
            store.get(name)
        if has_random_parts(store.get("partition")):
            raise DataError(
                f"the partition in {root} is random, so nothing says which expert a new image goes to; "
                "take a run with partition.method: kmeans, balanced, two_level or given"
            )
        store.get("router")
        if has_features_from_elsewhere(store.find("features")):
            raise DataError(
                f"the partition in {root} goes by features that were computed elsewhere (features.path), so a new image cannot "
                "be sent to an expert; take a run without features.path"
            )
        return cls(store)

    @cached_property
    def router(self) -> Router:
        """The rule that sends the trunk's features to experts."""
        return load_router(self._store.get("router"))

    @cached_property
    def decoder(self) -> SharedDecoder:
        """The alignments and the shared decoder."""
        return load_shared_decoder(self._store.get("decoder"))

    @cached_property
    def tags(self) -> list[str]:
        """The vocabulary, by index."""
        return tag_names(self._store.get("vocabulary"))

    @cached_property
    def shared_stage(self) -> str | None:
        """The stage up to which the experts are the trunk, which an image passes once; None if they share nothing."""
        # A record holds what differs from the default, which is the image.
        stage: str | None = self._store.get(f"experts/{expert_name(0)}").record.config["experts"].get("branch_at")
        return stage

    def route(self, images: Sequence[bytes]) -> NDArray[np.int32]:
        """The expert of every encoded image, int32 [N]."""
        return self._route(self._seen(self._decoded(images)))

    def embed(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        """Every encoded image's place in the unified space, float32 [N, Z].

        Raises:
            DataError: an image cannot be decoded; names its position.
        """
        seen = self._seen(self._decoded(images))
        return self._embed(seen, self._route(seen)).numpy()

    def predict(self, images: Sequence[bytes], k: int = 10, *, experts: int = 1) -> list[Prediction]:
        """The k most probable tags of every encoded image.

        Args:
            images: encoded.
            k: how many tags.
            experts: how many of the nearest experts are asked: 1, or as many as the run's `evaluation.top_k`, whose weights by
                distance it has fitted. An image costs a pass of each beside the trunk's.

        Raises:
            DataError: an image cannot be decoded, names its position; or the run has no weights for so many experts.
        """
        seen = self._seen(self._decoded(images))
        if experts == 1:
            experts_N = self._route(seen)
            with torch.inference_mode():
                probabilities_NV = torch.softmax(self.decoder.decode(self._embed(seen, experts_N)), dim=1)
        else:
            experts_N, probabilities_NV = self._mixed(seen, experts)
        top = torch.sort(probabilities_NV, dim=1, descending=True, stable=True)
        rows = zip(experts_N.tolist(), top.indices[:, :k].tolist(), top.values[:, :k].tolist(), strict=True)
        return [Prediction(expert, [self.tags[i] for i in indices], values) for expert, indices, values in rows]

    def _decoded(self, images: Sequence[bytes]) -> NDArray[np.uint8]:
        pixels_N3SS = np.empty((len(images), 3, self.image_size, self.image_size), np.uint8)
        for position, data in enumerate(images):
            if not isinstance(data, bytes):
                raise TypeError(f"images must be encoded images (bytes each), but item {position} is a {type(data).__name__}")
            try:
                pixels_N3SS[position] = load_square(data, self.image_size, PILLOW_MAX_PIXELS, reduced=self._reduced)
            except UndecodableImageError as error:
                raise DataError(f"image {position} of {len(images)}: {error}") from error
        return pixels_N3SS

    def _seen(self, pixels_N3SS: NDArray[np.uint8]) -> "_Seen":
        """The images as gate and experts go on from them."""
        if self.shared_stage is None:
            return _Seen(self.image_size, pixels_N3SS)
        shared = split(self._trunk.backbone, self.shared_stage, self._backbone_name).shared
        maps_NCHW = torch.cat(list(predict_features(shared, [pixels_N3SS], inference_batch_size(self.image_size, _CPU), _CPU)))
        return _Seen(self.image_size, pixels_N3SS, maps_NCHW)

    def _features(self, network: TagClassifier, seen: "_Seen", rows_n: NDArray[np.int64]) -> NDArray[np.float32]:
        """A network's features of some of the images as they are stored: rounded to float16, float32 [n, D]."""
        batch_size = inference_batch_size(seen.image_size, _CPU)
        if not len(rows_n):
            features_ND = torch.zeros(0, network.backbone.num_features)
        elif seen.maps_NCHW is None or self.shared_stage is None:
            features_ND = torch.cat(list(predict_features(network.backbone, [seen.pixels_N3SS[rows_n]], batch_size, _CPU)))
        else:
            rest = split(network.backbone, self.shared_stage, self._backbone_name).rest
            features_ND = predict_from_maps(rest, seen.maps_NCHW[torch.from_numpy(rows_n)], batch_size)
        return features_ND.numpy().astype(np.float16).astype(np.float32)

    def _route(self, seen: "_Seen") -> NDArray[np.int32]:
        return self.router.route(self._features(self._trunk, seen, np.arange(len(seen)))).primary_N

    def _embed(self, seen: "_Seen", experts_N: NDArray[np.int32]) -> torch.Tensor:
        unified_NZ = torch.empty(len(seen), self.decoder.dim)
        for expert in np.unique(experts_N).tolist():
            rows = np.flatnonzero(experts_N == expert)
            embeddings = torch.from_numpy(self._features(self._expert(expert), seen, rows))
            with torch.inference_mode():
                unified_NZ[rows] = self.decoder.align(embeddings, torch.full((len(rows),), expert, dtype=torch.int64))
        return unified_NZ

    def _mixed(self, seen: "_Seen", num_experts: int) -> tuple[NDArray[np.int32], torch.Tensor]:
        """The nearest expert [N], and the probabilities [N, V] that several mix as `evaluation.topk` does."""
        temperature = self._store.find("topk/temperature")
        fitted = None if temperature is None else temperature.record.payload["top_k"]
        if temperature is None or fitted != num_experts:
            raise DataError(
                f"experts={num_experts} needs weights fitted for as many, which this run has "
                f"{'none of' if fitted is None else f'for {fitted}'}; run `hardmoe evaluate` with evaluation.top_k: {num_experts}"
            )
        nearest_Nk, squared_Nk = self.router.nearest(self._features(self._trunk, seen, np.arange(len(seen))), num_experts)
        weights_Nk = torch.from_numpy(log_weights(squared_Nk, temperature.record.payload["temperature"])).float()
        with torch.inference_mode():
            logits = [self.decoder.decode(self._embed(seen, experts_N)) for experts_N in nearest_Nk.T]
            said = [torch.log_softmax(each_NV, dim=1) + weights_Nk[:, at, None] for at, each_NV in enumerate(logits)]
        return nearest_Nk[:, 0], torch.stack(said).logsumexp(0).exp()

    def _expert(self, expert: int) -> TagClassifier:
        if expert not in self._experts:
            artifact: Artifact = self._store.get(f"experts/{expert_name(expert)}")
            self._experts[expert] = load_network(artifact)
        return self._experts[expert]
