"""A stage: what to build, as pure data; and the protocol of the code that builds it.

A stage is a set of independent, idempotent, named units plus a finish. Most need that once; a k-means fit needs it once per
pass. So the code of a stage is a generator on the driver that yields `Phase`s (a name and the units to run) and is sent back
their completions: written down as it would be thought, and durable by replay. After a kill the generator runs again from
its first line, every unit that has a completion is answered from it, and the work goes on at the first one that has not.
Rejected: a fixed list of tasks per stage (cannot express "until converged") and pickled generator state (dies with a change
of the code).

Everything here is importable without torch, ray or faiss; `Stage.work` names the code by an import path that is resolved
only where a unit or a finish really runs.
"""

import importlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from hardmoe.config import Config, Json
from hardmoe.storage import OutputFile, Storage

ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True)
class Resources:
    """What one unit of a stage occupies while it runs."""

    num_cpus: int = 1
    """CPU slots, which is also the number of threads that the unit uses."""
    num_gpus: float | None = 0.0
    """GPUs; None means one where the backend has any, else none."""


@dataclass(frozen=True)
class Stage:
    """What to build. Two stages with the same `kind`, `version`, `config` and inputs build the same thing."""

    name: str
    """The artifact's directory in the root, such as `features` or `experts/expert-0007`."""
    kind: str
    """Which code builds it, such as `expert`; part of the identity, where the name is not."""
    version: int
    """Raised by hand whenever the same config would give another output."""
    config: Mapping[str, Json]
    """The fields that decide what is computed; part of the identity."""
    work: str
    """Import path `package.module:Class` of the `Work`."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Role of each input, such as `dataset`, and the name of the artifact that plays it."""
    operational: Mapping[str, Json] = field(default_factory=dict)
    """Fields that say where and how: paths, threads, intervals. Never part of the identity."""
    resources: Resources = Resources()

    def section(self, kind: type[ConfigT], name: str) -> ConfigT:
        """A section of the recipe as it was given, from its identity and its operational fields."""
        return kind.model_validate({**self.config[name], **self.operational.get(name, {})})


@dataclass(frozen=True)
class Unit:
    """One independent, idempotent piece of a phase."""

    name: str
    arguments: Mapping[str, Json] = field(default_factory=dict)
    cost: float = 1.0
    """Expected work, in any unit; the longest is started first."""
    can_isolate: bool = False
    """Whether its code heeds `UnitContext.is_isolated`."""


@dataclass(frozen=True)
class Phase:
    """A named set of units that do not depend on each other."""

    name: str
    units: Sequence[Unit]


@dataclass(frozen=True)
class FileEntry:
    """A file that is vouched for: its path, size in bytes and SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Completion:
    """What a finished unit left: a payload of plain JSON, files for the artifact, and scratch files for later phases."""

    unit: str
    payload: Json
    files: Sequence[FileEntry]
    scratch: Mapping[str, str]
    """Name given by the unit -> storage path of the file, readable until the artifact is finished."""


@dataclass(frozen=True)
class Finished:
    """The end of a stage: what its record says, and small files written by the finish itself."""

    payload: Json
    files: Mapping[str, bytes] = field(default_factory=dict)


class InputArtifact(Protocol):
    """A finished artifact that a stage reads."""

    @property
    def storage(self) -> Storage:
        """Where it lies (another root, if it is reused)."""
        ...

    @property
    def payload(self) -> Json:
        """What its record says."""
        ...

    def path(self, relative: str) -> str:
        """A file's path in `storage`."""
        ...

    def files(self, prefix: str = "", suffix: str = "") -> list[str]:
        """Sorted storage paths of the files that the record vouches for, by prefix and suffix of their names within it."""
        ...

    def read(self, relative: str) -> bytes:
        """A whole file, by its name within the artifact.

        Raises:
            CorruptFileError: it is not what the record says.
        """
        ...


def name_within(artifact: InputArtifact, path: str) -> str:
    """A file's name within an artifact, of its path in `storage`: the inverse of `InputArtifact.path`."""
    return path.removeprefix(artifact.path("")).lstrip("/")


class Context(Protocol):
    """What a stage's code sees of the run, on the driver and in a unit alike."""

    @property
    def stage(self) -> Stage:
        """The stage being built."""
        ...

    @property
    def storage(self) -> Storage:
        """The run's root."""
        ...

    def input(self, role: str) -> InputArtifact:
        """A finished input by its role."""
        ...


class DriverContext(Context, Protocol):
    """What the driver's part of a stage sees besides."""

    def share(self, name: str, data: bytes) -> str:
        """Write something for the units to read (centroids, aliases); returns its storage path. Gone after the commit."""
        ...


class UnitContext(Context, Protocol):
    """What a unit sees: its arguments, its outputs, its progress."""

    @property
    def unit(self) -> Unit:
        """The unit being run."""
        ...

    @property
    def phase(self) -> str:
        """Name of its phase."""
        ...

    @property
    def is_isolated(self) -> bool:
        """Whether workers died of this unit: what may kill a process is to be done in one of its own, if the unit can."""
        ...

    @property
    def checkpoint_prefix(self) -> str:
        """Storage path below which the unit may keep checkpoints; they survive a kill and are never vouched for."""
        ...

    @property
    def use_gpu(self) -> bool:
        """Whether a GPU was given to this unit."""
        ...

    def output(self, path: str) -> AbstractContextManager[OutputFile]:
        """Open a file of the artifact for writing, by its path within it."""
        ...

    def scratch(self, name: str) -> AbstractContextManager[OutputFile]:
        """Open a file for a later phase of the same stage, by a name unique in this unit."""
        ...

    def progress(self, done: float, total: float, **values: float | int | str) -> None:
        """Say how far the unit is; cheap, to be called often."""
        ...

    def asked_to_stop(self) -> str | None:
        """Why the unit is to make a checkpoint now and raise `PreemptedError`; None to go on. Cheap, to be asked at every step.

        A unit that never asks is left to its end, or dies of a signal.
        """
        ...


class Work(Protocol):
    """The code of a stage. Built without arguments wherever it is needed; keeps no state between calls."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """On the driver: yield phases, receive the completions of each in the order of its units, return the finish."""
        ...

    def run(self, context: UnitContext) -> Json:
        """On a worker: do one unit; returns its payload."""
        ...


def load_work(stage: Stage) -> Work:
    """Import the code that builds a stage."""
    module, _, name = stage.work.partition(":")
    work: Any = getattr(importlib.import_module(module), name)
    return work()  # type: ignore[no-any-return]
