"""Distillation: a training that also follows the outputs of a finished teacher (Hinton, Vinyals, Dean 2015, arXiv 1503.02531).

    loss = (1 - weight) * loss on the hashtags + weight * T^2 * KL(teacher's distribution at T || the network's at T)

Equation and the factor T^2, which keeps the gradient's length, from its section 2; with the sigmoid loss there is a distribution
for every hashtag, and the divergences are summed. The teacher sees the very images that the network sees, augmented and mixed
(Beyer et al. 2022, arXiv 2106.05237), so its outputs cannot be computed in advance: a step costs one more forward pass, of the
teacher, without a gradient. Rejected: cached outputs of the plain images, which are wrong for what a crop or a mixture shows.

The trunk is the teacher of experts (`NetworkTeacher`), a whole mixture that of the distilled network (`distil.teacher`): a
training knows the protocol alone.

Shape letters: B batch, S side in pixels, D features, V tags.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hardmoe.models.backbones import TagClassifier
from hardmoe.training.config import DistillConfig, LossName

PROJECTION = "projection"
"""Name of a module that a teacher may give the network for the time of the training, to be moved with it and then dropped."""


@dataclass(frozen=True)
class Asked:
    """A piece of a batch as the network in training saw it, and what it said."""

    model: TagClassifier
    images_B3SS: Tensor
    """What the network saw, normalised, on its device."""
    keys_B: Tensor
    """The teacher's `keys` of them, int64 in the host's memory; of a mixed image that of the one with the larger share."""
    features_BD: Tensor
    logits_BV: Tensor


class Teacher(Protocol):
    """Whatever a training follows beside the hashtags."""

    @property
    def flops(self) -> int:
        """Floating-point operations that its answer about one image costs."""
        ...

    def on(self, device: torch.device) -> "Teacher":
        """The same, on a device and in the mode and layout in which it answers; what is not on one can be pickled."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that its answers depend on, in an order that is always the same."""
        ...

    def keys(self, ids_B16: NDArray[np.uint8]) -> Tensor:
        """What it has to know of examples beside their images, int64 [B] in the host's memory."""
        ...

    def prepare(self, model: TagClassifier, seed: int) -> None:
        """Give a network before its first step what the comparison needs, as its module `PROJECTION`."""
        ...

    def blended(self, loss: Tensor, asked: Asked, loss_name: LossName) -> Tensor:
        """The loss of a piece, float32 scalar, with the teacher's share in it.

        Args:
            loss: on the hashtags, a mean over the piece.
            asked: the piece.
            loss_name: the training's.
        """
        ...


@dataclass(frozen=True)
class NetworkTeacher:
    """A finished network and how much its outputs count."""

    network: TagClassifier
    config: DistillConfig
    flops: int = 0
    """See `Teacher`."""

    def on(self, device: torch.device) -> "NetworkTeacher":
        """See `Teacher`."""
        network = self.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return NetworkTeacher(network.eval().requires_grad_(False), self.config, self.flops)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Its weights."""
        yield from sorted(self.network.state_dict().items())

    def keys(self, ids_B16: NDArray[np.uint8]) -> Tensor:
        """It looks at the images alone."""
        return torch.zeros(len(ids_B16), dtype=torch.int64)

    def prepare(self, model: TagClassifier, seed: int) -> None:
        """It compares distributions over the same hashtags, which needs nothing."""

    def blended(self, loss: Tensor, asked: Asked, loss_name: LossName) -> Tensor:
        """See `Teacher`."""
        with torch.no_grad():
            _, teacher_BV = self.network(asked.images_B3SS)
        return blended_loss(loss, asked.logits_BV, teacher_BV, (self.config.weight, self.config.temperature), loss_name)


def drop_projection(model: TagClassifier) -> None:
    """Take from a trained network what its teacher gave it."""
    if hasattr(model, PROJECTION):
        delattr(model, PROJECTION)


def blended_loss(
    loss: Tensor, logits_BV: Tensor, teacher_BV: Tensor, weight_and_temperature: tuple[float, float], loss_name: LossName
) -> Tensor:
    """The loss on the hashtags and the distance to the teacher's logits in their shares, float32 scalar."""
    weight, temperature = weight_and_temperature
    formula = bernoulli_divergence if loss_name == "sigmoid" else softmax_divergence
    divergence = formula(logits_BV.float() / temperature, teacher_BV.float() / temperature)
    return (1 - weight) * loss + weight * temperature**2 * divergence


def softmax_divergence(logits_BV: Tensor, teacher_BV: Tensor) -> Tensor:
    """Mean over the batch of KL(softmax(teacher) || softmax(logits))."""
    log_p_BV, log_q_BV = functional.log_softmax(teacher_BV, dim=1), functional.log_softmax(logits_BV, dim=1)
    return functional.kl_div(log_q_BV, log_p_BV, reduction="batchmean", log_target=True)


def bernoulli_divergence(logits_BV: Tensor, teacher_BV: Tensor) -> Tensor:
    """Mean over the batch of the sum over the tags of KL(sigmoid(teacher) || sigmoid(logits))."""
    p_BV = torch.sigmoid(teacher_BV)
    cross, entropy = (functional.binary_cross_entropy_with_logits(x, p_BV, reduction="sum") for x in (logits_BV, teacher_BV))
    return (cross - entropy) / len(logits_BV)
