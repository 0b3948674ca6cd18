"""The backend without workers: every unit runs in the driver, one at a time. For tests, debuggers and machines without Ray."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from hardmoe.execution.measures import Measure
from hardmoe.execution.task import UnitOutcome, UnitTask
from hardmoe.execution.worker import execute_unit
from hardmoe.stage import Resources


class InlineBackend:
    """Runs a task when its outcome is waited for; uses a GPU if torch sees one and the stage wants it."""

    def __init__(self) -> None:
        self._tasks: deque[UnitTask] = deque()

    def prepare(self, demands: Iterable[Resources]) -> None:
        """Nothing to start; a unit simply takes what the machine has."""

    def has_room(self, demand: Resources, handed_over: Mapping[Resources, int]) -> bool:
        """One unit at a time, and none ahead: its lease would keep other machines from it for nothing."""
        return not any(handed_over.values())

    def submit(self, task: UnitTask) -> None:
        """Note the task."""
        self._tasks.append(task)

    def wait(self, timeout: float, meanwhile: Callable[[], None]) -> list[UnitOutcome]:
        """Run the next task here and now."""
        if not self._tasks:
            return []
        task = self._tasks.popleft()
        wants_gpu = task.stage.resources.num_gpus is None or task.stage.resources.num_gpus > 0
        return [execute_unit(replace(task, use_gpu=wants_gpu and _gpu_available()), meanwhile)]

    def publish(self, measures: Mapping[Measure, float]) -> None:
        """Nobody looks."""

    def close(self) -> None:
        """Nothing to stop."""
        self._tasks.clear()


def _gpu_available() -> bool:
    import torch

    return torch.cuda.is_available()
