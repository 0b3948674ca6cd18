"""What a person sees of a run: the display while it goes on, and one small summary file per artifact for everybody else.

The summary (`_progress/status.json`) is all that `hardmoe status` reads. Rejected: letting `status` list completions, which
takes a request per unit on an object store.
"""

import json
import time
from collections.abc import Collection, Mapping
from types import TracebackType

from hardmoe.config import Json
from hardmoe.errors import StorageError
from hardmoe.execution.build import Build
from hardmoe.execution.display import Display
from hardmoe.execution.measures import Measures
from hardmoe.execution.task import BuildPaths, UnitTask
from hardmoe.execution.tracked import Tracked, format_seconds
from hardmoe.stage import Completion
from hardmoe.storage import Storage, read_if_there

STATUS_SECONDS = 2.0


class Reporter:
    """Collects what the runner tells and what running units leave in the root; shows it and keeps the summaries."""

    def __init__(self, storage: Storage, display: Display) -> None:
        self._storage = storage
        self._display = display
        self._tracked: dict[str, Tracked] = {}
        self._earlier: dict[str, Json] = {}
        self._untold: list[str] = []
        self._next_tick = 0.0
        self.measures = Measures()
        """What a monitoring system is told."""

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._display.close()

    def say(self, text: str) -> None:
        """Show one line."""
        self._display.say(text)

    def started(self, build: Build) -> None:
        """An artifact's build begins, or goes on where an earlier one was left."""
        self._tracked[build.stage.name] = Tracked()
        self.advanced(build)

    def submitted(self, task: UnitTask) -> None:
        """A unit waits for a worker: what an earlier attempt said of its progress is not news."""
        self._earlier[_live_path(task)] = self._live(task)
        tries = self._tracked[task.stage.name].tries
        tries[task.unit.name] = tries.get(task.unit.name, 0) + 1
        if tries[task.unit.name] > 1:
            self.measures.count("hardmoe_units_again_total", task.stage.name)

    def unit_done(self, task: UnitTask, completion: Completion) -> None:
        """A unit is complete."""
        self.measures.count("hardmoe_units_done_total", task.stage.name)
        self.measures.count("hardmoe_bytes_stored_total", task.stage.name, sum(entry.size for entry in completion.files))
        self._tracked[task.stage.name].live.pop(task.unit.name, None)
        self._earlier.pop(_live_path(task), None)

    def advanced(self, build: Build) -> None:
        """A completion was taken in, which may have begun another phase."""
        self._follow(build)
        self._display.update(self._tracked)

    def finished(self, name: str, count: int, total: int) -> None:
        """An artifact is committed, the `count`-th of `total`."""
        tracked = self._tracked.pop(name)
        self._storage.delete_tree(BuildPaths(name, "").status)
        self._display.say(f"{name}: done in {format_seconds(time.monotonic() - tracked.started)} ({count} of {total})")
        self._display.update(self._tracked)

    def failed(self, name: str, label: str, sentence: str) -> None:
        """A unit, or the driver's part, failed for good."""
        tracked = self._tracked.setdefault(name, Tracked())
        tracked.state = "failed"
        self.measures.count("hardmoe_units_failed_total", name)
        tracked.failures.append({"unit": label, "error": sentence})
        self._untold.append(f"{label}: FAILED: {sentence}")
        self._save(name, tracked)

    def tell_failures(self) -> None:
        """The run goes on: show what failed by now. What ends a run is told once, by its error."""
        for line in self._untold:
            self._display.say(line)
        self._untold.clear()

    def stopped(self, builds: Mapping[str, Build]) -> None:
        """The driver ends; what it leaves unfinished says so in its summary."""
        for name in set(builds) & set(self._tracked):
            tracked = self._tracked[name]
            tracked.state = "failed" if tracked.failures else "stopped"
            tracked.live = {}
            self._save(name, tracked)

    def tick(self, builds: Mapping[str, Build], in_flight: Collection[UnitTask]) -> bool:
        """Look at the running units and show everything, every two seconds at most; whether it was time."""
        if time.monotonic() < self._next_tick:
            return False
        self._next_tick = time.monotonic() + STATUS_SECONDS
        working = {task.stage.name for task in in_flight}
        for name, build in builds.items():
            self._follow(build)
            self._tracked[name].look(name in working)
        for task in in_flight:
            body = self._live(task)
            if body is not None and body != self._earlier.get(_live_path(task)):
                self._tracked[task.stage.name].hear(task.unit.name, body)
        for name in builds:
            self._save(name, self._tracked[name])
        said = ((task.stage.name, self._tracked[task.stage.name].live.get(task.unit.name)) for task in in_flight)
        self.measures.look(said)
        self._display.update(self._tracked)
        return True

    def last_checkpoint(self, task: UnitTask) -> str:
        """What a unit last said of its checkpoints, to see whether a lost one had got any further."""
        body = self._live(task)
        return "" if body is None else str(body["values"].get("checkpoint", ""))

    def preempted(self, task: UnitTask) -> str | None:
        """What the attempt that was last submitted said of an end in good order; its process may have died right after."""
        body = self._live(task)
        if body is None or body == self._earlier.get(_live_path(task)):
            return None
        sentence: str | None = body.get("preempted")
        return sentence

    def _follow(self, build: Build) -> None:
        if build.phase is not None:
            self._tracked[build.stage.name].follow(build.phase.name, build.units_done, len(build.phase.units))

    def _live(self, task: UnitTask) -> dict[str, Json] | None:
        try:
            data = read_if_there(self._storage, _live_path(task))
            body: dict[str, Json] | None = None if data is None else json.loads(data)
        except (StorageError, ValueError):
            # A store that is away, or a damaged file: nobody's work depends on it.
            return None
        return body

    def _save(self, name: str, tracked: Tracked) -> None:
        try:
            self._storage.write_bytes(BuildPaths(name, "").status, json.dumps(tracked.summary()).encode())
        except StorageError:
            # A full or read-only disk fails the build itself, with its own sentence; the summary must not hide that one.
            return


def _live_path(task: UnitTask) -> str:
    return task.paths.live(task.phase, task.unit.name)
