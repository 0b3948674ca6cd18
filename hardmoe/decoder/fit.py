"""Fit alignment and decoder together on the experts' cached embeddings, the experts frozen.

AdamW with half a cosine, the hashtag loss, batches in the order of hash(seed, epoch, id): a function of the examples, not
of how they are sharded. Resuming from a checkpoint gives the same bytes as never having stopped. The last weights are the
result: the cosine has come to rest there, and choosing an epoch on the validation split would be one more thing to hold
alike for `dense_refit`. That control is this same code with K = 1.

Rejected: fitting the decoder while running the experts (an epoch would cost a pass of every expert instead of seconds),
L-BFGS over all examples (with the alignment the problem is not convex, and full passes over many images are dear), and L-BFGS
for the decoder alone as a start: of 10,341 icons with 252 hashtags and 4 experts, six epochs after 30 iterations of it reach
61.0 % of precision@1 and a test loss of 3.51, after 10 iterations 62.6 % and 3.27, from the trunk's decoder 62.7 % and 3.18
(one seed).

What is kept in float32, and how rows of the decoder are left alone, is told in `optimizer`; the losses are in `linear_loss`.
"""

import hashlib
import json
import logging
import math
import time

import torch

from hardmoe.data.resampling import batch_slice, num_batches
from hardmoe.decoder.config import DecoderConfig
from hardmoe.decoder.embeddings import EmbeddingSet, ExampleSource
from hardmoe.decoder.objective import Objective, evaluate
from hardmoe.decoder.optimizer import DecoderOptimizer
from hardmoe.errors import DataError, HardmoeError
from hardmoe.hashing import derive_seed
from hardmoe.models.shared_decoder import SharedDecoder
from hardmoe.training.determinism import deterministic
from hardmoe.training.loop import TrainingResult
from hardmoe.training.reporting import TrainingProgress, TrainingSinks

logger = logging.getLogger(__name__)


def fit(
    model: SharedDecoder,
    training: ExampleSource,
    validation: ExampleSource | None,
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
    training = training.usable(model.num_tags, model.num_experts)
    validation = validation.usable(model.num_tags, model.num_experts) if validation is not None else None
    if len(training) == 0:
        raise DataError("no training example has a tag of the vocabulary: lower hashtags.min_count or check dataset.tags_column")
    with deterministic(config.num_threads, model.decoder.weight.device):
        state = _Fit(model, training, validation, config, seed, sinks or TrainingSinks())
        state.resume()
        state.run()
    samples = (len(training),) * config.epochs
    return TrainingResult(state.step, sum(samples), state.final_loss, state.validation_precision_at_1, samples)


def fit_seed(seed: int) -> int:
    """The seed of a fit's epochs, of a recipe's."""
    return derive_seed(seed, "decoder")


def learning_rate_at(step: int, total_steps: int, peak: float) -> float:
    """Half a cosine from the peak at step 0 to zero after the last step, without warm-up."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / total_steps))


class _Fit:
    """One attempt at a fit: what a checkpoint holds, and the steps that change it."""

    def __init__(
        self,
        model: SharedDecoder,
        training: ExampleSource,
        validation: ExampleSource | None,
        config: DecoderConfig,
        seed: int,
        sinks: TrainingSinks,
    ) -> None:
        self.model, self.training, self.validation, self.config, self.sinks = model, training, validation, config, sinks
        self.seed = fit_seed(seed)
        self.device = model.decoder.weight.device
        self.steps_per_epoch = num_batches(len(training), config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.step = 0
        self.newest_checkpoint: int | None = None
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.final_loss: float | None = None
        self.validation_precision_at_1: float | None = None
        self.digest = self._digest() if sinks.checkpoints else ""
        self.objective = Objective.of(model, config, self.seed, training)
        self.optimizer = DecoderOptimizer(model, config.weight_decay)

    def run(self) -> None:
        """Do the steps that the newest checkpoint has not done."""
        first_seen, began = self._examples_seen(), time.monotonic()
        while self.step < self.total_steps:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            for batch in self.training.batches(self.seed, epoch, self.config.batch_size, first):
                self._advance(batch)
                if self.step % self.steps_per_epoch == 0:
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
            self.optimizer.restore(checkpoint.tensors)
        if self.sinks.log:
            self.sinks.log.restore(checkpoint.state["rows"] if checkpoint else ())

    def _advance(self, batch: EmbeddingSet) -> None:
        rate = learning_rate_at(self.step, self.total_steps, self.config.learning_rate)
        loss, rows = self.objective.loss(batch, self.step)
        torch.autograd.backward(loss)
        self.optimizer.step(self.step + 1, rate, rows)
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
            scores = evaluate(self.model, self.validation, self.config.loss)
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
        weights = {f"model.{name}": parameter for name, parameter in self.model.named_parameters()}
        tensors = {"loss_sum": self.loss_sum, **weights, **self.optimizer.tensors()}
        state = {"final_loss": self.final_loss, "validation_precision_at_1": self.validation_precision_at_1}
        checkpoints.save(self.step, tensors, {"fit": self.digest, "rows": rows, **state})
        self.newest_checkpoint = self.step

    def _digest(self) -> str:
        """Names the fit that a checkpoint belongs to: config, seed, examples and start."""
        examples = [len(self.training), self.training.content()]
        facts = json.dumps([self.config.identity(), self.seed, self.total_steps, examples], sort_keys=True)
        digest = hashlib.sha256(facts.encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()
