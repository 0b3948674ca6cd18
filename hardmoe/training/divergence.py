"""What a training does about a loss that is no longer a finite number: it goes back once, and on at half the learning rate.

Where it goes back to is a function of the step at which the loss was lost, and nothing else: the last multiple of
`ANCHOR_STEPS` that lies at least `MARGIN_STEPS` before it. Weights are ill before the loss shows it, hence the margin. So a
training that was killed and resumed takes the same way as one that was not: from whatever checkpoint it gets there (or from
the start), the steps up to that place are done again as they were done the first time. Rejected: the newest checkpoint, which
lies where a clock, a kill or a slow disk happened to put it; and the start of the epoch, which may be a day away.
"""

from dataclasses import dataclass

ANCHOR_STEPS = 1000
MARGIN_STEPS = 100
LEARNING_RATE_FACTOR = 0.5


@dataclass(frozen=True)
class Divergence:
    """A training that went back; the same for every attempt, so it may go into an artifact's record."""

    step: int
    """The first whose loss was not finite, counted from 1; of a validation, the step that it came after."""
    back_to: int
    """Steps that were kept."""
    learning_rate_factor: float = LEARNING_RATE_FACTOR
    """Of all steps from there on."""


class LossLostError(Exception):
    """The loss is not finite; never leaves the training."""

    def __init__(self, step: int, sentence: str) -> None:
        super().__init__(sentence)
        self.step = step


def anchor_before(step: int) -> int:
    """How many steps are kept if the loss of this step, counted from 1, is not finite."""
    return max(0, step - 1 - MARGIN_STEPS) // ANCHOR_STEPS * ANCHOR_STEPS


def is_anchor(step: int) -> bool:
    """Whether a training may have to go back to the state after so many steps."""
    return step % ANCHOR_STEPS == 0


def anchors_needed(step: int) -> set[int]:
    """Places that a training which has done so many steps may still have to go back to."""
    return {anchor_before(step + 1), step // ANCHOR_STEPS * ANCHOR_STEPS} - {0}
