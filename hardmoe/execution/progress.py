"""What a person sees of a run: bars on a terminal, one line now and then in a log, one small summary file per artifact.

The summary (`_progress/status.json`) is all that `hardmoe status` reads. Rejected: letting `status` list completions, which
takes a request per unit on an object store.
"""

import json
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from hardmoe.artifacts.provenance import now
from hardmoe.config import Json
from hardmoe.errors import StorageError
from hardmoe.execution.build import Build
from hardmoe.execution.task import BuildPaths, UnitTask
from hardmoe.storage import Storage, join

STATUS_SECONDS = 2.0
LOG_SECONDS = 15.0
_SHOWN_VALUES = ("examples/s", "loss")


class Display(Protocol):
    """Where progress is shown."""

    def say(self, text: str) -> None:
        """Show one line of lasting interest."""
        ...

    def update(self, tracked: Mapping[str, "Tracked"]) -> None:
        """Show the present state of all artifacts being built."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...


@dataclass
class Tracked:
    """How far one artifact is."""

    started: float = field(default_factory=time.monotonic)
    state: str = "running"
    phase: str = ""
    done: int = 0
    total: int = 0
    done_at_start: int = 0
    phase_started: float = field(default_factory=time.monotonic)
    live: dict[str, dict[str, Json]] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)

    @property
    def fraction_done(self) -> float:
        """Units done, running ones counted by their own share."""
        running = sum(min(1.0, float(body["done"]) / float(body["total"])) for body in self.live.values() if body["total"])
        return min(float(self.total), self.done + running)

    @property
    def rate(self) -> float:
        """Units per second since this driver took up the phase."""
        elapsed = time.monotonic() - self.phase_started
        return max(0.0, self.fraction_done - self.done_at_start) / elapsed if elapsed > 0.5 else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the phase is through, at the present rate."""
        return (self.total - self.fraction_done) / self.rate if self.rate > 0 else None

    def describe(self) -> str:
        """The state in one line."""
        parts = [f"{self.phase} {self.done}/{self.total}" if self.total > 1 else self.phase]
        if self.total and self.fraction_done:
            parts.append(f"{100 * self.fraction_done / self.total:.0f} %")
        for name in _SHOWN_VALUES:
            values = [body["values"][name] for body in self.live.values() if name in body["values"]]
            if values:
                parts.append(f"{name} {sum(values) if name.endswith('/s') else sum(values) / len(values):.4g}")
        if self.eta_seconds is not None:
            parts.append(f"ETA {format_seconds(self.eta_seconds)}")
        return ", ".join(part for part in parts if part)

    def summary(self) -> dict[str, Json]:
        """The content of `status.json`."""
        return {
            "state": self.state,
            "phase": self.phase,
            "units_done": self.done,
            "units_total": self.total,
            "fraction": self.fraction_done / self.total if self.total else 0.0,
            "units_per_second": self.rate,
            "eta_seconds": self.eta_seconds,
            "running": self.live,
            "failures": self.failures,
            "updated": now(),
        }


def format_seconds(seconds: float) -> str:
    """A duration for people: `0:07`, `12:30`, `3:05:00`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Reporter:
    """Collects what the runner tells and what running units leave in the root; shows it and keeps the summaries."""

    def __init__(self, storage: Storage, display: Display) -> None:
        self._storage = storage
        self._display = display
        self._tracked: dict[str, Tracked] = {}
        self._next_tick = 0.0

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._display.close()

    def say(self, text: str) -> None:
        """Show one line."""
        self._display.say(text)

    def started(self, name: str) -> None:
        """An artifact's build begins."""
        self._tracked[name] = Tracked()

    def unit_done(self, task: UnitTask, seconds: float) -> None:
        """A unit is complete."""
        self._tracked[task.stage.name].live.pop(task.unit.name, None)

    def finished(self, name: str) -> None:
        """An artifact is committed."""
        tracked = self._tracked.pop(name)
        self._storage.delete_tree(join(name, "_progress", "status.json"))
        self._display.say(f"{name}: done in {format_seconds(time.monotonic() - tracked.started)}")
        self._display.update(self._tracked)

    def failed(self, name: str, label: str, sentence: str) -> None:
        """A unit, or the driver's part, failed for good."""
        tracked = self._tracked.setdefault(name, Tracked())
        tracked.state = "failed"
        tracked.failures.append({"unit": label, "error": sentence})
        self._display.say(f"{label}: FAILED: {sentence}")
        self._save(name, tracked)

    def stopped(self, builds: Mapping[str, Build]) -> None:
        """The driver ends; what it leaves unfinished says so in its summary."""
        for name in builds:
            tracked = self._tracked[name]
            tracked.state = "failed" if tracked.failures else "stopped"
            tracked.live = {}
            self._save(name, tracked)

    def tick(self, builds: Mapping[str, Build], in_flight: Iterable[UnitTask]) -> None:
        """Look at the running units and show everything, every two seconds at most."""
        if time.monotonic() < self._next_tick:
            return
        self._next_tick = time.monotonic() + STATUS_SECONDS
        for name, build in builds.items():
            self._follow(self._tracked[name], build)
        for task in in_flight:
            if (body := self._live(task)) is not None and task.stage.name in self._tracked:
                self._tracked[task.stage.name].live[task.unit.name] = body
        for name in builds:
            self._save(name, self._tracked[name])
        self._display.update(self._tracked)

    def last_checkpoint(self, task: UnitTask) -> str:
        """What a unit last said of its checkpoints, to see whether a lost one had got any further."""
        body = self._live(task)
        return "" if body is None else str(body["values"].get("checkpoint", ""))

    def _follow(self, tracked: Tracked, build: Build) -> None:
        phase = build.phase
        if phase is None:
            return
        if tracked.phase != phase.name:
            tracked.phase, tracked.done_at_start, tracked.phase_started = phase.name, build.units_done, time.monotonic()
            tracked.live = {}
        tracked.done, tracked.total = build.units_done, len(phase.units)

    def _live(self, task: UnitTask) -> dict[str, Json] | None:
        path = task.paths.live(task.phase, task.unit.name)
        if not self._storage.exists(path):
            return None
        body: dict[str, Json] = json.loads(self._storage.read_bytes(path))
        return body

    def _save(self, name: str, tracked: Tracked) -> None:
        try:
            self._storage.write_bytes(BuildPaths(name, "").status, json.dumps(tracked.summary()).encode())
        except StorageError:
            # A full or read-only disk fails the build itself, with its own sentence; the summary must not hide that one.
            return


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
                self.say(f"{name}: {state.describe()}")

    def close(self) -> None:
        """Nothing to restore."""


class BarDisplay:
    """Progress bars on a terminal."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<26}"), BarColumn(24), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._bars: dict[str, TaskID] = {}
        self._progress.start()

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._progress.console.print(text, markup=False, highlight=False)

    def update(self, tracked: Mapping[str, Tracked]) -> None:
        """A bar per artifact being built."""
        for name in set(self._bars) - set(tracked):
            self._progress.remove_task(self._bars.pop(name))
        for name, state in tracked.items():
            if name not in self._bars:
                self._bars[name] = self._progress.add_task(name, total=1.0, state="")
            total = max(1, state.total)
            self._progress.update(self._bars[name], completed=state.fraction_done / total, state=state.describe())

    def close(self) -> None:
        """Take the bars away."""
        self._progress.stop()


def make_display() -> Display:
    """Bars where stderr is a terminal, else lines."""
    return BarDisplay() if sys.stderr.isatty() else LogDisplay()
