"""The seam between the durable workflow and whatever runs units: six methods, nothing about stages or files."""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from hardmoe.execution.measures import Measure
from hardmoe.execution.task import UnitOutcome, UnitTask
from hardmoe.stage import Resources


class Backend(Protocol):
    """Runs tasks somewhere. Keeps no state that matters: whatever it forgets is submitted again."""

    def prepare(self, demands: Iterable[Resources]) -> None:
        """Start, and refuse at once what can never run.

        Raises:
            BackendError: it cannot start, or a demand exceeds every machine there is; says what was asked and what is there.
        """
        ...

    def has_room(self, demand: Resources, handed_over: Mapping[Resources, int]) -> bool:
        """Whether one more unit of this demand can run beside what was handed over, or wait to bridge the next gap.

        No more wait than that: what waits here has its place, whatever becomes more urgent meanwhile.

        Args:
            demand: of the unit.
            handed_over: units at work or waiting, by demand.
        """
        ...

    def submit(self, task: UnitTask) -> None:
        """Hand a task over; returns at once."""
        ...

    def wait(self, timeout: float, meanwhile: Callable[[], None]) -> list[UnitOutcome]:
        """Outcomes that arrived since the last call; waits up to `timeout` seconds for the first.

        A backend without workers runs a unit here, however long it takes, and calls `meanwhile` now and then.
        """
        ...

    def publish(self, measures: Mapping[Measure, float]) -> None:
        """Tell a monitoring system, if there is one; called every few seconds once units may be submitted."""
        ...

    def close(self) -> None:
        """Stop what was started; running units are abandoned."""
        ...
