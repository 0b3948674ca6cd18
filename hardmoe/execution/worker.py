"""What happens on a worker: one unit, from its task to its completion.

The worker itself writes the completion, as its last act and by conditional create, so a dead driver loses nothing and of two
attempts at the same unit exactly one counts. An exception of our code or of the user's data becomes the outcome's one
sentence (the traceback goes to the unit's log); only the death of the process is left to the backend to notice. A unit that
was asked to make room leaves word of it with its progress, since its process may die before it can say so.
"""

import json
import logging
import secrets
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hardmoe.artifacts.pinned_versions import OPTION, decisive, differing
from hardmoe.artifacts.provenance import machine, now, versions
from hardmoe.artifacts.store import Artifact, ArtifactStore
from hardmoe.config import Json
from hardmoe.errors import HardmoeError, PreemptedError, StorageError, StoreAwayError, WorkerLostError
from hardmoe.execution.stopping import StopRequests, UnitStop
from hardmoe.execution.task import StoredCompletion, UnitOutcome, UnitTask, load_completion, parse_completion
from hardmoe.stage import Completion, FileEntry, Stage, Unit, load_work
from hardmoe.storage import OutputFile, Storage, join, open_storage

_LIVE_SECONDS = 1.0
logger = logging.getLogger("hardmoe")


class StageContext:
    """The run as a stage's code sees it; on the driver as it is, in a unit as `RunningUnit`."""

    def __init__(self, stage: Stage, storage: Storage) -> None:
        self.stage = stage
        self.storage = storage
        self._store = ArtifactStore(storage)
        self._inputs: dict[str, Artifact] = {}

    def input(self, role: str) -> Artifact:
        """A finished input by its role; its record is read once."""
        if role not in self._inputs:
            self._inputs[role] = self._store.get(self.stage.inputs[role])
        return self._inputs[role]


class RunningUnit(StageContext):
    """One attempt at a unit: its outputs under attempt-scoped names, its progress, its log."""

    def __init__(self, task: UnitTask, storage: Storage, stop: UnitStop, meanwhile: Callable[[], None] | None = None) -> None:
        super().__init__(task.stage, storage)
        self._meanwhile = meanwhile
        self.asked_to_stop = stop.reason
        self.task = task
        self.unit: Unit = task.unit
        self.phase = task.phase
        self.use_gpu = task.use_gpu
        self.is_isolated = task.is_isolated
        self.checkpoint_prefix = join(task.stage.name, "checkpoints")
        self.attempt = secrets.token_hex(4)
        self._files: list[FileEntry] = []
        self._staged: dict[str, str] = {}
        self._scratch: dict[str, str] = {}
        self._last_live = 0.0
        self._said: dict[str, Json] = {}
        self._host = socket.gethostname()

    @contextmanager
    def output(self, path: str) -> Iterator[OutputFile]:
        """Open a file of the artifact for writing, by its path within it."""
        if path in self._staged:
            raise ValueError(f"the unit {self.unit.name} wrote '{path}' twice")
        staged = join(self.task.paths.attempt("staged", self.phase, self.unit.name, self.attempt), path)
        with self.storage.open_output(staged) as out:
            yield out
        self._files.append(FileEntry(path, out.size, out.sha256))
        self._staged[path] = staged

    @contextmanager
    def scratch(self, name: str) -> Iterator[OutputFile]:
        """Open a file for a later phase of the same stage."""
        path = join(self.task.paths.attempt("scratch", self.phase, self.unit.name, self.attempt), name)
        with self.storage.open_output(path) as out:
            yield out
        self._scratch[name] = path

    def progress(self, done: float, total: float, **values: float | int | str) -> None:
        """Note how far the unit is, at most once a second."""
        self._said = {"done": done, "total": total, "values": values}
        if time.monotonic() - self._last_live < _LIVE_SECONDS:
            return
        self._last_live = time.monotonic()
        self._tell()
        if self._meanwhile is not None:
            self._meanwhile()

    def say_preempted(self, sentence: str) -> None:
        """Leave word, with the latest progress, of an end in good order."""
        self._tell(preempted=sentence)

    def _tell(self, **more: Json) -> None:
        body = {**self._said, "host": self._host, "updated": now(), "attempt": self.attempt, **more}
        self.storage.write_bytes(self.task.paths.live(self.phase, self.unit.name), json.dumps(body).encode())

    def complete(self, payload: Json, seconds: float) -> Completion:
        """Create the completion; if another attempt was first, its completion is the one that counts.

        What is returned was read back from the bytes, so the driver sees the same values now as after a replay.
        """
        path = self.task.paths.done(self.phase, self.unit.name)
        completion = Completion(self.unit.name, payload, sorted(self._files, key=lambda entry: entry.path), self._scratch)
        facts = (round(seconds, 3), self._host, decisive(versions()), machine(), self._said.get("values", {}))
        data = StoredCompletion(completion, self._staged, *facts).to_bytes()
        if self.storage.create(path, data):
            return parse_completion(data, path).completion
        return load_completion(self.storage, path).completion


def execute_unit(
    task: UnitTask, meanwhile: Callable[[], None] | None = None, leaving: Callable[[], str | None] | None = None
) -> UnitOutcome:
    """Run one unit to its completion, its error or, if it must make room, its checkpoint; raises only what kills the process.

    Args:
        task: what to run.
        meanwhile: called whenever the unit's progress was noted, where the driver itself runs the unit.
        leaving: says why this machine is about to go, None if it is not.
    """
    try:
        if others := differing(task.versions, versions()):
            there = f"{socket.gethostname()} has other versions than the driver ({others})"
            return _failed(task, f"{there}; install the driver's there, or go on with {OPTION}")
        storage = open_storage(task.root)
        stop = UnitStop(StopRequests(storage, task.stop_request), leaving)
        with stop.heeding(), _unit_log(storage, task):
            return _execute(task, RunningUnit(task, storage, stop, meanwhile))
    except StoreAwayError as error:
        return _cut_off(task, error)
    except StorageError as error:
        return _failed(task, str(error))


def _execute(task: UnitTask, context: RunningUnit) -> UnitOutcome:
    started = time.monotonic()
    try:
        payload = load_work(task.stage).run(context)
        completion = context.complete(payload, time.monotonic() - started)
        return UnitOutcome(task, completion, round(time.monotonic() - started, 3), socket.gethostname())
    except PreemptedError as error:
        logger.info("%s", error)
        context.say_preempted(str(error))
        return UnitOutcome(task, infrastructure=str(error), host=socket.gethostname(), preempted=True)
    except StoreAwayError as error:
        logger.error("%s", error)
        return _cut_off(task, error)
    except WorkerLostError as error:
        logger.error("%s", error)
        return UnitOutcome(task, infrastructure=str(error), host=socket.gethostname())
    except HardmoeError as error:
        logger.error("%s", error)
        return _failed(task, str(error))
    except Exception as error:  # noqa: BLE001 - whatever the code of a stage raises must fail this unit and no other
        logger.error("%s", traceback.format_exc())
        return _failed(task, describe_bug(error, task.label))


def describe_bug(error: Exception, label: str) -> str:
    """One sentence about an exception that nobody foresaw, however odd it is, and where its traceback lies."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # noqa: BLE001 - an exception whose own text cannot be had must not hide behind another one
        lines = []
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'} (traceback: hardmoe logs {label})"


def _cut_off(task: UnitTask, error: StoreAwayError) -> UnitOutcome:
    """The network of this machine, or the store, was away: no fault of the unit's, which another machine may well do."""
    return UnitOutcome(task, infrastructure=str(error), host=socket.gethostname(), store_away=True)


def _failed(task: UnitTask, sentence: str) -> UnitOutcome:
    return UnitOutcome(task, error=sentence, host=socket.gethostname())


class _LogLines(logging.Handler):
    """Collects a unit's log lines and keeps its file in the root up to date, at most every few seconds."""

    def __init__(self, storage: Storage, path: str) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._storage = storage
        self._path = path
        self._lines = self._earlier()
        self._written = 0.0

    def _earlier(self) -> list[str]:
        """Lines of earlier attempts, so that a resumed unit's log tells the whole story."""
        if not self._storage.exists(self._path):
            return []
        return self._storage.read_bytes(self._path).decode(errors="replace").splitlines()[-2000:]

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))
        if time.monotonic() - self._written > 5.0:
            self.save()

    def save(self) -> None:
        self._written = time.monotonic()
        if self._lines:
            try:
                self._storage.write_bytes(self._path, ("\n".join(self._lines) + "\n").encode())
            except StorageError:
                # A full disk must fail the unit's outputs, with their own clear error, and not its log.
                return


@contextmanager
def _unit_log(storage: Storage, task: UnitTask) -> Iterator[None]:
    handler = _LogLines(storage, task.paths.log(task.phase, task.unit.name))
    previous = logger.level
    logger.setLevel(min(previous or logging.INFO, logging.INFO))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(previous)
        handler.save()
