"""A unit on its way to a worker and back, and where its traces lie in the root.

Layout below an artifact's directory, all of it gone or irrelevant once the record exists:

    _progress/<build>/done/<phase>/<unit>.json      completion: created, never replaced; the first attempt wins
    _progress/<build>/staged/<phase>/<unit>/<attempt>/…   files of the artifact until the commit moves them in place
    _progress/<build>/scratch/<phase>/<unit>/<attempt>/…  files for later phases
    _progress/<build>/live/<phase>/<unit>.json      how far a running unit is
    _progress/logs/<phase>.<unit>.log               what the unit said
    _progress/logs/driver.log                       what went wrong in the driver's part, where that was an error of the code
    _progress/status.json                           the driver's summary, for `hardmoe status`

`<build>` is a digest of the fingerprint *and* of the inputs' records, so leftovers of a build over other inputs are never
taken for this one's. Rejected: outputs written straight to their final names, where a worker cut off from its driver could
still replace a file after another attempt's file was vouched for.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from hardmoe.artifacts.lease import LEASE_NAME
from hardmoe.config import Json
from hardmoe.errors import CorruptFileError
from hardmoe.stage import Completion, FileEntry, Stage, Unit
from hardmoe.storage import Storage, join


@dataclass(frozen=True)
class BuildPaths:
    """Storage paths of one build of one artifact."""

    artifact: str
    build: str

    @property
    def top(self) -> str:
        """All that belongs to this build alone."""
        return join(self.artifact, "_progress", self.build)

    def done(self, phase: str, unit: str = "") -> str:
        """The completion of a unit, or the directory of a phase's completions."""
        return join(self.top, "done", phase, f"{unit}.json" if unit else "")

    def live(self, phase: str, unit: str) -> str:
        """How far a running unit is."""
        return join(self.top, "live", phase, f"{unit}.json")

    def attempt(self, kind: str, phase: str, unit: str, attempt: str) -> str:
        """The directory of one attempt's `staged` or `scratch` files."""
        return join(self.top, kind, phase, unit, attempt)

    def log(self, phase: str, unit: str) -> str:
        """What a unit said."""
        return join(self.artifact, "_progress", "logs", f"{phase}.{unit}.log")

    @property
    def driver_log(self) -> str:
        """What went wrong in the driver's part."""
        return join(self.artifact, "_progress", "logs", "driver.log")

    @property
    def lease(self) -> str:
        """Who builds the artifact."""
        return join(self.artifact, LEASE_NAME)

    @property
    def status(self) -> str:
        """The driver's summary."""
        return join(self.artifact, "_progress", "status.json")


@dataclass(frozen=True)
class UnitTask:
    """Everything a worker needs to run one unit; small, and picklable."""

    root: str
    stage: Stage
    build: str
    phase: str
    unit: Unit
    use_gpu: bool = False
    """Whether the backend sets a GPU aside for this unit; filled in by the backend."""
    is_isolated: bool = False
    """Whether the unit is to do in a process of its own what may have killed its workers."""
    stop_request: str = ""
    """The newest `hardmoe stop` that came before the unit's driver, which is none of this unit's; filled in by the runner."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """The driver's, which the worker must have; empty where others are accepted. Filled in by the runner."""

    @property
    def paths(self) -> BuildPaths:
        """Where the unit's traces lie."""
        return BuildPaths(self.stage.name, self.build)

    @property
    def label(self) -> str:
        """How people call the unit: `experts/expert-0007` for an artifact of one unit, else `features/00003`."""
        return self.stage.name if self.unit.name == self.stage.name.rpartition("/")[2] else f"{self.stage.name}/{self.unit.name}"


@dataclass(frozen=True)
class UnitOutcome:
    """What became of a task: exactly one of completion, error and infrastructure is set."""

    task: UnitTask
    completion: Completion | None = None
    seconds: float = 0.0
    host: str = ""
    error: str | None = None
    """One sentence: our code or the user's data failed. Never retried."""
    infrastructure: str | None = None
    """The worker or its machine died, or was cut off from the store. Retried elsewhere."""
    preempted: bool = False
    """With `infrastructure`: it went in good order, with a new checkpoint, so this try does not count."""
    store_away: bool = False
    """With `infrastructure`: the worker lives, but the store did not answer it."""


@dataclass(frozen=True)
class StoredCompletion:
    """A completion as it lies in the root, with what only the commit and the provenance need."""

    completion: Completion
    staged: Mapping[str, str]
    """Path within the artifact -> storage path of the attempt's file."""
    seconds: float
    host: str
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the packages on which the unit's bytes depend."""
    machine: str = ""
    said: Mapping[str, Json] = field(default_factory=dict)
    """What the unit last said of itself: a training its speed."""

    def to_bytes(self) -> bytes:
        """The content of the completion's file.

        Raises:
            TypeError, ValueError: the payload is not plain JSON (NaN and infinity are not).
        """
        return (json.dumps(asdict(self), sort_keys=True, allow_nan=False) + "\n").encode()


def parse_completion(data: bytes, where: str) -> StoredCompletion:
    """Read a completion.

    Raises:
        CorruptFileError: it is none; `where` is named.
    """
    try:
        body: dict[str, Json] = json.loads(data)
        inner = body["completion"]
        files = [FileEntry(**entry) for entry in inner["files"]]
        completion = Completion(unit=inner["unit"], payload=inner["payload"], files=files, scratch=inner["scratch"])
        facts = (body["seconds"], body["host"], body["versions"], body["machine"], body["said"])
        return StoredCompletion(completion, body["staged"], *facts)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{where} is not a unit's completion; delete it and run again, which redoes that unit") from error


def load_completion(storage: Storage, path: str) -> StoredCompletion:
    """Read a completion that a worker created.

    Raises:
        CorruptFileError: the file is damaged.
    """
    return parse_completion(storage.read_bytes(path), storage.where(path))
