"""Fit alignment and decoder together on the experts' cached embeddings, the experts frozen.

AdamW with half a cosine, the hashtag loss, batches in the order of hash(seed, epoch, id): a function of the examples, not
of how they are sharded. Resuming from a checkpoint gives the same bytes as never having stopped. The last weights are the
result: the cosine has come to rest there, and choosing an epoch on the validation split would be one more thing to hold
alike for `dense_refit`. That control is this same code with K = 1.

Rejected: fitting the decoder while running the experts (an epoch would cost a pass of every expert instead of seconds),
and L-BFGS over all examples (with the alignment the problem is not convex, and full passes over many images are dear).

Shape letters: N examples, E features of an expert, L labels, V tags, K experts, B batch.
"""

import hashlib
import json
import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, optim

from hardmoe.data.ids import order_of_distinct
from hardmoe.data.loader import SparseTargets
from hardmoe.data.ragged import take_rows
from hardmoe.data.resampling import batch_slice, epoch_order, num_batches
from hardmoe.decoder.config import DecoderConfig
from hardmoe.errors import DataError, HardmoeError
from hardmoe.hashing import derive_seed
from hardmoe.models.shared_decoder import SharedDecoder
from hardmoe.training.determinism import deterministic
from hardmoe.training.loop import TrainingProgress, TrainingResult, TrainingSinks
from hardmoe.training.losses import softmax_cross_entropy_multi
from hardmoe.training.validation import ValidationScores

logger = logging.getLogger(__name__)

VALIDATION_BATCH = 1024


@dataclass(frozen=True)
class EmbeddingSet:
    """Cached embeddings sorted by id, with their labels in compressed sparse rows; build it with `from_rows`."""

    ids_N16: NDArray[np.uint8]
    embeddings_NE: NDArray[np.float16]
    experts_N: NDArray[np.int32]
    label_indices_L: NDArray[np.int32]
    label_offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids_N16)

    @property
    def num_features(self) -> int:
        """E, the experts' width."""
        return int(self.embeddings_NE.shape[1])

    @classmethod
    def from_rows(
        cls,
        ids_N16: NDArray[np.uint8],
        embeddings_NE: NDArray[np.float16],
        experts_N: NDArray[np.int32],
        label_indices_L: NDArray[np.int32],
        label_offsets: NDArray[np.int64],
    ) -> "EmbeddingSet":
        """Collect rows that come in any order.

        Args:
            ids_N16: uint8 [N, 16].
            embeddings_NE: float16 [N, E], each from the example's own expert.
            experts_N: int32 [N], which one that is.
            label_indices_L: int32 [L], canonical tag indices, each row's in its own order.
            label_offsets: int64 [N + 1], where every row's labels begin and end.

        Raises:
            ValueError: if lengths disagree or an id occurs twice.
        """
        lengths = {len(ids_N16), len(embeddings_NE), len(experts_N), len(label_offsets) - 1}
        if len(lengths) != 1 or label_offsets[-1] != len(label_indices_L):
            raise ValueError(f"ids, embeddings, experts and labels describe different numbers of examples: {sorted(lengths)}")
        return cls(ids_N16, embeddings_NE, experts_N, label_indices_L, label_offsets).take(order_of_distinct(ids_N16))

    def take(self, positions: NDArray[np.int64]) -> "EmbeddingSet":
        """The examples at these positions, in this order."""
        labels, offsets = take_rows(self.label_indices_L, self.label_offsets, positions)
        return EmbeddingSet(self.ids_N16[positions], self.embeddings_NE[positions], self.experts_N[positions], labels, offsets)

    def labelled(self) -> "EmbeddingSet":
        """The examples with at least one label."""
        return self.take(np.flatnonzero(np.diff(self.label_offsets)))

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Embeddings float32 [N, E] and experts int64 [N] on the device."""
        embeddings_NE = torch.from_numpy(self.embeddings_NE).to(device).float()
        return embeddings_NE, torch.from_numpy(self.experts_N).to(device).long()

    def targets(self) -> SparseTargets:
        """1/k on each of an example's k tags."""
        return SparseTargets.from_rows(self.label_indices_L, self.label_offsets)


def fit(
    model: SharedDecoder,
    training: EmbeddingSet,
    validation: EmbeddingSet | None,
    config: DecoderConfig,
    seed: int,
    sinks: TrainingSinks | None = None,
) -> TrainingResult:
    """Fit a model in place, going on from the newest checkpoint of the same fit.

    Every epoch logs the training loss and, given a validation set, its loss and precision@1. Examples without a label
    are left out of both.

    Args:
        model: from `SharedDecoder.initial`, on the device to fit on; a resumed fit must be given the same start.
        training: embeddings of the training split.
        validation: embeddings of the validation split, or None.
        config: the recipe's `decoder` section.
        seed: the recipe's seed.
        sinks: checkpoints, log and progress, each optional.

    Raises:
        DataError: if no training example has a label, or an embedding is not finite.
        HardmoeError: if the loss is no longer finite.
        ValueError: if an expert's number or a tag's index is outside the model.
    """
    training = _usable(training, model)
    validation = _usable(validation, model) if validation is not None else None
    if len(training) == 0:
        raise DataError("no training example has a tag of the vocabulary: lower hashtags.min_count or check dataset.tags_column")
    with deterministic(config.num_threads, model.decoder.weight.device):
        state = _Fit(model, training, validation, config, seed, sinks or TrainingSinks())
        state.resume()
        state.run()
    samples = (len(training),) * config.epochs
    return TrainingResult(state.step, sum(samples), state.final_loss, state.validation_precision_at_1, samples)


def learning_rate_at(step: int, total_steps: int, peak: float) -> float:
    """Half a cosine from the peak at step 0 to zero after the last step, without warm-up."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def evaluate(model: SharedDecoder, examples: EmbeddingSet) -> ValidationScores:
    """Mean loss and precision@1 over labelled examples (at least one)."""
    device = model.decoder.weight.device
    loss, hits = 0.0, 0
    for start in range(0, len(examples), VALIDATION_BATCH):
        batch = examples.take(np.arange(start, min(start + VALIDATION_BATCH, len(examples))))
        with torch.inference_mode():
            logits_BV = model(*batch.tensors(device)).double().cpu()
        targets_BV = batch.targets().dense(model.num_tags, torch.device("cpu")).double()
        # NumPy's argmax takes the first of equals; torch promises no order.
        best_B = logits_BV.numpy().argmax(axis=1)
        hits += int((targets_BV.numpy()[np.arange(len(best_B)), best_B] > 0).sum())
        loss -= float((targets_BV * torch.log_softmax(logits_BV, dim=1)).sum())
    return ValidationScores(hits / len(examples), loss / len(examples))


def _usable(examples: EmbeddingSet, model: SharedDecoder) -> EmbeddingSet:
    """The labelled examples, once their embeddings are known to be finite and their labels and experts the model's."""
    labels_L, experts_N = examples.label_indices_L, examples.experts_N
    if len(labels_L) and not 0 <= labels_L.min() <= labels_L.max() < model.num_tags:
        raise ValueError(f"tag indices must be in [0, {model.num_tags}), found {labels_L.min()} to {labels_L.max()}")
    num_experts = model.num_experts
    if num_experts is not None and len(experts_N) and not 0 <= experts_N.min() <= experts_N.max() < num_experts:
        raise ValueError(f"experts must be in [0, {num_experts}), found {experts_N.min()} to {experts_N.max()}")
    labelled = examples.labelled()
    finite_N = np.isfinite(labelled.embeddings_NE).all(axis=1)
    if not finite_N.all():
        row = int(np.argmin(finite_N))
        raise DataError(
            f"the embedding of example {labelled.ids_N16[row].tobytes().hex()} is not finite: expert {labelled.experts_N[row]} "
            "diverged; lower experts.learning_rate and train it again"
        )
    return labelled


class _Fit:
    """One attempt at a fit: what a checkpoint holds, and the steps that change it."""

    def __init__(
        self,
        model: SharedDecoder,
        training: EmbeddingSet,
        validation: EmbeddingSet | None,
        config: DecoderConfig,
        seed: int,
        sinks: TrainingSinks,
    ) -> None:
        self.model, self.training, self.validation, self.config, self.sinks = model, training, validation, config, sinks
        self.seed = derive_seed(seed, "decoder")
        self.device = model.decoder.weight.device
        self.steps_per_epoch = num_batches(len(training), config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.step = 0
        self.newest_checkpoint: int | None = None
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.final_loss: float | None = None
        self.validation_precision_at_1: float | None = None
        self.digest = self._digest() if sinks.checkpoints else ""
        others = [parameter for parameter in model.parameters() if parameter is not model.decoder.weight]
        decayed = {"params": [model.decoder.weight], "weight_decay": config.weight_decay}
        self.optimizer = optim.AdamW([decayed, {"params": others, "weight_decay": 0.0}], lr=config.learning_rate)

    def run(self) -> None:
        """Do the steps that the newest checkpoint has not done."""
        first_seen, began = self._examples_seen(), time.monotonic()
        while self.step < self.total_steps:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            order_N = epoch_order(self.training.ids_N16, self.seed, epoch)
            for index in range(first, self.steps_per_epoch):
                rows = batch_slice(len(self.training), self.config.batch_size, index)
                self._advance(self.training.take(order_N[rows]))
                if index == self.steps_per_epoch - 1:
                    self._end_epoch(epoch)
                ending = self.sinks.ending(self.step, self.total_steps)
                self._save_if_due(at_once=ending is not None)
                if self.sinks.progress:
                    seen = self._examples_seen()
                    rate = (seen - first_seen) / max(time.monotonic() - began, 1e-9)
                    at = TrainingProgress(self.step, self.total_steps, seen, self.final_loss, rate, self.newest_checkpoint)
                    self.sinks.progress(at)
                if ending:
                    raise ending

    def resume(self) -> None:
        """Take up the newest checkpoint of this fit; those of another fit are deleted."""
        checkpoints = self.sinks.checkpoints
        checkpoint = checkpoints.latest() if checkpoints else None
        if checkpoints and checkpoint and checkpoint.state.get("fit") != self.digest:
            logger.warning("the checkpoints in %s belong to another fit and are deleted", checkpoints.prefix)
            checkpoints.clear()
            checkpoint = None
        if checkpoint:
            self.step = self.newest_checkpoint = checkpoint.step
            self.final_loss = checkpoint.state["final_loss"]
            self.validation_precision_at_1 = checkpoint.state["validation_precision_at_1"]
            self.loss_sum.copy_(checkpoint.tensors["loss_sum"])
            self.model.load_state_dict({name: checkpoint.tensors[f"model.{name}"] for name in self.model.state_dict()})
            for name, parameter in self.model.named_parameters():
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": checkpoint.tensors[f"mean.{name}"].to(self.device),
                    "exp_avg_sq": checkpoint.tensors[f"square.{name}"].to(self.device),
                }
        if self.sinks.log:
            self.sinks.log.restore(checkpoint.state["rows"] if checkpoint else ())

    def _advance(self, batch: EmbeddingSet) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, self.total_steps, self.config.learning_rate)
        logits_BV = self.model(*batch.tensors(self.device))
        loss = softmax_cross_entropy_multi(logits_BV, batch.targets().dense(self.model.num_tags, self.device))
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.loss_sum += loss.detach().double() * len(batch)  # stays on the device: fetching it would wait for the step
        self.step += 1

    def _end_epoch(self, epoch: int) -> None:
        """Log the epoch; refuse to go on with a loss that is not finite."""
        self.final_loss = float(self.loss_sum) / len(self.training)
        self.loss_sum.zero_()
        rate = self.config.learning_rate
        if not math.isfinite(self.final_loss):
            raise HardmoeError(
                f"the decoder's loss became {self.final_loss} in epoch {epoch + 1} of {self.config.epochs}; "
                f"lower decoder.learning_rate (now {rate:g}) and run again"
            )
        last_rate = learning_rate_at(self.step - 1, self.total_steps, rate)
        row = {"step": self.step, "epoch": epoch + 1}
        self._log({**row, "examples": self._examples_seen(), "loss": self.final_loss, "learning_rate": last_rate})
        if self.validation is not None and len(self.validation):
            scores = evaluate(self.model, self.validation)
            self.validation_precision_at_1 = scores.precision_at_1
            self._log({**row, "validation_precision@1": scores.precision_at_1, "validation_loss": scores.loss})

    def _log(self, row: dict[str, int | float]) -> None:
        if self.sinks.log:
            self.sinks.log.append(row)

    def _examples_seen(self) -> int:
        epoch, index = divmod(self.step, self.steps_per_epoch)
        return epoch * len(self.training) + int(batch_slice(len(self.training), self.config.batch_size, index).start)

    def _save_if_due(self, *, at_once: bool) -> None:
        every, checkpoints = self.config.checkpoint_every_steps, self.sinks.checkpoints
        if checkpoints is None or not (at_once or (every is not None and self.step % every == 0)):
            return
        rows = self.sinks.log.rows if self.sinks.log else []
        tensors = {"loss_sum": self.loss_sum}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state[parameter]
            tensors |= {f"model.{name}": parameter, f"mean.{name}": moments["exp_avg"], f"square.{name}": moments["exp_avg_sq"]}
        state = {"final_loss": self.final_loss, "validation_precision_at_1": self.validation_precision_at_1}
        checkpoints.save(self.step, tensors, {"fit": self.digest, "rows": rows, **state})
        self.newest_checkpoint = self.step

    def _digest(self) -> str:
        """Names the fit that a checkpoint belongs to: config, seed, examples and start."""
        facts = json.dumps([self.config.identity(), self.seed, self.total_steps], sort_keys=True)
        digest = hashlib.sha256(facts.encode())
        training = self.training
        arrays: list[NDArray[Any]] = [training.ids_N16, training.embeddings_NE, training.experts_N]
        arrays += [training.label_indices_L, training.label_offsets]
        arrays += [tensor.detach().cpu().numpy() for _, tensor in sorted(self.model.state_dict().items())]
        for array in arrays:
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()
