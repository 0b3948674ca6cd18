"""The mixture as a teacher: what it says of the images that a network in training sees, and where it puts them.

    loss = (1 - w) * loss on the hashtags + w * T^2 * KL(mixture at T || network at T) + v * (1 - cos(P f, z))

f are the network's features, z the mixture's embedding in the unified space, P a linear map that is trained along and dropped.
An example goes to the expert of its own part, as when the decoder was fitted: a crop is another view of the same example, not
another example, and experts train on crops of their own part. Rejected: to route every crop anew, which costs a pass of the
trunk a step and asks experts about images of parts that they have never trained on. Of two images mixed, that with the larger
share decides.

Whether the mixture answers anew at every step is decided by what the network sees. Cached answers are wrong for what a crop or
a mixture shows (see `training.distillation`), so where anything is augmented the experts see the very augmented images: a batch
grouped by expert, one forward pass an image without a gradient. Where nothing is, an image looks the same in every epoch, and
what its expert says of it was computed already: the `embeddings` that the decoder was fitted to, and which the mixture is judged
by. They are the teacher then, no expert is read, and the answers cost an alignment and a decoder. Rejected: passes of experts
there too, which would say the same again in every epoch; and the cache everywhere, which is cheaper and wrong.

Rejected for the embedding: a squared distance, which the length of z decides, and that differs from part to part.

Shape letters: B batch, n some of it, S side in pixels, N training examples, E features of an expert, D features of the network,
Z unified dims, V tags.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from hardmoe.data.ids import id_order, sortable
from hardmoe.data.schemas import EMBEDDINGS
from hardmoe.distil.config import StudentConfig
from hardmoe.errors import DataError
from hardmoe.hashing import derive_seed
from hardmoe.models.backbones import Backbone, TagClassifier, seeded_initialisation
from hardmoe.models.network_cache import NetworkCache
from hardmoe.models.shared_decoder import SharedDecoder, load_shared_decoder
from hardmoe.stage import InputArtifact
from hardmoe.tables import ids_to_array, read_table, vectors_to_array
from hardmoe.training.config import LossName
from hardmoe.training.distillation import PROJECTION, Asked, blended_loss
from hardmoe.training.network import flops_of, load_network, load_weights


@dataclass(frozen=True)
class Known:
    """The training examples in ascending order of their ids, and what is stored of each."""

    ids_N16: NDArray[np.uint8]
    experts_N: NDArray[np.int64]
    embeddings_NE: NDArray[np.float16] | None
    """What their experts say of the images as they are; None where those are asked again."""

    @classmethod
    def read(cls, embeddings: InputArtifact, with_embeddings: bool) -> "Known":
        """From the artifact of that name."""
        columns = [*("example_id", "expert"), *(["embedding"] if with_embeddings else [])]
        tables = [read_table(embeddings.storage, p, EMBEDDINGS, columns) for p in embeddings.files("split=train/")]
        ids_N16 = np.concatenate([np.zeros((0, 16), np.uint8), *(ids_to_array(t.column("example_id")) for t in tables)])
        experts = [table.column("expert").to_numpy() for table in tables]
        experts_N = np.concatenate([np.zeros(0, np.int64), *experts]).astype(np.int64)
        order_N = id_order(ids_N16)
        if not with_embeddings:
            return cls(ids_N16[order_N], experts_N[order_N], None)
        vectors = [vectors_to_array(table.column("embedding")) for table in tables]
        embeddings_NE = np.concatenate([np.zeros((0, embeddings.payload["dim"]), np.float16), *vectors])
        return cls(ids_N16[order_N], experts_N[order_N], embeddings_NE[order_N])

    def places(self, ids_B16: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Where examples stand, int64 [B].

        Raises:
            DataError: one of them is not there.
        """
        known_N, asked_B = sortable(self.ids_N16), sortable(ids_B16)
        places_B = np.searchsorted(known_N, asked_B)
        found_B = places_B < len(known_N)
        found_B[found_B] = known_N[places_B[found_B]] == asked_B[found_B]
        if not found_B.all():
            missing = ids_B16[np.flatnonzero(~found_B)[0]].tobytes().hex()
            raise DataError(f"the mixture has no embedding of the training example {missing}; rebuild the embeddings")
        return places_B.astype(np.int64)


@dataclass(frozen=True)
class MixtureTeacher:
    """See the module, and `training.distillation.Teacher`."""

    student: StudentConfig
    known: Known
    decoder: SharedDecoder
    experts: Sequence[InputArtifact]
    """None of them where the embeddings are known."""
    flops: int
    """See `Teacher`."""
    networks: NetworkCache[Backbone] | None = None
    """The experts on the device; None while it is on none, and where none is asked."""

    @classmethod
    def of(
        cls, student: StudentConfig, embeddings: InputArtifact, decoder: InputArtifact, experts: Sequence[InputArtifact]
    ) -> "MixtureTeacher":
        """Of a finished mixture; without experts, one that answers by the embeddings that there are."""
        shared = load_shared_decoder(decoder).requires_grad_(False)
        told = decoder.payload
        own = (told["dim"] + 1) * told["num_tags"]
        # Two operations for each weight of one alignment and of the decoder.
        answer = 2 * (own + (told["parameters"] - own) // max(1, told["experts"]))
        passed = flops_of(experts[0]) if experts else 0
        return cls(student, Known.read(embeddings, not experts), shared, tuple(experts), passed + answer)

    def on(self, device: torch.device) -> "MixtureTeacher":
        """See `Teacher`; an expert is read when a batch has images of its part for the first time."""
        decoder = self.decoder.to(device).eval()
        if not self.experts:
            return replace(self, decoder=decoder)

        def load(expert: int) -> Backbone:
            backbone = load_network(self.experts[expert]).backbone.requires_grad_(False)
            return backbone.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload, no-any-return]

        memory_gib = self.student.memory_gib
        most_bytes = None if memory_gib is None else int(memory_gib * 2**30)
        return replace(self, decoder=decoder, networks=NetworkCache(load, most_bytes))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Teacher`; one expert after another."""
        settings = (self.student.weight, self.student.temperature, self.student.embedding_weight)
        yield "settings", torch.tensor(settings, dtype=torch.float64)
        yield "experts", torch.from_numpy(self.known.experts_N)
        if self.known.embeddings_NE is not None:
            yield "embeddings", torch.from_numpy(self.known.embeddings_NE)
        yield from sorted(self.decoder.state_dict().items())
        for number, expert in enumerate(self.experts):
            for name, tensor in sorted(load_weights(expert).items()):
                yield f"{number}.{name}", tensor

    def keys(self, ids_B16: NDArray[np.uint8]) -> Tensor:
        """Where the examples stand among those known."""
        return torch.from_numpy(self.known.places(ids_B16))

    def prepare(self, model: TagClassifier, seed: int) -> None:
        """Give the network the linear map from its features into the unified space."""
        if self.student.embedding_weight:
            with seeded_initialisation(derive_seed(seed, PROJECTION)):
                model.add_module(PROJECTION, nn.Linear(model.backbone.num_features, self.decoder.dim))

    def blended(self, loss: Tensor, asked: Asked, loss_name: LossName) -> Tensor:
        """See `Teacher` and the module's formula."""
        unified_BZ, teacher_BV = self.answers(asked.images_B3SS, asked.keys_B)
        loss = blended_loss(loss, asked.logits_BV, teacher_BV, (self.student.weight, self.student.temperature), loss_name)
        if not self.student.embedding_weight:
            return loss
        projected_BZ: Tensor = asked.model.get_submodule(PROJECTION)(asked.features_BD)
        return loss + self.student.embedding_weight * mean_angle(projected_BZ.float(), unified_BZ)

    @torch.no_grad()
    def answers(self, images_B3SS: Tensor, keys_B: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture's embeddings [B, Z] and logits [B, V] of images, float32 on their device.

        Args:
            images_B3SS: normalised; not looked at where the embeddings are known.
            keys_B: from `keys`.
        """
        experts_B = torch.from_numpy(self.known.experts_N)[keys_B]
        features_BE = self._features(images_B3SS, keys_B, experts_B)
        with torch.autocast(images_B3SS.device.type, enabled=False):
            unified_BZ = self.decoder.align(features_BE.float(), experts_B.to(images_B3SS.device))
            return unified_BZ, self.decoder.decode(unified_BZ)

    def _features(self, images_B3SS: Tensor, keys_B: Tensor, experts_B: Tensor) -> Tensor:
        """Every image's features of its own expert, float [B, E] on the images' device."""
        device = images_B3SS.device
        if self.known.embeddings_NE is not None:
            return torch.from_numpy(self.known.embeddings_NE[keys_B.numpy()]).to(device)
        assert self.networks is not None, "it answers on a device only"
        pieces, order = [], []
        for expert in torch.unique(experts_B).tolist():
            rows_n = torch.nonzero(experts_B == expert).reshape(-1)
            images_n3SS = images_B3SS[rows_n.to(device)].contiguous(memory_format=torch.channels_last)
            pieces.append(self.networks.get(expert)(images_n3SS))
            order.append(rows_n)
        return torch.cat(pieces)[torch.argsort(torch.cat(order)).to(device)]


def mean_angle(first_BZ: Tensor, second_BZ: Tensor) -> Tensor:
    """Mean over the rows of 1 - cosine, a scalar; of a row without a length 1."""
    return 1 - functional.cosine_similarity(first_BZ, second_BZ, dim=1).mean()
