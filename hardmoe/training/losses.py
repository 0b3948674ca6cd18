"""The training losses on hashtags, each a mean over the batch of a sum over the tags.

- `softmax`: cross-entropy with target 1/k on each of an image's k tags (Mahajan et al. 2018, arXiv 1805.00932, section 2.2), the
  default.
- `one_tag`: cross-entropy with target 1 on one of the k, drawn by hash of (seed, step, example id): the other form in that
  section; over the steps its mean is that of `softmax`.
- `sigmoid`: binary cross-entropy of every tag, summed and not averaged over them, so that its gradient on a logit, p - y, is as
  long as the softmax's and learning rates carry over. A fresh decoder's biases begin at the log odds of the tags' shares
  (`start_from_shares`; Lin et al. 2017, arXiv 1708.02002, section 4.1): from zero, V log 2 of the first losses is spent on
  learning that tags are rare. Rejected as the default: Mahajan et al. and others find it worse on noisy tags of very unequal
  frequency.

Weights of tags scale a tag's whole term, presence and absence alike, so that each tag's best answer stays its probability.

Shape letters: B batch, L labels, V tags.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from hardmoe.data.loader import ExampleSet, SparseTargets, TrainingBatch
from hardmoe.hashing import hash_fractions
from hardmoe.training.config import LossName, TrainingConfig


@dataclass(frozen=True)
class TagLoss:
    """The loss of one training."""

    name: LossName
    seed: int
    """Of the training; decides which tag `one_tag` draws."""
    smoothing: float = 0.0
    """Share of the targets that is spread over the vocabulary."""
    weights_V: Tensor | None = None
    """float32, on the device."""

    def targets(self, batch: TrainingBatch, step: int, num_tags: int, device: torch.device) -> Tensor:
        """What the network is to learn from a batch, float32 [B, V] on the device."""
        targets = batch.targets
        if self.name == "one_tag":
            targets = one_tag_each(targets, hash_fractions(batch.ids_B16, self.seed, "one_tag", step))
        elif self.name == "sigmoid":
            targets = replace(targets, weights_L=torch.ones_like(targets.weights_L))
        targets_BV = targets.dense(num_tags, device)
        return targets_BV.mul_(1 - self.smoothing).add_(self.smoothing / num_tags) if self.smoothing else targets_BV

    def __call__(self, logits_BV: Tensor, targets_BV: Tensor) -> Tensor:
        """A float32 scalar."""
        formula = sigmoid_cross_entropy if self.name == "sigmoid" else softmax_cross_entropy_multi
        return formula(logits_BV, targets_BV, self.weights_V)


def build_loss(config: TrainingConfig, examples: ExampleSet, num_tags: int, seed: int, device: torch.device) -> TagLoss:
    """The loss that a config asks for, on a training set."""
    weights_V = None
    if config.class_weights == "inverse_sqrt":
        weights_V = inverse_sqrt_weights(tag_counts(examples, num_tags)).to(device)
    return TagLoss(config.loss, seed, config.label_smoothing, weights_V)


def softmax_cross_entropy_multi(logits_BV: Tensor, targets_BV: Tensor, weights_V: Tensor | None = None) -> Tensor:
    """Mean over the batch of -sum_v weight_v target_v log softmax(logits)_v, in float32 whatever autocast says.

    Args:
        logits_BV: [B, V], any floating type.
        targets_BV: float [B, V], rows summing to 1 (1/k on each of k tags).
        weights_V: float32 [V]; None for 1.

    Returns:
        A float32 scalar.
    """
    _check_same_shape(logits_BV, targets_BV)
    log_probabilities_BV = functional.log_softmax(logits_BV.float(), dim=1)
    targets_BV = targets_BV.float() if weights_V is None else targets_BV * weights_V
    return -(targets_BV * log_probabilities_BV).sum(dim=1).mean()


def sigmoid_cross_entropy(logits_BV: Tensor, targets_BV: Tensor, weights_V: Tensor | None = None) -> Tensor:
    """Mean over the batch of the sum over the tags of weight_v times tag v's binary cross-entropy, in float32.

    Args:
        logits_BV: [B, V], any floating type.
        targets_BV: float [B, V], 1 on an image's tags, between 0 and 1 where they were smoothed or mixed.
        weights_V: float32 [V]; None for 1.

    Returns:
        A float32 scalar.
    """
    _check_same_shape(logits_BV, targets_BV)
    total = functional.binary_cross_entropy_with_logits(logits_BV.float(), targets_BV.float(), weights_V, reduction="sum")
    return total / len(logits_BV)


def one_tag_each(targets: SparseTargets, fractions_B: NDArray[np.float64]) -> SparseTargets:
    """Targets with 1 on one tag of every row.

    Args:
        targets: rows one after another, each with at least one tag.
        fractions_B: float64 [B] in [0, 1): which of the row's tags, as a share of their number.
    """
    lengths_B = np.bincount(targets.rows_L.numpy(), minlength=targets.num_rows)
    chosen_B = np.cumsum(lengths_B) - lengths_B + np.floor(fractions_B * lengths_B).astype(np.int64)
    return SparseTargets(
        num_rows=targets.num_rows,
        rows_L=torch.arange(targets.num_rows),
        indices_L=targets.indices_L[torch.from_numpy(chosen_B)],
        weights_L=torch.ones(targets.num_rows),
    )


def tag_counts(examples: ExampleSet, num_tags: int) -> NDArray[np.int64]:
    """How many examples have each tag, int64 [V]."""
    return np.bincount(examples.label_indices_L, minlength=num_tags)


def inverse_sqrt_weights(counts_V: NDArray[np.int64]) -> Tensor:
    """float32 [V]: in proportion to 1 / sqrt(count), 1 on average over all labels; tags without examples count as with one."""
    weights_V = 1 / np.sqrt(np.maximum(counts_V, 1).astype(np.float64))
    return torch.from_numpy((weights_V * counts_V.sum() / (weights_V * counts_V).sum()).astype(np.float32))


def start_from_shares(decoder: nn.Linear, examples: ExampleSet) -> None:
    """Set a decoder's biases to the log odds of every tag's share of the examples, half an example added to either side."""
    log_odds_V = log_odds_of_shares(tag_counts(examples, decoder.out_features), len(examples))
    with torch.no_grad():
        decoder.bias.copy_(torch.from_numpy(log_odds_V))


def log_odds_of_shares(counts_V: NDArray[np.int64], num_examples: int) -> NDArray[np.float64]:
    """Of every tag's share of the examples, half an example added to either side, float64 [V]."""
    counts = counts_V.astype(np.float64)
    return np.asarray(np.log(counts + 0.5) - np.log(num_examples - counts + 0.5))


def _check_same_shape(logits_BV: Tensor, targets_BV: Tensor) -> None:
    if logits_BV.shape != targets_BV.shape:
        raise ValueError(f"logits {list(logits_BV.shape)} and targets {list(targets_BV.shape)} must have the same shape")
