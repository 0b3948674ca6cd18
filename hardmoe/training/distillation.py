"""Distillation: a training that also follows the outputs of a finished network (Hinton, Vinyals, Dean 2015, arXiv 1503.02531).

    loss = (1 - weight) * loss on the hashtags + weight * T^2 * KL(teacher's distribution at T || the network's at T)

Equation and the factor T^2, which keeps the gradient's length, from its section 2; with the sigmoid loss there is a distribution
for every hashtag, and the divergences are summed. The teacher sees the very images that the network sees, augmented and mixed
(Beyer et al. 2022, arXiv 2106.05237), so its outputs cannot be computed in advance: a step costs one more forward pass, of the
teacher, without a gradient. Rejected: cached outputs of the plain images, which are wrong for what a crop or a mixture shows.

Shape letters: B batch, S side in pixels, V tags.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hardmoe.models.backbones import TagClassifier
from hardmoe.training.config import DistillConfig, LossName


@dataclass(frozen=True)
class Teacher:
    """A finished network and how much its outputs count."""

    network: TagClassifier
    config: DistillConfig

    def on(self, device: torch.device) -> "Teacher":
        """The same, on a device and in the mode and layout in which it answers."""
        network = self.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Teacher(network.eval().requires_grad_(False), self.config)

    def blended(self, loss: Tensor, logits_BV: Tensor, images_B3SS: Tensor, loss_name: LossName) -> Tensor:
        """The loss of a batch, float32 scalar, with the teacher's share in it.

        Args:
            loss: on the hashtags, a mean over the batch.
            logits_BV: of the network.
            images_B3SS: what the network saw, normalised.
            loss_name: the training's.
        """
        with torch.no_grad():
            _, teacher_BV = self.network(images_B3SS)
        weight, temperature = self.config.weight, self.config.temperature
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
