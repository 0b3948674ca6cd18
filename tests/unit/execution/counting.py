"""A stage small enough to understand at a glance, for tests of everything around stages; and ways to make it misbehave.

It squares numbers, a unit each, then adds the squares up in a second phase: files of the artifact, scratch files between
phases, something shared by the driver, and a small file of the finish. What goes wrong is said by files in a control directory
(an operational place, so it is no part of the identity), such as `fail-square-2` or `kill-square-1`.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hardmoe.artifacts.lease import LeaseObserver
from hardmoe.artifacts.store import ArtifactStore
from hardmoe.config import Json
from hardmoe.errors import DataError, PreemptedError
from hardmoe.execution.backend import Backend
from hardmoe.execution.inline import InlineBackend
from hardmoe.execution.plan import Plan, make_plan
from hardmoe.execution.progress import Reporter
from hardmoe.execution.runner import Runner, RunnerOptions
from hardmoe.execution.task import UnitOutcome, UnitTask
from hardmoe.execution.tracked import Tracked
from hardmoe.execution.worker import execute_unit
from hardmoe.stage import Completion, DriverContext, Finished, Phase, Resources, Stage, Unit, UnitContext
from hardmoe.storage import LocalStorage, Storage

_ONE_CPU = Resources()


class CountingWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Squares, then their sum."""
        control = Control.of(context.stage)
        control.note("driver")
        control.act("driver")
        config = context.stage.config
        offset = sum(context.input(role).payload["total"] for role in context.stage.inputs)
        shared = context.share("offset.json", json.dumps(offset).encode())
        common = {"can_isolate": config.get("can_isolate", False)}
        units = [Unit(str(n), {"number": n, "shared": shared}, cost=config.get("cost", n), **common) for n in config["numbers"]]
        squares = yield Phase("square", units)
        control.act("between")
        paths = [done.scratch["value"] for done in squares]
        (total,) = yield Phase("sum", [Unit("all", {"paths": paths, "shared": shared})])
        control.act("finish")
        files = {"finish.json": json.dumps(total.payload).encode()}
        return Finished({"total": total.payload["total"]}, files)

    def run(self, context: UnitContext) -> Json:
        """One square, or the sum."""
        control, label = Control.of(context.stage), f"{context.phase}-{context.unit.name}"
        control.note(label)
        arguments = context.unit.arguments
        context.progress(0, 1, **control.values(label))
        control.act(label)
        control.make_room(label, context)
        if context.phase == "square":
            value = arguments["number"] ** 2
            with context.scratch("value") as out:
                out.write(str(value).encode())
            name = context.stage.config.get("same_name") or arguments["number"]
            with context.output(f"squares/{name}.txt") as out:
                out.write(f"{value}\n".encode())
            control.act(f"late-{label}")
            return {"value": value, "text": ("a", "tuple")}
        total = json.loads(context.storage.read_bytes(arguments["shared"]))
        total += sum(int(context.storage.read_bytes(path)) for path in arguments["paths"])
        with context.output("sum.txt") as out:
            out.write(str(total).encode())
        return {"total": total}


@dataclass(frozen=True)
class Control:
    """The directory by which a test says what goes wrong, and in which it reads what was run."""

    directory: Path | None

    @classmethod
    def of(cls, stage: Stage) -> "Control":
        """The control directory of a stage; none if it was made without."""
        place = stage.operational.get("control")
        return cls(None if place is None else Path(place))

    def note(self, label: str) -> None:
        """Write down that a piece is run."""
        if self.directory is not None:
            with (self.directory / "runs.log").open("a") as log:
                log.write(f"{label} {os.getpid()}\n")

    def runs(self) -> list[str]:
        """What was run, in order."""
        assert self.directory is not None
        log = self.directory / "runs.log"
        return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []

    def processes(self) -> set[int]:
        """Process ids of what was run."""
        assert self.directory is not None
        return {int(line.split()[1]) for line in (self.directory / "runs.log").read_text().splitlines()}

    def order(self, what: str, label: str, text: str = "") -> None:
        """Make a piece misbehave."""
        assert self.directory is not None
        (self.directory / f"{what}-{label}").write_text(text)

    def cancel(self, what: str, label: str) -> None:
        """Take an order back."""
        assert self.directory is not None
        (self.directory / f"{what}-{label}").unlink()

    def values(self, label: str) -> dict[str, str]:
        """Values that a unit reports with its progress."""
        path = self.directory and self.directory / f"checkpoint-{label}"
        return {"checkpoint": path.read_text()} if path and path.exists() else {}

    def make_room(self, label: str, context: UnitContext) -> None:
        """Once, if so ordered: stay until it is asked to stop, and do. Every attempt says on which of Ray's nodes it is."""
        if self.directory is None or not list(self.directory.glob(f"*room-{label}")):
            return
        import ray

        (self.directory / f"at-{label}-{ray.get_runtime_context().get_node_id()}").touch()
        order = self.directory / f"room-{label}"
        while order.exists():
            if reason := context.asked_to_stop():
                order.rename(self.directory / f"made-room-{label}")
                raise PreemptedError(f"{reason} at step 1 of 2")
            time.sleep(0.01)

    def act(self, label: str) -> None:
        """Misbehave as ordered."""
        if self.directory is None:
            return
        for what, action in _ACTIONS.items():
            path = self.directory / f"{what}-{label}"
            if path.exists():
                action(path)


class StrangeError(Exception):
    """An exception that cannot even be printed."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def _fail(path: Path) -> None:
    raise DataError(path.read_text() or f"{path.name} as ordered")


def _bug(path: Path) -> None:
    raise KeyError(path.name)


def _silent_bug(path: Path) -> None:
    raise ValueError


def _strange(path: Path) -> None:
    raise StrangeError


def _kill(path: Path) -> None:
    path.unlink()
    os.kill(os.getpid(), signal.SIGKILL)


def _block(path: Path) -> None:
    while path.exists():
        time.sleep(0.01)


_ACTIONS: dict[str, Callable[[Path], None]] = {
    "fail": _fail,
    "bug": _bug,
    "silent": _silent_bug,
    "strange": _strange,
    "kill": _kill,
    "block": _block,
}


def counting(
    name: str = "count",
    numbers: Sequence[int] = (1, 2, 3),
    control: Path | None = None,
    inputs: Sequence[str] = (),
    resources: Resources = _ONE_CPU,
    **config: Json,
) -> Stage:
    """A counting stage; `inputs` are names of others, whose totals it adds."""
    return Stage(
        name=name,
        kind="counting",
        version=1,
        config={"numbers": list(numbers), **config},
        work="counting:CountingWork",
        inputs={f"input-{index}": each for index, each in enumerate(inputs)},
        operational={"control": None if control is None else str(control)},
        resources=resources,
    )


@dataclass
class NotedDisplay:
    """Keeps what would be shown."""

    lines: list[str] = field(default_factory=list)
    seen: list[dict[str, tuple[str, int, int]]] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Keep a line."""
        self.lines.append(text)

    def update(self, tracked: Mapping[str, Tracked]) -> None:
        """Keep the state of every artifact."""
        self.seen.append({name: (state.phase, state.done, state.total) for name, state in tracked.items()})

    def close(self) -> None:
        """Nothing to restore."""


@dataclass
class ScriptedBackend:
    """Runs units here, `workers` at a time as far as the runner can tell; `fate` may replace any outcome."""

    workers: int = 1
    fate: Callable[[UnitTask], UnitOutcome | None] = lambda task: None
    submitted: list[UnitTask] = field(default_factory=list)
    in_flight: list[UnitTask] = field(default_factory=list)
    most: int = 0
    closed: bool = False

    def prepare(self, demands: object) -> None:
        """Nothing to start."""

    def publish(self, measures: object) -> None:
        """Nobody looks."""

    def has_room(self, demand: Resources, handed_over: Mapping[Resources, int]) -> bool:
        """As many as there are workers."""
        return handed_over.get(demand, 0) < self.workers

    def submit(self, task: UnitTask) -> None:
        """Note the task."""
        self.submitted.append(task)
        self.in_flight.append(task)
        self.most = max(self.most, len(self.in_flight))

    def wait(self, timeout: float, meanwhile: Callable[[], None]) -> list[UnitOutcome]:
        """Run the task that was submitted first."""
        task = self.in_flight.pop(0)
        return [self.fate(task) or execute_unit(task, meanwhile)]

    def close(self) -> None:
        """Note the end."""
        self.closed = True

    @property
    def labels(self) -> list[str]:
        """What was submitted, in order: artifact, phase and unit."""
        return [f"{task.stage.name}:{task.phase}-{task.unit.name}" for task in self.submitted]


@dataclass
class Run:
    """One driver on one root."""

    root: Path
    stages: Sequence[Stage]
    options: RunnerOptions = field(default_factory=RunnerOptions)
    backend: Backend = field(default_factory=InlineBackend)
    display: NotedDisplay = field(default_factory=NotedDisplay)
    storage: Storage | None = None

    def __post_init__(self) -> None:
        self.store = ArtifactStore(self.storage or LocalStorage(self.root))

    def plan(self) -> Plan:
        """What is there."""
        return make_plan(self.store, self.stages)

    def run(self, plan: Plan | None = None) -> Plan:
        """Build what is missing."""
        plan = plan or self.plan()
        observer = LeaseObserver(self.store.storage, heartbeat=3600)
        Runner(self.store, lambda: self.backend, Reporter(self.store.storage, self.display), self.options, observer).run(plan)
        return plan


def total(numbers: Sequence[int]) -> int:
    """What a counting stage must come to."""
    return sum(number * number for number in numbers)


def eventually(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def in_thread(run: Run) -> tuple[threading.Thread, list[BaseException]]:
    """Begin a run beside the test; the list gets what it raises."""
    raised: list[BaseException] = []

    def target() -> None:
        try:
            run.run()
        except BaseException as error:  # noqa: BLE001 - the test looks at whatever it was
            raised.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    return thread, raised
