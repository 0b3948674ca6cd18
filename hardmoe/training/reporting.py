"""Where a training reports to, and what it says while it runs; of networks and of the shared decoder alike."""

from collections.abc import Callable
from dataclasses import dataclass

from hardmoe.errors import PreemptedError
from hardmoe.training.checkpoint import Checkpoints
from hardmoe.training.metrics_log import MetricsLog


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
    checkpoint: int | None = None
    """Step of the newest checkpoint that this attempt has resumed from or written."""
    validation_precision_at_1: float | None = None
    """Of the latest validation."""
    computing: float | None = None
    """Share of this attempt's time that went into the network, which is its speed over a bare loop's; see `clock`."""


@dataclass(frozen=True)
class TrainingSinks:
    """Where a training reports to. A resumed one takes the log's rows from its checkpoint."""

    checkpoints: Checkpoints | None = None
    log: MetricsLog | None = None
    progress: Callable[[TrainingProgress], None] | None = None
    asked_to_stop: Callable[[], str | None] = lambda: None
    """Asked after every step: why to end here, with a checkpoint; None to go on."""

    def ending(self, step: int, total_steps: int) -> PreemptedError | None:
        """What to raise once a checkpoint of this step is made; None to go on, as after the last step and without checkpoints."""
        reason = self.asked_to_stop() if self.checkpoints and step < total_steps else None
        if reason is None:
            return None
        return PreemptedError(f"{reason} at step {step} of {total_steps}, where a checkpoint was made")
