"""The training loop that the trunk, every expert and the dense baseline share.

Everything that happens at a step (see `step`) is a function of (seed, step): the batch, the learning rate, the randomness of
augmentation and dropout. So a checkpoint holds the weights, their average, the optimiser's state and a handful of numbers, and
a training killed anywhere and resumed ends with the bits of one that was not (on a CPU; see `determinism`), wherever its
checkpoints fell. Rejected: an epoch-based loop with saved generator and sampler states, where other loops lose exactness.

Shape letters: B batch, S side in pixels, D feature dim, V tags.
"""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace

import torch
from torch import Tensor

from hardmoe.data.loader import ExampleSet
from hardmoe.errors import HardmoeError
from hardmoe.models.backbones import TagClassifier
from hardmoe.training.average import WeightAverage
from hardmoe.training.background import BackgroundWriter
from hardmoe.training.checkpoint import Checkpoint
from hardmoe.training.clock import Clock
from hardmoe.training.config import TrainingConfig
from hardmoe.training.determinism import deterministic
from hardmoe.training.distillation import Teacher
from hardmoe.training.divergence import LEARNING_RATE_FACTOR, Divergence, LossLostError, anchor_before, anchors_needed, is_anchor
from hardmoe.training.losses import build_loss
from hardmoe.training.optim import build_optimizer, learning_rate_at
from hardmoe.training.reporting import TrainingProgress, TrainingSinks
from hardmoe.training.selection import BestWeights, Selection, SelectionRule
from hardmoe.training.snapshot import restore_snapshot, take_snapshot, training_digest
from hardmoe.training.step import Gradients, Stepper
from hardmoe.training.team import Team, TeamJob, pack
from hardmoe.training.validation import validate

logger = logging.getLogger(__name__)

STEPS_PER_ROW = 20
"""Steps between rows of the metrics log."""


@dataclass(frozen=True)
class TrainingReferences:
    """What a training is held against."""

    validation: ExampleSet | None = None
    """Scored after every epoch."""
    teacher: Teacher | None = None
    """Whose outputs count beside the hashtags; it may be left on the training's device."""


@dataclass(frozen=True)
class TrainingResult:
    """What came of a training; the same for every attempt, so it may go into an artifact's record."""

    steps: int
    examples_seen: int
    """Counted with repetition, over the epochs and within them."""
    final_loss: float | None
    """Mean over the steps of the log's last row; None if nothing was trained."""
    validation_precision_at_1: float | None
    """Of the weights that it ends with; None without labelled validation examples."""
    samples_per_epoch: tuple[int, ...]
    """How many each epoch shows: the labelled examples, as often as their set says, those with rare hashtags more often if the
    config says so."""
    divergence: Divergence | None = None
    """Where the loss was lost and the training went back; None of one that went straight through."""
    selection: Selection | None = None
    """What the validation split decided; None where the config leaves nothing to it."""


@dataclass
class _State:
    """What a checkpoint holds beside the tensors; the loss is summed over the steps since the log's last row."""

    step: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    final_loss: float | None = None
    validation_precision_at_1: float | None = None
    best_precision_at_1: float | None = None
    best_step: int | None = None
    """The first step after which the validation's precision was the best."""
    diverged_at: int | None = None
    """See `Divergence`."""


def train(
    model: TagClassifier,
    examples: ExampleSet,
    config: TrainingConfig,
    *,
    seed: int,
    devices: Sequence[torch.device],
    references: TrainingReferences | None = None,
    sinks: TrainingSinks | None = None,
) -> TrainingResult:
    """Train a classifier in place, resuming from the latest checkpoint of the same training.

    Parameters that do not require gradients stay as they are. Afterwards the model is on the first device, in evaluation mode.

    Args:
        model: the start; a resumed training must be given the same one.
        examples: those without labels are left out; if none remains, the weights are not touched.
        config: see `TrainingConfig`.
        seed: decides the order of the examples and the randomness of layers such as dropout.
        devices: where to train; bfloat16 autocast on GPUs, float32 elsewhere. Each after the first computes a share of every
            batch, in a process of its own (see `team`).
        references: validation examples and a teacher, each optional.
        sinks: checkpoints, log and progress, each optional.

    Raises:
        HardmoeError: the loss is no longer a finite number, and was not a second time, at half the learning rate.
        PreemptedError: it was asked to stop, and has made a checkpoint.
        WorkerLostError: the process of a device has died.
    """
    sinks = sinks or TrainingSinks()
    labelled = examples.labelled()
    references = references or TrainingReferences()
    validation = references.validation.labelled() if references.validation else None
    for part in (labelled, validation):
        if part and int(part.label_indices_L.max()) >= model.decoder.out_features:
            raise ValueError(f"tag {part.label_indices_L.max()} in a decoder of {model.decoder.out_features} tags")
    with deterministic(config.num_threads, devices[0]):
        training = _Training(model, labelled, config, seed, devices, replace(references, validation=validation), sinks)
        if len(labelled):
            training.run()
    model.eval()
    state, schedule = training.state, training.schedule
    kept_best = config.keep == "best" and state.best_step is not None
    return TrainingResult(
        steps=state.step,
        examples_seen=schedule.samples_before(state.step),
        final_loss=state.final_loss,
        validation_precision_at_1=state.best_precision_at_1 if kept_best else state.validation_precision_at_1,
        samples_per_epoch=tuple(schedule.samples_E[: training.rule.epochs_begun(state.step)].tolist()),
        divergence=training.divergence,
        selection=training.rule.selection(state.step, state.best_step),
    )


@dataclass
class _Training:
    """One attempt at a training."""

    model: TagClassifier
    examples: ExampleSet
    config: TrainingConfig
    seed: int
    devices: Sequence[torch.device]
    references: TrainingReferences
    sinks: TrainingSinks
    state: _State = field(default_factory=_State)
    unfetched: list[Tensor] = field(default_factory=list)
    last_loss: float | None = None

    def __post_init__(self) -> None:
        config = self.config
        self.schedule = self.examples.schedule(config.batch_size, config.epochs, self.seed, config.repeat_threshold)
        self.total_steps = self.schedule.total_steps
        self.rule = SelectionRule(self.schedule, config.early_stop, config.keep)

    @property
    def device(self) -> torch.device:
        """Where the network is, and everything that is kept."""
        return self.devices[0]

    @property
    def divergence(self) -> Divergence | None:
        """Where the training went back, if it did."""
        at = self.state.diverged_at
        return None if at is None else Divergence(at, anchor_before(at))

    @property
    def is_over(self) -> bool:
        """Whether there is no step to do any more."""
        return self.rule.is_over(self.state.step, self.state.best_step)

    def run(self) -> None:
        """Do the steps that the latest checkpoint has not done."""
        checkpoints = self.sinks.checkpoints
        facts = [self.config.identity(), self.seed, self.total_steps, self.examples.budget]
        teacher = self.references.teacher
        self.digest = training_digest(self.model, self.examples, facts, teacher) if checkpoints else ""
        with ExitStack() as stack:
            self._settle(teacher, self._helped_by(stack, teacher))
            self.writer = stack.enter_context(BackgroundWriter(checkpoints)) if checkpoints else None
            self._resume()
            while not self.is_over:
                try:
                    self._go_on()
                except LossLostError as lost:
                    self._go_back(lost)
        if not self.best.replace(self.model) and self.average is not None:
            self.average.replace()

    def _helped_by(self, stack: ExitStack, teacher: Teacher | None) -> Team | None:
        """The processes of the further devices, up to the end of the stack; before anything is on the device."""
        if len(self.devices) == 1:
            return None
        return stack.enter_context(Team(TeamJob(pack(self.model, teacher), self.examples, self.config, self.seed), self.devices))

    def _settle(self, teacher: Teacher | None, team: Team | None) -> None:
        """Bring everything to the device."""
        self.model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.train()
        self.optimizer = build_optimizer(self.model, self.config)
        self.average = WeightAverage(self.model, self.config.ema_decay) if self.config.ema_decay is not None else None
        loss = build_loss(self.config, self.examples, self.model.decoder.out_features, self.seed, self.device)
        teacher = None if teacher is None else teacher.on(self.device)
        gradients = Gradients(self.model, loss, self.config, self.seed, self.device, teacher)
        self.stepper = Stepper(gradients, self.optimizer, self.average, team)
        self.start = take_snapshot(self.model, self.optimizer, self.average)
        self.best = BestWeights()

    def _go_on(self) -> None:
        """The steps up to the end, or until the loss is lost."""
        first_step, clock = self.state.step, Clock()
        self.clock, self.saved_at = clock, time.monotonic()
        for batch in clock.reading(self.examples.training_batches(self.schedule, first_step)):
            with clock.spent("computing"):
                self.unfetched.append(self.stepper.take(batch, self.state.step, self._learning_rate(self.state.step)))
                self.state.step += 1
                self._report()
            self._note_going_back()
            ending = None if self.is_over else self.sinks.ending(self.state.step, self.total_steps)
            with clock.spent("saving"):
                if ending or self._checkpoint_is_due():
                    self._save()
                if self.writer and ending:
                    self.writer.wait()
            seen = self.schedule.samples_before(self.state.step)
            rate = (seen - self.schedule.samples_before(first_step)) / max(clock.seconds, 1e-9)
            if self.sinks.progress:
                newest = self.writer.written if self.writer else None
                precision, computing = self.state.validation_precision_at_1, clock.share("computing")
                at = (self.state.step, self.total_steps, seen, self.last_loss, rate, newest, precision, computing)
                self.sinks.progress(TrainingProgress(*at))
            if ending:
                raise ending
            if self.is_over:
                logger.info("%s examples/s over %.0f s, of which %s", f"{rate:,.0f}", clock.seconds, clock.describe())
                return

    def _learning_rate(self, step: int) -> float:
        went_back = self.divergence is not None and step >= self.divergence.back_to
        return learning_rate_at(step, self.total_steps, self.config) * (LEARNING_RATE_FACTOR if went_back else 1.0)

    def _fetch_losses(self) -> None:
        """Bring the losses from the device; done rarely on a GPU, since it waits for all queued work."""
        losses = torch.stack(self.unfetched).double().tolist()
        for step, loss in enumerate(losses, start=self.state.step - len(losses)):
            if not math.isfinite(loss):
                rate = self._learning_rate(step)
                where = f"at step {step + 1} of {self.total_steps}, at learning rate {rate:.3g}"
                raise LossLostError(step + 1, f"the loss became {loss} {where}")
            self.state.loss_sum += loss
        self.state.loss_steps += len(losses)
        self.last_loss = losses[-1]
        self.unfetched.clear()

    def _report(self) -> None:
        state = self.state
        epoch, ends_epoch = self.rule.epoch_of(state.step), self.schedule.ends_epoch(state.step)
        # An early stop is known only after the validation; the row before it must cover all steps.
        row_is_due = state.step % STEPS_PER_ROW == 0 or (ends_epoch and self.config.early_stop is not None)
        row_is_due = row_is_due or state.step == self.total_steps
        if row_is_due or ends_epoch or self.device.type == "cpu":
            self._fetch_losses()
        if row_is_due:
            state.final_loss = state.loss_sum / state.loss_steps
            state.loss_sum, state.loss_steps = 0.0, 0
            rate = self._learning_rate(state.step - 1)
            seen = self.schedule.samples_before(state.step)
            self._log({"step": state.step, "epoch": epoch, "examples": seen, "loss": state.final_loss, "learning_rate": rate})
        if not ends_epoch:
            return
        asked_for = (self.config.repeat_threshold, self.examples.times_N, self.examples.budget)
        if any(asked is not None for asked in asked_for):
            samples = int(self.schedule.samples_E[epoch - 1])
            self._log({"step": state.step, "epoch": epoch, "samples": samples, "unique_examples": len(self.examples)})
        if self.references.validation:
            with self.clock.spent("validating"), self.average.in_use() if self.average is not None else nullcontext():
                scores = validate(self.model, self.references.validation, self.config.batch_size, self.device, self.config.loss)
                if not math.isfinite(scores.loss):
                    where = f"after step {state.step} of {self.total_steps}, the end of epoch {epoch}"
                    raise LossLostError(state.step, f"the validation loss became {scores.loss} {where}")
                if state.best_precision_at_1 is None or scores.precision_at_1 > state.best_precision_at_1:
                    state.best_precision_at_1, state.best_step = scores.precision_at_1, state.step
                    if self.config.keep == "best":
                        self.best.note(self.model)
            state.validation_precision_at_1 = scores.precision_at_1
            row = {"validation_precision@1": scores.precision_at_1, "validation_loss": scores.loss}
            self._log({"step": state.step, "epoch": epoch, **row})
        if self.is_over and (selection := self.rule.selection(state.step, state.best_step)) is not None:
            self._log({"step": state.step, "epoch": epoch, **asdict(selection)})

    def _log(self, row: dict[str, int | float]) -> None:
        if self.sinks.log:
            self.sinks.log.append(row)

    def _checkpoint_is_due(self) -> bool:
        steps, seconds, step = self.config.checkpoint_every_steps, self.config.checkpoint_every_seconds, self.state.step
        if self.writer is None or (steps is None and seconds is None):
            return False
        if step == self.state.best_step or is_anchor(step):
            return True
        return (steps is not None and step % steps == 0) or (seconds is not None and time.monotonic() - self.saved_at >= seconds)

    def _save(self) -> None:
        """Hand a checkpoint over to be written; the losses are fetched before, so that none of a lost loss is ever made."""
        assert self.writer is not None
        if self.unfetched:
            self._fetch_losses()
        state = self.state
        rows = list(self.sinks.log.rows) if self.sinks.log else []
        keep = anchors_needed(state.step) | ({state.best_step} if state.best_step is not None else set())
        tensors = take_snapshot(self.model, self.optimizer, self.average) | self.best.snapshot()
        self.writer.submit(state.step, tensors, {"training": self.digest, "rows": rows, **asdict(state)}, keep)
        self.saved_at = time.monotonic()

    def _resume(self) -> None:
        checkpoints = self.sinks.checkpoints
        checkpoint = checkpoints.latest() if checkpoints else None
        if checkpoints and checkpoint and checkpoint.state.get("training") != self.digest:
            logger.warning("the checkpoints in %s belong to another training and are deleted", checkpoints.prefix)
            checkpoints.clear()
            checkpoint = None
        self._restore(checkpoint)

    def _go_back(self, lost: LossLostError) -> None:
        """Take up the state from which a lost loss is tried again.

        Raises:
            HardmoeError: it was tried again already.
        """
        if (before := self.divergence) is not None:
            raise HardmoeError(
                f"{lost}, after it was lost at step {before.step} already and the training went back to step {before.back_to} "
                f"with half the learning rate; lower learning_rate (now {self.config.learning_rate:g}) and run again"
            )
        to = anchor_before(lost.step)
        logger.warning("%s; the training goes back to step %d and on from there with half the learning rate", lost, to)
        checkpoint = None
        if self.sinks.checkpoints and self.writer:
            self.writer.wait()
            self.sinks.checkpoints.delete_after(to)
            checkpoint = self.sinks.checkpoints.latest(at_most=to)
        self._restore(checkpoint)
        self.state.diverged_at = lost.step
        self._note_going_back()

    def _note_going_back(self) -> None:
        """A row in the log where the rate changes; the steps up to there, if they are done again, have theirs first."""
        if (divergence := self.divergence) is None or divergence.back_to != self.state.step or not self.sinks.log:
            return
        # Another attempt's checkpoint of this very step has it already.
        if not any("diverged_at" in row for row in self.sinks.log.rows):
            row = {"diverged_at": divergence.step, "learning_rate_factor": divergence.learning_rate_factor}
            self._log({"step": self.state.step, **row})

    def _restore(self, checkpoint: Checkpoint | None) -> None:
        """Be where a checkpoint was made, or at the start."""
        self.unfetched.clear()
        if self.writer:
            self.writer.written = checkpoint.step if checkpoint else None
        if self.sinks.log:
            self.sinks.log.restore(checkpoint.state["rows"] if checkpoint else ())
        if checkpoint is None:
            self.state = _State()
            self.best.restore({})
            restore_snapshot(self.model, self.optimizer, self.average, self.start)
        else:
            self.state = _State(**{field.name: checkpoint.state[field.name] for field in fields(_State)})
            self.best.restore(checkpoint.tensors)
            restore_snapshot(self.model, self.optimizer, self.average, checkpoint.tensors)
