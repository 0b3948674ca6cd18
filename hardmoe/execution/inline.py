"""The backend without workers: every unit runs in the driver, one at a time. For tests, debuggers and machines without Ray."""

import time
from collections.abc import Iterable
from dataclasses import replace

from hardmoe.execution.task import UnitOutcome, UnitTask
from hardmoe.execution.worker import execute_unit
from hardmoe.stage import Resources


class InlineBackend:
    """Runs a task when it is submitted; uses a GPU if torch sees one and the stage wants it."""

    def __init__(self) -> None:
        self._outcomes: list[UnitOutcome] = []

    def prepare(self, demands: Iterable[Resources]) -> None:
        """Nothing to start; a unit simply takes what the machine has."""

    def slots(self, demand: Resources) -> int:
        """One unit at a time."""
        return 1

    def submit(self, task: UnitTask) -> None:
        """Run the task here and now."""
        wants_gpu = task.stage.resources.num_gpus is None or task.stage.resources.num_gpus > 0
        self._outcomes.append(execute_unit(replace(task, use_gpu=wants_gpu and _gpu_available())))

    def wait(self, timeout: float) -> list[UnitOutcome]:
        """Outcomes of what was submitted since."""
        if not self._outcomes:
            time.sleep(timeout)
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def close(self) -> None:
        """Nothing to stop."""


def _gpu_available() -> bool:
    import torch

    return torch.cuda.is_available()
