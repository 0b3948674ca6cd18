"""What the held-out piece of the data decides about a training: when it ends, and which epoch's weights it ends with.

Both are functions of the validation scores so far, whose best a checkpoint holds, so a training that was killed ends where one
that was not ends. The best weights lie in host memory and in every checkpoint. Rejected: reading the best epoch's own checkpoint
back at the end, which may be off, damaged or, with averaged weights, another network than the one that was scored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from hardmoe.data.resampling import Schedule
from hardmoe.training.checkpoint import host_copy

_PREFIX = "best."


@dataclass(frozen=True)
class Selection:
    """What came of it; the same for every attempt, so it may go into an artifact's record."""

    planned_steps: int
    """Steps that the training would have had without an early stop."""
    stopped_early: bool
    kept_step: int
    """The step after which the network was as it is kept."""


@dataclass(frozen=True)
class SelectionRule:
    """What a config leaves to the validation split."""

    schedule: Schedule
    early_stop: int | None
    keep: Literal["last", "best"]

    def is_over(self, step: int, best_step: int | None) -> bool:
        """Whether all steps are done, or, after the validation of an epoch, so many of them brought no better score.

        Args:
            step: steps done.
            best_step: the first after which the score was the best; None before the first validation.
        """
        if step >= self.schedule.total_steps:
            return True
        if self.early_stop is None or best_step is None or not self.schedule.ends_epoch(step):
            return False
        return self.epoch_of(step) - self.epoch_of(best_step) >= self.early_stop

    def selection(self, step: int, best_step: int | None) -> Selection | None:
        """What was decided by the end of a training; None where nothing is left to the validation split."""
        if self.early_stop is None and self.keep == "last":
            return None
        kept = best_step if self.keep == "best" and best_step is not None else step
        return Selection(self.schedule.total_steps, step < self.schedule.total_steps, kept)

    def epochs_begun(self, step: int) -> int:
        """All of them after an ordinary end, fewer after an early one."""
        return self.schedule.epochs if step >= self.schedule.total_steps else self.epoch_of(step)

    def epoch_of(self, steps_done: int) -> int:
        """The epoch of the last of so many steps, counted from 1."""
        return self.schedule.place(steps_done - 1)[0] + 1


class BestWeights:
    """A network as it was when it scored best; nothing before the first score."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def note(self, model: nn.Module) -> None:
        """Remember the network as it is now."""
        self._tensors = {name: host_copy(tensor) for name, tensor in model.state_dict().items()}

    def replace(self, model: nn.Module) -> bool:
        """Make the network what was remembered; whether there is something."""
        if self._tensors:
            model.load_state_dict(self._tensors)
        return bool(self._tensors)

    def snapshot(self) -> dict[str, Tensor]:
        """For a checkpoint, as `best.<name>`; nobody changes these tensors any more."""
        return {f"{_PREFIX}{name}": tensor for name, tensor in self._tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's tensors, or from none."""
        self._tensors = {name.removeprefix(_PREFIX): each for name, each in tensors.items() if name.startswith(_PREFIX)}
