"""The driver alone, at scale: 100,000 feature units and 1,000 experts pass through runner and progress; no unit does anything.

    python tests/benchmarks/driver_scale.py [--units 100000] [--experts 1000] [--slots 256]

The backend is pretended: it writes the completion that a worker would write and hands the outcome back, `--slots` at a time.
All else is the real thing: leases, frontier, queue, completions on disk, records, summaries. Printed are units per second, the
driver's memory as units get done, and how long one `hardmoe status` of all artifacts takes in the middle of it and after.
"""

import argparse
import datetime
import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
from sleeping import NoDisplay

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.cli.inspect import artifact_status
from hardmoe.config import Json
from hardmoe.execution.plan import make_plan
from hardmoe.execution.progress import Reporter
from hardmoe.execution.runner import Runner, RunnerOptions
from hardmoe.execution.task import StoredCompletion, UnitOutcome, UnitTask
from hardmoe.stage import Completion, DriverContext, Finished, Phase, Resources, Stage, Unit
from hardmoe.storage import LocalStorage


class NothingWork:
    """As many units as the config says, each of which leaves a number."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """All of them at once."""
        done = yield Phase("do", [Unit(f"{number:06d}") for number in range(context.stage.config["units"])])
        return Finished({"total": sum(completion.payload for completion in done)})

    def run(self, context: object) -> Json:
        """Never called: the backend answers for the units."""
        raise NotImplementedError


class PretendedBackend:
    """Answers for workers, in the driver's own process, as fast as it is asked."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._tasks: deque[UnitTask] = deque()
        self.done = 0

    def prepare(self, demands: Iterable[Resources]) -> None:
        """Nothing to start."""

    def publish(self, measures: object) -> None:
        """Nobody looks."""

    def has_room(self, demand: Resources, handed_over: Mapping[Resources, int]) -> bool:
        """As many as there are slots."""
        return sum(handed_over.values()) < self._slots

    def submit(self, task: UnitTask) -> None:
        """Note the task."""
        self._tasks.append(task)

    def wait(self, timeout: float, meanwhile: Callable[[], None]) -> list[UnitOutcome]:
        """Complete all that were handed over."""
        outcomes = []
        while self._tasks:
            task = self._tasks.popleft()
            completion = Completion(task.unit.name, 1, [], {})
            stored = StoredCompletion(completion, {}, 0.0, "here").to_bytes()
            LocalStorage(Path(task.root)).create(task.paths.done(task.phase, task.unit.name), stored)
            outcomes.append(UnitOutcome(task, completion))
        self.done += len(outcomes)
        return outcomes

    def close(self) -> None:
        """Nothing to stop."""


class Watch(threading.Thread):
    """Looks at the run from beside: memory as units get done, and the time that a status takes halfway."""

    def __init__(self, storage: LocalStorage, names: list[str], backend: PretendedBackend, total: int) -> None:
        super().__init__(daemon=True)
        self._looks, self._total, self._backend = (storage, names), total, backend
        self.memory: dict[float, int] = {}
        self.status_seconds: list[float] = []

    def run(self) -> None:
        """Until all units are done."""
        for share in (0.1, 0.5, 0.9, 1.0):
            while self._backend.done < share * self._total:
                time.sleep(0.02)
            self.memory[share] = psutil.Process().memory_info().rss
            if share == 0.5:
                self.status_seconds.append(status_seconds(*self._looks))


def status_seconds(storage: LocalStorage, names: list[str]) -> float:
    """How long one look at all artifacts takes."""
    began = time.perf_counter()
    for name in names:
        artifact_status(storage, name)
    return time.perf_counter() - began


def main() -> None:
    """Print a few lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=100_000)
    parser.add_argument("--experts", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=256)
    options = parser.parse_args()
    os.fsync = lambda descriptor: None  # the disk is not what is measured
    work = f"{Path(__file__).stem}:NothingWork"
    features = Stage("features", "nothing", 1, {"units": options.units}, work)
    names = [f"experts/expert-{number:04d}" for number in range(options.experts)]
    experts = [Stage(name, "nothing", 1, {"units": 1, "name": name}, work, {"features": "features"}) for name in names]
    today = datetime.datetime.now(datetime.UTC)
    print(f"{today:%Y-%m-%d}, {os.cpu_count()} cores; {options.units:,} units, {options.experts:,} experts")
    with tempfile.TemporaryDirectory() as directory:
        storage = LocalStorage(Path(directory))
        store, backend = ArtifactStore(storage), PretendedBackend(options.slots)
        plan = make_plan(store, [features, *experts])
        watch = Watch(storage, ["features", *names], backend, options.units + options.experts)
        watch.start()
        before, began, cpu = psutil.Process().memory_info().rss, time.perf_counter(), time.process_time()
        Runner(store, lambda: backend, Reporter(storage, NoDisplay()), RunnerOptions()).run(plan)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        watch.join()
        after = status_seconds(storage, ["features", *names])
    total = options.units + options.experts
    print(f"{total / wall:,.0f} units/s ({wall:.0f} s, of which {cpu:.0f} s of CPU: {1e6 * cpu / total:.0f} us a unit)")
    shown = ", ".join(f"{100 * share:.0f} %: {(rss - before) / 2**20:+.0f} MiB" for share, rss in watch.memory.items())
    print(f"driver's memory {before / 2**20:.0f} MiB before; {shown}")
    print(f"status of all artifacts: {1000 * watch.status_seconds[0]:.0f} ms halfway, {1000 * after:.0f} ms at the end")


if __name__ == "__main__":
    sys.modules.setdefault(Path(__file__).stem, sys.modules["__main__"])
    main()
