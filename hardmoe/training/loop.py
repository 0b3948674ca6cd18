"""The training loop that the trunk, every expert and the dense baseline share.

Everything that happens at a step (see `step`) is a function of (seed, step): the batch, the learning rate, the randomness of
augmentation and dropout. So a checkpoint holds the weights, their average, the optimiser's state and a handful of numbers, and
a training killed anywhere and resumed ends with the bits of one that was not (on a CPU; see `determinism`). Rejected: an
epoch-based loop with saved generator and sampler states, which is where other loops lose exactness.

Shape letters: B batch, S side in pixels, D feature dim, V tags.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields

import torch
from torch import Tensor

from hardmoe.data.loader import ExampleSet
from hardmoe.errors import HardmoeError
from hardmoe.models.backbones import TagClassifier
from hardmoe.training.average import WeightAverage
from hardmoe.training.checkpoint import Checkpoint, Checkpoints
from hardmoe.training.config import TrainingConfig
from hardmoe.training.determinism import deterministic
from hardmoe.training.losses import build_loss
from hardmoe.training.metrics_log import MetricsLog
from hardmoe.training.optim import build_optimizer, learning_rate_at, optimizer_state, restore_optimizer_state
from hardmoe.training.step import Stepper
from hardmoe.training.validation import validate

logger = logging.getLogger(__name__)

STEPS_PER_ROW = 20
"""Steps between rows of the metrics log."""
_LAYOUT = 2
"""Of a checkpoint's tensors; one of another layout is not resumed."""


@dataclass(frozen=True)
class TrainingProgress:
    """Where a training stands; for people, never stored in an artifact."""

    step: int
    total_steps: int
    examples_seen: int
    loss: float | None
    """Of the latest step whose loss was fetched from the device; None before the first."""
    examples_per_second: float
    """Since this attempt began."""


@dataclass(frozen=True)
class TrainingSinks:
    """Where a training reports to. A resumed one takes the log's rows from its checkpoint."""

    checkpoints: Checkpoints | None = None
    log: MetricsLog | None = None
    progress: Callable[[TrainingProgress], None] | None = None


@dataclass(frozen=True)
class TrainingResult:
    """What came of a training; the same for every attempt, so it may go into an artifact's record."""

    steps: int
    examples_seen: int
    """Counted with repetition, over the epochs and within them."""
    final_loss: float | None
    """Mean over the steps of the log's last row; None if nothing was trained."""
    validation_precision_at_1: float | None
    """After the last epoch; None without labelled validation examples."""
    samples_per_epoch: tuple[int, ...]
    """How many each epoch shows: the labelled examples, as often as their set says, those with rare hashtags more often if the
    config says so."""


@dataclass
class _State:
    """What a checkpoint holds beside the tensors; the loss is summed over the steps since the log's last row."""

    step: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    final_loss: float | None = None
    validation_precision_at_1: float | None = None


def train(
    model: TagClassifier,
    examples: ExampleSet,
    config: TrainingConfig,
    *,
    seed: int,
    device: torch.device,
    validation: ExampleSet | None = None,
    sinks: TrainingSinks | None = None,
) -> TrainingResult:
    """Train a classifier in place, resuming from the latest checkpoint of the same training.

    Parameters that do not require gradients stay as they are. Afterwards the model is on `device`, in evaluation mode.

    Args:
        model: the start; a resumed training must be given the same one.
        examples: those without labels are left out; if none remains, the weights are not touched.
        config: see `TrainingConfig`.
        seed: decides the order of the examples and the randomness of layers such as dropout.
        device: where to train; bfloat16 autocast on a GPU, float32 elsewhere.
        validation: scored after every epoch.
        sinks: checkpoints, log and progress, each optional.

    Raises:
        HardmoeError: the loss is no longer a finite number.
    """
    sinks = sinks or TrainingSinks()
    labelled = examples.labelled()
    validation = validation.labelled() if validation else None
    for part in (labelled, validation):
        if part and int(part.label_indices_L.max()) >= model.decoder.out_features:
            raise ValueError(f"tag {part.label_indices_L.max()} in a decoder of {model.decoder.out_features} tags")
    with deterministic(config.num_threads, device):
        training = _Training(model, labelled, config, seed, device, validation, sinks)
        if len(labelled):
            training.run()
    model.eval()
    state, schedule = training.state, training.schedule
    return TrainingResult(
        steps=state.step,
        examples_seen=schedule.samples_before(state.step),
        final_loss=state.final_loss,
        validation_precision_at_1=state.validation_precision_at_1,
        samples_per_epoch=tuple(schedule.samples_E.tolist()),
    )


@dataclass
class _Training:
    """One attempt at a training."""

    model: TagClassifier
    examples: ExampleSet
    config: TrainingConfig
    seed: int
    device: torch.device
    validation: ExampleSet | None
    sinks: TrainingSinks
    state: _State = field(default_factory=_State)
    unfetched: list[Tensor] = field(default_factory=list)
    last_loss: float | None = None

    def __post_init__(self) -> None:
        config = self.config
        self.schedule = self.examples.schedule(config.batch_size, config.epochs, self.seed, config.repeat_threshold)
        self.total_steps = self.schedule.total_steps

    def run(self) -> None:
        """Do the steps that the latest checkpoint has not done."""
        digest = self._digest() if self.sinks.checkpoints else ""
        self.model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.train()
        self.optimizer = build_optimizer(self.model, self.config)
        self.average = WeightAverage(self.model, self.config.ema_decay) if self.config.ema_decay is not None else None
        loss = build_loss(self.config, self.examples, self.model.decoder.out_features, self.seed, self.device)
        stepper = Stepper(self.model, self.optimizer, self.average, loss, self.config, self.seed, self.device)
        self._resume(digest)
        first_step, began = self.state.step, time.monotonic()
        for batch in self.examples.training_batches(self.schedule, first_step):
            self.unfetched.append(stepper.take(batch, self.state.step, self._learning_rate(self.state.step)))
            self.state.step += 1
            self._report()
            self._save(digest)
            if self.sinks.progress:
                seen = self.schedule.samples_before(self.state.step)
                rate = (seen - self.schedule.samples_before(first_step)) / max(time.monotonic() - began, 1e-9)
                self.sinks.progress(TrainingProgress(self.state.step, self.total_steps, seen, self.last_loss, rate))
        if self.average is not None:
            self.average.replace()

    def _learning_rate(self, step: int) -> float:
        return learning_rate_at(step, self.total_steps, self.config)

    def _fetch_losses(self) -> None:
        """Bring the losses from the device; done rarely on a GPU, since it waits for all queued work."""
        losses = torch.stack(self.unfetched).double().tolist()
        for step, loss in enumerate(losses, start=self.state.step - len(losses)):
            if not math.isfinite(loss):
                raise HardmoeError(
                    f"the loss became {loss} at step {step + 1} of {self.total_steps}, at learning rate "
                    f"{self._learning_rate(step):.3g}; lower learning_rate (now {self.config.learning_rate:g}) and run again"
                )
            self.state.loss_sum += loss
        self.state.loss_steps += len(losses)
        self.last_loss = losses[-1]
        self.unfetched.clear()

    def _report(self) -> None:
        state = self.state
        epoch = self.schedule.place(state.step - 1)[0] + 1
        row_is_due = state.step % STEPS_PER_ROW == 0 or state.step == self.total_steps
        if row_is_due or self._checkpoint_is_due() or self.device.type == "cpu":
            self._fetch_losses()
        if row_is_due:
            state.final_loss = state.loss_sum / state.loss_steps
            state.loss_sum, state.loss_steps = 0.0, 0
            rate = self._learning_rate(state.step - 1)
            seen = self.schedule.samples_before(state.step)
            self._log({"step": state.step, "epoch": epoch, "examples": seen, "loss": state.final_loss, "learning_rate": rate})
        if not self.schedule.ends_epoch(state.step):
            return
        asked_for = (self.config.repeat_threshold, self.examples.times_N, self.examples.budget)
        if any(asked is not None for asked in asked_for):
            samples = int(self.schedule.samples_E[epoch - 1])
            self._log({"step": state.step, "epoch": epoch, "samples": samples, "unique_examples": len(self.examples)})
        if self.validation:
            with self.average.in_use() if self.average is not None else nullcontext():
                scores = validate(self.model, self.validation, self.config.batch_size, self.device, self.config.loss)
            state.validation_precision_at_1 = scores.precision_at_1
            if not math.isfinite(scores.loss):
                raise HardmoeError(
                    f"the validation loss became {scores.loss} after epoch {epoch}; lower learning_rate and run again"
                )
            row = {"validation_precision@1": scores.precision_at_1, "validation_loss": scores.loss}
            self._log({"step": state.step, "epoch": epoch, **row})

    def _log(self, row: dict[str, int | float]) -> None:
        if self.sinks.log:
            self.sinks.log.append(row)

    def _checkpoint_is_due(self) -> bool:
        every = self.config.checkpoint_every_steps
        return self.sinks.checkpoints is not None and every is not None and self.state.step % every == 0

    def _save(self, digest: str) -> None:
        if not self.sinks.checkpoints or not self._checkpoint_is_due():
            return
        rows = self.sinks.log.rows if self.sinks.log else []
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer_state(self.model, self.optimizer).items()}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
        self.sinks.checkpoints.save(self.state.step, tensors, {"training": digest, "rows": rows, **asdict(self.state)})

    def _resume(self, digest: str) -> None:
        checkpoint = self.sinks.checkpoints.latest() if self.sinks.checkpoints else None
        if self.sinks.checkpoints and checkpoint and checkpoint.state.get("training") != digest:
            logger.warning("the checkpoints in %s belong to another training and are deleted", self.sinks.checkpoints.prefix)
            self.sinks.checkpoints.clear()
            checkpoint = None
        if checkpoint:
            self._restore(checkpoint)
        if self.sinks.log:
            self.sinks.log.restore(checkpoint.state["rows"] if checkpoint else ())

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.state = _State(**{field.name: checkpoint.state[field.name] for field in fields(_State)})
        tensors = checkpoint.tensors
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
        restore_optimizer_state(self.model, self.optimizer, _below("optimizer.", tensors))
        if self.average is not None:
            self.average.restore(_below("average.", tensors))

    def _digest(self) -> str:
        """Names the training that a checkpoint belongs to: config, seed, examples, initial weights, what is trainable."""
        trainable = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        facts = [
            _LAYOUT,
            self.config.identity(),
            self.seed,
            self.examples.image_size,
            self.total_steps,
            self.examples.budget,
            trainable,
        ]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for array in (self.examples.ids_N16, self.examples.label_offsets, self.examples.label_indices_L):
            digest.update(array.tobytes())
        if self.examples.times_N is not None:
            digest.update(self.examples.times_N.tobytes())
        # An id may be the user's own name of an image that was replaced since; hashing costs a fraction of the decoding.
        for images_B3SS in self.examples.sequential_images(self.config.batch_size):
            digest.update(images_B3SS.data)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
