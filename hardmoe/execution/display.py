"""Where progress is shown: bars on a terminal, one line now and then in a job's log.

Rejected: the same carriage-return tricks for both, which turn a log file into one line of a megabyte.
"""

import sys
import time
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from hardmoe.execution.tracked import Tracked

LOG_SECONDS = 15.0


class Display(Protocol):
    """Where progress is shown."""

    def say(self, text: str) -> None:
        """Show one line of lasting interest."""
        ...

    def update(self, tracked: Mapping[str, Tracked]) -> None:
        """Show the present state of all artifacts being built."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...


class LogDisplay:
    """Plain lines on stderr, for job logs: events as they come, the state of things every quarter of a minute."""

    def __init__(self) -> None:
        self._next = time.monotonic() + LOG_SECONDS

    def say(self, text: str) -> None:
        """One line with the time of day."""
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)  # noqa: T201 - this is the program's output

    def update(self, tracked: Mapping[str, Tracked]) -> None:
        """A line per artifact, now and then."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOG_SECONDS
        for name, state in tracked.items():
            if state.state == "running":
                share = f"{100 * state.fraction:.0f} % of " if state.units else ""
                self.say(f"{name}: {share}{state.describe()}")

    def close(self) -> None:
        """Nothing to restore."""


class BarDisplay:
    """Progress bars on a terminal."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}", table_column=Column(min_width=20)),
            BarColumn(16),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}"),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._bars: dict[str, TaskID] = {}
        self._progress.start()

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, tracked: Mapping[str, Tracked]) -> None:
        """A bar per artifact being built."""
        running = {name: state for name, state in tracked.items() if state.state == "running"}
        for name in set(self._bars) - set(running):
            self._progress.remove_task(self._bars.pop(name))
        for name, state in running.items():
            if name not in self._bars:
                self._bars[name] = self._progress.add_task(name, total=1.0, state="")
            self._progress.update(self._bars[name], completed=state.fraction, state=state.describe())

    def close(self) -> None:
        """Take the bars away."""
        self._progress.stop()


def make_display() -> Display:
    """Bars where stderr is a terminal, else lines."""
    return BarDisplay() if sys.stderr.isatty() else LogDisplay()
