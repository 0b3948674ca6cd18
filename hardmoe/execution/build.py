"""One artifact being built, on the driver: its phases by replay, its pending units, its commit."""

import hashlib
import time
from collections.abc import Mapping

from hardmoe.artifacts.fingerprint import digest
from hardmoe.artifacts.lease import Lease
from hardmoe.artifacts.pinned_versions import decisive
from hardmoe.artifacts.provenance import describe, now, versions
from hardmoe.artifacts.record import PROVENANCE_NAME, RECORD_NAME, Record
from hardmoe.artifacts.store import Artifact, ArtifactStore
from hardmoe.errors import CorruptFileError
from hardmoe.execution.task import BuildPaths, StoredCompletion, UnitTask, load_completion
from hardmoe.execution.worker import StageContext
from hardmoe.stage import Completion, FileEntry, Finished, Phase, Stage, load_work
from hardmoe.storage import Storage, check_entry, join

_PROVENANCE_UNITS = 2000
_PROGRESS = "_progress"
_KEPT_DIRECTORIES = (f"{_PROGRESS}/", "checkpoints/")
_KEPT = ("logs", "tensorboard")
"""Below `_progress`, what a finished artifact keeps for people."""


class _Driver(StageContext):
    """The run as the driver's part of a stage sees it."""

    def __init__(self, stage: Stage, storage: Storage, paths: BuildPaths) -> None:
        super().__init__(stage, storage)
        self._paths = paths

    def share(self, name: str, data: bytes) -> str:
        """Write something for the units to read. Replay writes the same bytes again, so only the first time counts."""
        path = join(self._paths.top, "shared", name)
        self.storage.create(path, data)
        return path


class Build:
    """Drives one stage's generator. Needs the artifact's lease for as long as it lives."""

    def __init__(
        self, store: ArtifactStore, stage: Stage, fingerprint: str, inputs: Mapping[str, Artifact], lease: Lease
    ) -> None:
        self.stage = stage
        self.lease = lease
        self._store = store
        self._storage = store.storage
        self._fingerprint = fingerprint
        self._references = {role: artifact.reference() for role, artifact in inputs.items()}
        records = {role: reference.record for role, reference in self._references.items()}
        self.paths = BuildPaths(stage.name, digest({"fingerprint": fingerprint, "inputs": records})[:16])
        self._generator = load_work(stage).phases(_Driver(stage, self._storage, self.paths))
        self._started = (now(), time.monotonic())
        self.phase: Phase | None = None
        self.finished: Finished | None = None
        self._completions: dict[str, Completion] = {}
        self._replayed: dict[str, list[str]] = {}

    def start(self) -> list[UnitTask]:
        """Run the stage's code up to the first phase with something left to do; returns its tasks."""
        return self._advance()

    def complete(self, completion: Completion) -> list[UnitTask]:
        """Take one completion in; returns the next phase's tasks when it was the last of this one."""
        self._completions[completion.unit] = completion
        assert self.phase is not None
        return self._advance() if len(self._completions) == len(self.phase.units) else []

    @property
    def units_done(self) -> int:
        """Units of the present phase that are complete."""
        return len(self._completions)

    def commit(self) -> Artifact:
        """Move every file to its final name, write provenance and record, and sweep what is left of this build and others."""
        assert self.finished is not None
        self.lease.check()
        # The units of this very replay: a completion that the stage's code asks for no more vouches for nothing.
        stored = [
            load_completion(self._storage, self.paths.done(phase, unit))
            for phase, units in sorted(self._replayed.items())
            for unit in sorted(units)
        ]
        files = self._files(stored)
        for item in stored:
            self._publish(item)
        for path, data in self.finished.files.items():
            self._storage.write_bytes(join(self.stage.name, path), data)
        self._sweep_unvouched({entry.path for entry in files})
        record = Record(
            kind=self.stage.kind,
            version=self.stage.version,
            fingerprint=self._fingerprint,
            config=self.stage.config,
            inputs=self._references,
            files=files,
            payload=self.finished.payload,
        )
        artifact = self._store.commit(self.stage.name, record, self._provenance(stored))
        sweep_builds(self._storage, self.stage.name)
        return artifact

    def _files(self, stored: list[StoredCompletion]) -> list[FileEntry]:
        """All files of the artifact; refuses, before anything is moved, that two units wrote the same one."""
        assert self.finished is not None
        own = [FileEntry(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in self.finished.files.items()]
        writer: dict[str, str] = {}
        for unit, entries in [*((item.completion.unit, item.completion.files) for item in stored), ("the finish", own)]:
            for entry in entries:
                if entry.path in writer:
                    raise ValueError(f"{self.stage.name}: '{entry.path}' was written by {writer[entry.path]} and by {unit}")
                writer[entry.path] = unit
        return [entry for item in stored for entry in item.completion.files] + own

    def _advance(self) -> list[UnitTask]:
        """Send completions into the generator until a phase has units left, or it returns."""
        try:
            while True:
                if self.phase is None:
                    phase = next(self._generator)
                else:
                    phase = self._generator.send([self._completions[unit.name] for unit in self.phase.units])
                if phase.name in self._replayed:
                    raise ValueError(f"{self.stage.name}: two phases are called '{phase.name}'")
                self.phase = phase
                self._replayed[phase.name] = [unit.name for unit in phase.units]
                self._completions = self._known(phase)
                missing = [unit for unit in phase.units if unit.name not in self._completions]
                if missing:
                    return [UnitTask(self._storage.uri, self.stage, self.paths.build, phase.name, unit) for unit in missing]
        except StopIteration as stop:
            assert isinstance(stop.value, Finished), f"{self.stage.work} must return Finished"
            self.finished = stop.value
            return []

    def _known(self, phase: Phase) -> dict[str, Completion]:
        """Completions of the phase that lie in the root already."""
        wanted = {unit.name for unit in phase.units}
        if len(wanted) != len(phase.units):
            raise ValueError(f"{self.stage.name}: phase {phase.name} has two units of the same name")
        names = {name.removesuffix(".json") for name in self._storage.list(self.paths.done(phase.name))} & wanted
        return {name: load_completion(self._storage, self.paths.done(phase.name, name)).completion for name in names}

    def _publish(self, stored: StoredCompletion) -> None:
        for entry in stored.completion.files:
            staged, final = stored.staged[entry.path], join(self.stage.name, entry.path)
            if self._storage.exists(staged):
                self._storage.move(staged, final)
                continue
            # A commit that was cut off moved it already; but since then a build of another recipe may have replaced it.
            try:
                check_entry(self._storage, final, entry.size, entry.sha256)
            except CorruptFileError as error:
                raise CorruptFileError(f"{error}; delete {self._storage.where(self.paths.top)} and run again") from error

    def _sweep_unvouched(self, vouched: set[str]) -> None:
        """Delete what an abandoned build of another recipe left in the artifact's directory, so that globs find only ours."""
        for path in self._storage.list(self.stage.name):
            kept = path in vouched or path in (RECORD_NAME, PROVENANCE_NAME) or path.startswith(_KEPT_DIRECTORIES)
            if not kept:
                self._storage.delete_tree(join(self.stage.name, path))

    def _provenance(self, stored: list[StoredCompletion]) -> bytes:
        here = decisive(versions())
        units = [
            {"unit": item.completion.unit, "seconds": item.seconds, "host": item.host}
            | ({} if item.versions == here else {"versions": dict(item.versions)})
            | ({"said": dict(item.said)} if item.said else {})
            for item in stored[:_PROVENANCE_UNITS]
        ]
        machines = {item.host: item.machine for item in stored if item.machine}
        started, clock = self._started
        return describe(started, time.monotonic() - clock, units, num_units=len(stored), machines=machines)


def sweep_builds(storage: Storage, artifact: str) -> None:
    """Delete what builds left of a finished artifact: completions, staged and scratch files; its logs and curves stay.

    Builds have a directory each. Plain files (the lease, the status, the dataset's cache of digests) are not theirs.
    """
    progress = join(artifact, _PROGRESS)
    for name in {path.partition("/")[0] for path in storage.list(progress) if "/" in path} - {*_KEPT}:
        storage.delete_tree(join(progress, name))
    storage.sweep(artifact)
