"""Where a unit's training reports to, a network's or the decoder's: its checkpoints, its log, its progress and its curves."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hardmoe.stage import UnitContext
from hardmoe.storage import join
from hardmoe.training.checkpoint import Checkpoints
from hardmoe.training.metrics_log import MetricsLog
from hardmoe.training.reporting import TrainingProgress, TrainingSinks
from hardmoe.training.tensorboard import EventFiles

METRICS_FILE = "metrics.jsonl"
_RATE_SECONDS = 5.0


@contextmanager
def unit_sinks(context: UnitContext) -> Iterator[TrainingSinks]:
    """Everything below the unit's artifact; at its end, however it ends, what was noted for the curves is written."""
    curves = EventFiles(context.storage, join(context.stage.name, "_progress", "tensorboard"))
    checkpoints = Checkpoints(context.storage, context.checkpoint_prefix)
    try:
        yield TrainingSinks(checkpoints, MetricsLog(curves.note), _teller(context, curves), context.asked_to_stop)
    finally:
        curves.write()


def write_log(context: UnitContext, sinks: TrainingSinks) -> None:
    """Write `metrics.jsonl`."""
    assert sinks.log is not None
    with context.output(METRICS_FILE) as out:
        out.write(sinks.log.to_bytes())


def _teller(context: UnitContext, curves: EventFiles) -> Callable[[TrainingProgress], None]:
    """Passes a training's progress on to the unit's, with the step of its newest checkpoint, and its speed to the curves."""
    told = time.monotonic()

    def tell(at: TrainingProgress) -> None:
        nonlocal told
        values: dict[str, float | int | str] = {"examples/s": round(at.examples_per_second, 1), "step": at.step}
        if at.loss is not None:
            values["loss"] = round(at.loss, 5)
        if at.checkpoint is not None:
            values["checkpoint"] = at.checkpoint
        if at.validation_precision_at_1 is not None:
            values["precision@1"] = round(at.validation_precision_at_1, 5)
        if at.computing is not None:
            values["computing"] = round(at.computing, 3)
        context.progress(at.step, at.total_steps, **values)
        if time.monotonic() - told >= _RATE_SECONDS:
            told = time.monotonic()
            curves.note({"step": at.step, "examples_per_second": at.examples_per_second})

    return tell
