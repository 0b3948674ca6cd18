"""What the fit minimises: alignment, decoder and loss of one batch, over all tags or some of them.

Shape letters: B batch, Z unified dims, V tags, T chosen tags, C tags of one shard, L labels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hardmoe.data.loader import SparseTargets
from hardmoe.decoder.config import DecoderConfig
from hardmoe.decoder.embeddings import EmbeddingSet, ExampleSource
from hardmoe.decoder.linear_loss import SHARD_TAGS, BatchLabels, LossForm, linear_loss
from hardmoe.decoder.optimizer import DecoderRows
from hardmoe.decoder.sampling import TagSampler
from hardmoe.hashing import hash_fractions
from hardmoe.models.shared_decoder import SharedDecoder
from hardmoe.training.config import LossName
from hardmoe.training.losses import one_tag_each
from hardmoe.training.validation import ValidationScores

VALIDATION_BATCH = 1024
VALIDATION_SEED = 0
"""In whose order, of epoch 0, validation examples are added up: wherever they lie, the sum has the same bits."""


@dataclass(frozen=True)
class Objective:
    """The loss of one fit."""

    model: SharedDecoder
    config: DecoderConfig
    seed: int
    """Of the fit; decides which tags are drawn."""
    sampler: TagSampler | None
    """Of `classes: sampled`."""

    @classmethod
    def of(cls, model: SharedDecoder, config: DecoderConfig, seed: int, training: ExampleSource) -> "Objective":
        """As the config says, on these examples."""
        sampler = None
        if config.classes == "sampled":
            sampler = TagSampler(training.tag_counts(model.num_tags), config.sampled_tags, seed)
        return cls(model, config, seed, sampler)

    def loss(self, batch: EmbeddingSet, step: int) -> tuple[Tensor, DecoderRows | None]:
        """The mean loss of a batch, float32, and the rows of the decoder that were computed if these are not all of them."""
        device = self.model.decoder.weight.device
        points_BZ = self.model.scaled(self.model.align(*batch.tensors(device)))
        targets = self._targets(batch, step)
        shard = SHARD_TAGS if self.config.classes == "sharded" else None
        if self.sampler is None:
            form = LossForm(self.config.loss == "sigmoid", shard)
            labels = BatchLabels(targets.rows_L.to(device), targets.indices_L.to(device), targets.weights_L.to(device))
            weight_VZ = self.model.rows(self.model.decoder.weight)
            return linear_loss(points_BZ, weight_VZ, self.model.decoder.bias, labels, form), None
        indices_L = targets.indices_L.numpy()
        chosen = self.sampler.choose(indices_L, step)
        rows = DecoderRows.of(self.model, torch.from_numpy(chosen.tags_T).to(device))
        places_L = torch.from_numpy(np.searchsorted(chosen.tags_T, indices_L)).to(device)
        labels = BatchLabels(targets.rows_L.to(device), places_L, targets.weights_L.to(device))
        probabilities_T = torch.from_numpy(chosen.probabilities_T.astype(np.float32)).to(device)
        weight_TZ, bias_T = self.model.rows(rows.weight_TZ), rows.bias_T
        if self.config.loss == "sigmoid":
            return linear_loss(points_BZ, weight_TZ, bias_T, labels, LossForm(True, shard, 1 / probabilities_T)), rows
        return linear_loss(points_BZ, weight_TZ, bias_T - probabilities_T.log(), labels, LossForm(False, shard)), rows

    def _targets(self, batch: EmbeddingSet, step: int) -> SparseTargets:
        targets = batch.targets()
        if self.config.loss == "one_tag":
            return one_tag_each(targets, hash_fractions(batch.ids_N16, self.seed, "one_tag", step))
        if self.config.loss == "sigmoid":
            return SparseTargets(targets.num_rows, targets.rows_L, targets.indices_L, torch.ones_like(targets.weights_L))
        return targets


def evaluate(model: SharedDecoder, examples: ExampleSource, loss_name: LossName = "softmax") -> ValidationScores:
    """Mean loss in float64 (with `one_tag` its mean over what may be drawn) and precision@1 of at least one example."""
    hits, loss = 0, 0.0
    for batch in examples.batches(VALIDATION_SEED, 0, VALIDATION_BATCH):
        with torch.inference_mode():
            batch_hits, batch_loss = _evaluate_batch(model, batch, loss_name == "sigmoid")
        hits += batch_hits
        loss += batch_loss
    return ValidationScores(hits / len(examples), loss / len(examples))


def _evaluate_batch(model: SharedDecoder, batch: EmbeddingSet, sigmoid: bool) -> tuple[int, float]:
    """Hits and summed loss, from a shard of tags at a time."""
    points_BZ = model.scaled(model.align(*batch.tensors(model.decoder.weight.device)))
    targets = batch.targets()
    best_B, best_tag_B = np.full(len(batch), -np.inf), np.zeros(len(batch), np.int64)
    normalisers, loss = [], 0.0
    for start in range(0, model.num_tags, SHARD_TAGS):
        shard = slice(start, start + SHARD_TAGS)
        weight_CZ = model.rows(model.decoder.weight[shard])
        logits_BC = functional.linear(points_BZ, weight_CZ, model.decoder.bias[shard]).double().cpu()
        inside_L = (targets.indices_L >= start) & (targets.indices_L < start + logits_BC.shape[1])
        positives_l = logits_BC[targets.rows_L[inside_L], targets.indices_L[inside_L] - start]
        loss -= float(positives_l.sum() if sigmoid else (positives_l * targets.weights_L[inside_L]).sum())
        if sigmoid:
            loss += float(functional.softplus(logits_BC).sum())
        else:
            normalisers.append(logits_BC.logsumexp(1))
        _keep_best(logits_BC.numpy(), start, best_B, best_tag_B)
    if normalisers:
        loss += float(torch.stack(normalisers).logsumexp(0).sum())
    rows_L, indices_L = targets.rows_L.numpy(), targets.indices_L.numpy()
    return int((best_tag_B[rows_L] == indices_L).sum()), loss


def _keep_best(logits_BC: NDArray[np.float64], start: int, best_B: NDArray[np.float64], best_tag_B: NDArray[np.int64]) -> None:
    """The largest logit so far and its tag, the first of equals: NumPy's argmax takes that, torch promises no order."""
    places_B = logits_BC.argmax(axis=1)
    found_B = logits_BC[np.arange(len(places_B)), places_B]
    better_B = found_B > best_B
    best_B[better_B] = found_B[better_B]
    best_tag_B[better_B] = start + places_B[better_B]
