"""How well a classifier does on held-out examples while it trains.

Only what the training's log needs; the final metrics with their intervals belong to the evaluation stage.

Shape letters: B batch, D feature dim, V tags.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from hardmoe.data.loader import ExampleSet
from hardmoe.models.backbones import TagClassifier
from hardmoe.training.config import LossName
from hardmoe.training.inference import predict_features


@dataclass(frozen=True)
class ValidationScores:
    """Means over the validation examples."""

    precision_at_1: float
    """Share of examples whose best tag is one of theirs."""
    loss: float
    """The training loss, without weights of tags and smoothing, in float64; with `one_tag` its mean over what may be drawn."""


def validate(
    model: TagClassifier, examples: ExampleSet, batch_size: int, device: torch.device, loss_name: LossName = "softmax"
) -> ValidationScores:
    """Score a classifier, in evaluation mode, on labelled examples (at least one)."""
    hits, loss, start = 0, 0.0, 0
    for features_BD in predict_features(model.backbone, examples.sequential_images(batch_size), batch_size, device):
        positions_B = np.arange(start, start + len(features_BD))
        with torch.inference_mode():
            logits_BV = model.decoder(features_BD).double().cpu()
        targets_BV = examples.targets_at(positions_B).dense(logits_BV.shape[1], torch.device("cpu")).double()
        # NumPy's argmax takes the first of equals; torch promises no order.
        best_B = logits_BV.numpy().argmax(axis=1)
        hits += int((targets_BV.numpy()[np.arange(len(best_B)), best_B] > 0).sum())
        if loss_name == "sigmoid":
            loss += float(binary_cross_entropy_with_logits(logits_BV, (targets_BV > 0).double(), reduction="sum"))
        else:
            loss -= float((targets_BV * torch.log_softmax(logits_BV, dim=1)).sum())
        start += len(features_BD)
    return ValidationScores(hits / len(examples), loss / len(examples))
