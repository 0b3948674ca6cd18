"""A finished run as one object: route an image, embed it by its expert, align, decode.

An image costs one pass of the trunk and one of its expert, however many experts there are; where experts branch off the trunk
(`experts.branch_at`), one of the stages that they share and two of the short rests. Experts are loaded when the first
image is routed to them, and evicted again where memory is limited. The trunk's features pass through float16 here as they do on
disk, and are float32 before that on any device, so an image is sent to the same expert in use as in training. The experts' do
not: rounding would make two doors to one mixture, whose last bits differ, differ by 2^-11. A few images make a small batch, as
one alone must not cost a batch of 256; the last bits then depend on how many came together, as matrix products do.

Rejected: one call that does everything, which a server with replicas for experts could not be built of; `see`, `route_seen`,
`embed_seen` (or `load_expert`, `features_of` and `align`, each where it is to be) and `decode` are its steps.

Shape letters: N images, n some of them, S side in pixels, C channels of a map, H and W its sides, D features, Z unified dims,
V tags.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from hardmoe.artifacts.fingerprint import digest
from hardmoe.artifacts.gate import has_features_from_elsewhere, has_random_parts
from hardmoe.artifacts.names import expert_name
from hardmoe.artifacts.store import Artifact, ArtifactStore
from hardmoe.data.config import PILLOW_MAX_PIXELS
from hardmoe.data.given_images import pieces, squares
from hardmoe.data.reading import tag_names
from hardmoe.errors import CorruptFileError, DataError, RebuiltInputError
from hardmoe.evaluation.abstention import kept_limit
from hardmoe.evaluation.topk import fitted_temperature, log_weights
from hardmoe.models.backbones import TagClassifier
from hardmoe.models.branching import split
from hardmoe.models.network_cache import NetworkCache
from hardmoe.models.shared_decoder import SharedDecoder, load_shared_decoder
from hardmoe.partitioning.regroup import load_router
from hardmoe.partitioning.router import Router
from hardmoe.storage import open_storage
from hardmoe.training.inference import batch_sizes, predict_features, predict_from_maps
from hardmoe.training.network import architecture_of, load_network
from hardmoe.training.staging import inference_batch_size

if TYPE_CHECKING:
    from hardmoe.data.given_images import GivenImage

Precision = Literal["float32", "bfloat16"]
_PIECE_BYTES = 256 * 2**20
"""Images are decoded so many bytes of squares at a time."""


@dataclass(frozen=True)
class UseOptions:
    """Where and how a mixture computes."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; `auto` is a GPU if there is one."""
    precision: Precision = "float32"
    """Of the experts' arithmetic; `bfloat16` is for GPUs, which do it faster. The trunk stays in float32, as it decides which
    expert an image goes to."""
    compiled: bool = False
    """Whether networks go through `torch.compile`, which takes a minute for each and then saves some of the time."""
    memory_gib: float | None = None
    """What the experts may take together, in GiB; the one in use always stays. None for no limit."""
    coverage: float | None = None
    """Share of images like the run's validation images that is answered, from 0.001 to 0.999: those that are farther from every
    centroid than that share of them get no tag. None answers all. Needs a run with `evaluation.abstention`."""


@dataclass(frozen=True)
class Prediction:
    """One image's tags, best first."""

    expert: int
    """Which expert answered."""
    tags: list[str]
    """None of an image that is refused (`UseOptions.coverage`)."""
    probabilities: list[float]


@dataclass(frozen=True)
class Seen:
    """Images on their way through the mixture."""

    pixels_N3SS: NDArray[np.uint8]
    maps_NCHW: torch.Tensor | None = None
    """What the stages that all networks share make of them; None where they share none."""

    def __len__(self) -> int:
        return len(self.pixels_N3SS)


@dataclass(frozen=True)
class Judged:
    """What the gate says of some images."""

    experts_N: NDArray[np.int32]
    refused_N: NDArray[np.bool_]


class Mixture:
    """Trunk, router, experts and decoder of a finished run.

    Args:
        store: the artifacts of the run.
        options: where and how to compute.
    """

    def __init__(self, store: ArtifactStore, options: UseOptions = UseOptions()) -> None:
        self.store = store
        self.options = options
        self._pinned: dict[str, Artifact] = {}
        name = options.device
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        architecture = architecture_of(self.artifact("trunk"))
        self.reduced = architecture.reduced
        """Whether the JPEG decoder may scale down while it decodes."""
        self.image_size = architecture.image_size
        """S: images are resized (shorter side, then centre crop) to so many pixels."""
        self.backbone = architecture.backbone
        """The name of the trunk's network."""
        most_bytes = None if options.memory_gib is None else int(options.memory_gib * 2**30)
        self.experts: NetworkCache[TagClassifier] = NetworkCache(self.load_expert, most_bytes)
        """The experts in memory."""

    @classmethod
    def load(cls, root: str, options: UseOptions = UseOptions()) -> "Mixture":
        """Open the mixture of a run.

        Args:
            root: the run's root, a path or URI.
            options: where and how to compute.

        Raises:
            MissingRecordError: the run is not finished; names the artifact that is missing.
            DataError: its partition is random, or goes by features that were computed elsewhere; or images are to be refused and
                the run has not kept how far they may be.
        """
        store = ArtifactStore(open_storage(root))
        for name in ("trunk", "partition", "decoder", "vocabulary"):
            store.get(name)
        kept_limit(store, options.coverage)
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
        return cls(store, options)

    @cached_property
    def trunk(self) -> TagClassifier:
        """Loaded when it is first wanted: whoever holds experts alone does without."""
        return load_network(self.artifact("trunk")).to(self.device)

    @cached_property
    def router(self) -> Router:
        """The rule that sends the trunk's features to experts."""
        return load_router(self.artifact("router"))

    @cached_property
    def decoder(self) -> SharedDecoder:
        """The alignments and the shared decoder."""
        return load_shared_decoder(self.artifact("decoder"))

    @cached_property
    def tags(self) -> list[str]:
        """The vocabulary, by index."""
        return tag_names(self.artifact("vocabulary"))

    @cached_property
    def shared_stage(self) -> str | None:
        """The stage up to which the experts are the trunk, which an image passes once; None if they share nothing."""
        # A record holds what differs from the default, which is the image.
        stage: str | None = self.artifact(f"experts/{expert_name(0)}").record.config["experts"].get("branch_at")
        return stage

    @cached_property
    def limit(self) -> float | None:
        """The distance beyond which an image is refused; None refuses none."""
        return kept_limit(self.store, self.options.coverage)

    @property
    def num_experts(self) -> int:
        """K."""
        return self.router.num_experts

    @property
    def piece_size(self) -> int:
        """How many images are decoded and routed at a time."""
        return max(1, _PIECE_BYTES // (3 * self.image_size**2))

    @cached_property
    def artifacts(self) -> dict[str, Artifact]:
        """All that answers depend on, by name."""
        names = ["trunk", "router", "decoder", "vocabulary", *(f"experts/{expert_name(e)}" for e in range(self.num_experts))]
        return {name: self.artifact(name) for name in names}

    def artifact(self, name: str) -> Artifact:
        """An artifact as it was when it was first asked for: what is built anew later belongs to another mixture.

        Raises:
            MissingRecordError: there is none.
        """
        if name not in self._pinned:
            self._pinned[name] = self.store.get(name)
        return self._pinned[name]

    def identity(self) -> str:
        """A digest of all that answers depend on; another one after anything was trained again."""
        return digest({name: artifact.record_digest for name, artifact in self.artifacts.items()})

    def route(self, images: "Sequence[GivenImage]") -> NDArray[np.int32]:
        """The expert of every image, int32 [N]; images as for `predict`."""
        found = [self.route_seen(seen) for seen in self._all_seen(images)]
        return np.concatenate([np.zeros(0, np.int32), *found])

    def embed(self, images: "Sequence[GivenImage]") -> NDArray[np.float32]:
        """Every image's place in the unified space, float32 [N, Z]; images as for `predict`.

        Raises:
            DataError: an image cannot be read or decoded; names its position.
        """
        found = [self.embed_seen(seen, self.route_seen(seen)).numpy() for seen in self._all_seen(images)]
        return np.concatenate([np.zeros((0, self.decoder.dim), np.float32), *found])

    def predict(self, images: "Sequence[GivenImage]", k: int = 10, *, experts: int = 1) -> list[Prediction]:
        """The k most probable tags of every image.

        Args:
            images: each a path or URI, encoded bytes, one of Pillow's images, an array uint8 [height, width, 3], or a tensor
                uint8 [3, height, width].
            k: how many tags.
            experts: how many of the nearest experts are asked: 1, or as many as the run's `evaluation.top_k`, whose weights by
                distance it has fitted. An image costs a pass of each beside the trunk's.

        Raises:
            TypeError: something that is no image, or one image in place of several.
            DataError: an image cannot be read or decoded, names its position; or the run has no weights for so many experts.
        """
        temperature = fitted_temperature(self.store, experts)
        return [each for seen in self._all_seen(images) for each in self._predict(seen, k, experts, temperature)]

    def pixels(self, images: "Sequence[GivenImage]", max_pixels: int = PILLOW_MAX_PIXELS) -> NDArray[np.uint8]:
        """Images as the networks are shown them, uint8 [N, 3, S, S]; larger ones than `max_pixels` are refused."""
        return squares(images, self.image_size, reduced=self.reduced, max_pixels=max_pixels)

    def see(self, pixels_N3SS: NDArray[np.uint8]) -> Seen:
        """The images as gate and experts go on from them."""
        if self.shared_stage is None or not len(pixels_N3SS):
            return Seen(pixels_N3SS)
        shared = split(self.trunk.backbone, self.shared_stage, self.backbone).shared
        found = [
            predict_features(shared, [pixels_N3SS[rows]], size, self.device) for rows, size in self._batches(len(pixels_N3SS))
        ]
        return Seen(pixels_N3SS, torch.cat([maps_BCHW for batches in found for maps_BCHW in batches]))

    def route_seen(self, seen: Seen) -> NDArray[np.int32]:
        """The expert of every image, int32 [N]."""
        return self.router.route(self._routing_features(seen)).primary_N

    def judge_seen(self, seen: Seen) -> Judged:
        """The expert of every image, and which images are refused."""
        features_ND = self._routing_features(seen)
        return Judged(self.router.route(features_ND).primary_N, self._too_far(features_ND))

    def embed_seen(self, seen: Seen, experts_N: NDArray[np.int32]) -> torch.Tensor:
        """Every image's place in the unified space, by the expert given, float32 [N, Z] on the CPU; one expert after another."""
        unified_NZ = torch.empty(len(seen), self.decoder.dim)
        for expert in np.unique(experts_N).tolist():
            rows = np.flatnonzero(experts_N == expert)
            features_nD = self._features(self.experts.get(expert), seen, rows, self.options.precision)
            unified_NZ[rows] = self._aligned(features_nD, expert)
        return unified_NZ

    def align(self, features_ND: torch.Tensor, experts_N: NDArray[np.int32]) -> torch.Tensor:
        """Experts' own features, float32 [N, D], in the unified space, float32 [N, Z]; the expert is given for each row."""
        unified_NZ = torch.empty(len(features_ND), self.decoder.dim)
        for expert in np.unique(experts_N).tolist():
            rows = np.flatnonzero(experts_N == expert)
            unified_NZ[rows] = self._aligned(features_ND[rows], expert)
        return unified_NZ

    def features_of(self, expert: TagClassifier, seen: Seen) -> torch.Tensor:
        """An expert's own features of the images, float32 [N, D] on the CPU; `align` takes them to the unified space."""
        return self._features(expert, seen, np.arange(len(seen)), self.options.precision)

    def load_expert(self, expert: int) -> TagClassifier:
        """The network of an expert, read anew; `experts` has those in memory.

        Raises:
            CorruptFileError: its file is damaged.
            RebuiltInputError: it was trained again since this mixture knows of it.
        """
        artifact = self.artifact(f"experts/{expert_name(expert)}")
        try:
            return load_network(artifact).to(self.device)
        except CorruptFileError as error:
            now = self.store.find(artifact.name)
            if now is not None and now.record_digest == artifact.record_digest:
                raise
            raise RebuiltInputError(
                f"{self.store.storage.where(artifact.name)} was built anew or deleted since the mixture was opened; open it again"
            ) from error

    def warm_up(self) -> None:
        """Load all but experts and route a black square: what is damaged, or slow the first time, shows before anybody waits."""
        assert self.tags and self.decoder.dim and self.artifacts
        self.route_seen(self.see(np.zeros((1, 3, self.image_size, self.image_size), np.uint8)))

    def decode(self, unified_NZ: torch.Tensor) -> torch.Tensor:
        """Probabilities of all tags, float32 [N, V], of points of the unified space, [N, Z]."""
        with torch.inference_mode():
            return torch.softmax(self.decoder.decode(unified_NZ), dim=1)

    def best(
        self, probabilities_NV: torch.Tensor, experts_N: NDArray[np.int32], k: int, refused_N: NDArray[np.bool_] | None = None
    ) -> list[Prediction]:
        """The k most probable tags of every row, best first, and of equals that with the lower index; none of those refused."""
        top = torch.sort(probabilities_NV, dim=1, descending=True, stable=True)
        rows = zip(experts_N.tolist(), top.indices[:, :k].tolist(), top.values[:, :k].tolist(), strict=True)
        found = [Prediction(expert, [self.tags[i] for i in indices], values) for expert, indices, values in rows]
        for row in [] if refused_N is None else np.flatnonzero(refused_N).tolist():
            found[row] = Prediction(found[row].expert, [], [])
        return found

    def _all_seen(self, images: "Sequence[GivenImage]") -> Iterator[Seen]:
        for piece in pieces(images, self.image_size, _PIECE_BYTES):
            yield self.see(self.pixels(piece))

    def _predict(self, seen: Seen, k: int, experts: int, temperature: float) -> list[Prediction]:
        if experts == 1:
            judged = self.judge_seen(seen)
            return self.best(self.decode(self.embed_seen(seen, judged.experts_N)), judged.experts_N, k, judged.refused_N)
        judged, probabilities_NV = self._mixed(seen, experts, temperature)
        return self.best(probabilities_NV, judged.experts_N, k, judged.refused_N)

    def _too_far(self, features_ND: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which images are refused, by the trunk's features as they are stored, bool [N]."""
        if self.limit is None:
            return np.zeros(len(features_ND), bool)
        _, squared_N1 = self.router.nearest(features_ND, 1)
        return np.asarray(np.sqrt(squared_N1[:, 0]) > self.limit)

    def _batches(self, num_images: int) -> Iterator[tuple[slice, int]]:
        """Images that pass in batches of one size, and the size: of most, that of the stages which compute the same."""
        start = 0
        for size, same in groupby(batch_sizes(num_images, inference_batch_size(self.image_size, self.device))):
            end = start + size * len(list(same))
            yield slice(start, end), size
            start = end

    def _features(
        self, network: TagClassifier, seen: Seen, rows_n: NDArray[np.int64], precision: Precision = "float32"
    ) -> torch.Tensor:
        """A network's features of some of the images, float32 [n, D] on the CPU."""
        found = [torch.zeros(0, network.backbone.num_features)]
        with torch.autocast(self.device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext():
            found += [self._passed(network, seen, rows_n[rows], size) for rows, size in self._batches(len(rows_n))]
        return torch.cat(found)

    def _passed(self, network: TagClassifier, seen: Seen, rows_n: NDArray[np.int64], size: int) -> torch.Tensor:
        if seen.maps_NCHW is None or self.shared_stage is None:
            backbone = self._maybe_compiled(network.backbone)
            batches = predict_features(backbone, [seen.pixels_N3SS[rows_n]], size, self.device)
            return torch.cat([features_BD.cpu() for features_BD in batches])
        rest = split(network.backbone, self.shared_stage, self.backbone).rest
        maps_nCHW = seen.maps_NCHW[torch.from_numpy(rows_n).to(self.device)]
        return predict_from_maps(self._maybe_compiled(rest), maps_nCHW, size).cpu()

    def _maybe_compiled(self, network: torch.nn.Module) -> torch.nn.Module:
        return cast(torch.nn.Module, torch.compile(network)) if self.options.compiled else network

    def _routing_features(self, seen: Seen) -> NDArray[np.float32]:
        """The trunk's features as they are stored: rounded to float16, float32 [N, D]."""
        return self._features(self.trunk, seen, np.arange(len(seen))).numpy().astype(np.float16).astype(np.float32)

    def _mixed(self, seen: Seen, num_experts: int, temperature: float) -> tuple[Judged, torch.Tensor]:
        """The nearest expert of each, and the probabilities [N, V] that several mix as `evaluation.topk` does."""
        features_ND = self._routing_features(seen)
        nearest_Nk, squared_Nk = self.router.nearest(features_ND, num_experts)
        weights_Nk = torch.from_numpy(log_weights(squared_Nk, temperature)).float()
        with torch.inference_mode():
            logits = [self.decoder.decode(self.embed_seen(seen, experts_N)) for experts_N in nearest_Nk.T]
            said = [torch.log_softmax(each_NV, dim=1) + weights_Nk[:, at, None] for at, each_NV in enumerate(logits)]
        return Judged(nearest_Nk[:, 0], self._too_far(features_ND)), torch.stack(said).logsumexp(0).exp()

    def _aligned(self, features_nD: torch.Tensor, expert: int) -> torch.Tensor:
        with torch.inference_mode():
            return self.decoder.align(features_nD, torch.full((len(features_nD),), expert, dtype=torch.int64))
