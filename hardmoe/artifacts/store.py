"""The artifacts of one root: find, read, check, commit, reuse."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from hardmoe.artifacts.record import PROVENANCE_NAME, RECORD_NAME, InputReference, Record, parse_record
from hardmoe.config import Json
from hardmoe.errors import CorruptFileError, MissingRecordError, StorageError
from hardmoe.storage import Storage, check_content, check_size, join, open_storage, read_checked, read_if_there


@dataclass(frozen=True)
class Artifact:
    """A finished artifact, wherever its files lie; what stages read their inputs through."""

    name: str
    record: Record
    home: Storage
    """The root in which the record was found."""

    @cached_property
    def storage(self) -> Storage:
        """Where the files lie: the root itself, or another root's artifact that is reused."""
        return open_storage(self.record.reused_from) if self.record.reused_from else self.home

    @cached_property
    def record_digest(self) -> str:
        """Digest of the record; computed once, since a record may name thousands of files."""
        return self.record.digest()

    @property
    def payload(self) -> Json:
        """What the record says of the result."""
        return self.record.payload

    def path(self, relative: str) -> str:
        """A file's path in `storage`."""
        return relative if self.record.reused_from else join(self.name, relative)

    def files(self, prefix: str = "", suffix: str = "") -> list[str]:
        """Sorted storage paths of the files vouched for whose names begin and end so."""
        names = sorted(entry.path for entry in self.record.files)
        return [self.path(name) for name in names if name.startswith(prefix) and name.endswith(suffix)]

    def read(self, relative: str) -> bytes:
        """A whole file, held against its digest: weights with a bit turned would answer like any others.

        Raises:
            CorruptFileError: it is missing, or not what the record says; or the record does not name it.
        """
        entry = next((entry for entry in self.record.files if entry.path == relative), None)
        if entry is None:
            raise CorruptFileError(f"{self.home.where(join(self.name, RECORD_NAME))} names no file '{relative}'")
        try:
            return read_checked(self.storage, self.path(relative), entry.size, entry.sha256)
        except CorruptFileError as error:
            where = self.storage.where(self.path(""))
            raise CorruptFileError(f"{error}; delete {where.rstrip('/')} and what stands on it, and run again") from error

    def reference(self) -> InputReference:
        """How a record that stands on this artifact refers to it."""
        return InputReference(artifact=self.name, fingerprint=self.record.fingerprint, record=self.record_digest)

    def verify(self) -> int:
        """Hash every file again; returns their number. One listing tells their sizes, so a store is asked once for each.

        Raises:
            CorruptFileError: the first file that is missing or altered.
        """
        sizes = {entry.path: entry.size for entry in self.storage.entries(self.path(""))}
        for entry in self.record.files:
            check_size(self.storage, self.path(entry.path), entry.size, sizes.get(entry.path))
            check_content(self.storage, self.path(entry.path), entry.sha256)
        return len(self.record.files)


class ArtifactStore:
    """All artifacts below one root."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def find(self, name: str) -> Artifact | None:
        """The artifact, or None if it has no record.

        Raises:
            CorruptFileError: its record cannot be read.
        """
        path = join(name, RECORD_NAME)
        data = read_if_there(self.storage, path)
        return None if data is None else Artifact(name, parse_record(data, self.storage.where(path)), self.storage)

    def get(self, name: str) -> Artifact:
        """The artifact.

        Raises:
            MissingRecordError: it has no record.
        """
        if (artifact := self.find(name)) is None:
            raise MissingRecordError(f"{self.storage.where(join(name, RECORD_NAME))} does not exist: '{name}' was never finished")
        return artifact

    def commit(self, name: str, record: Record, provenance: bytes) -> Artifact:
        """Write the provenance and then, last, the record. If another builder was first, its record stands."""
        self.storage.write_bytes(join(name, PROVENANCE_NAME), provenance)
        self.storage.create(join(name, RECORD_NAME), record.to_bytes())
        return self.get(name)

    def reuse(
        self, name: str, fingerprint: str, inputs: Mapping[str, Artifact], roots: Sequence[str], provenance: bytes
    ) -> Artifact | None:
        """Take the artifact over from the first of other roots that has one of the same fingerprint and inputs."""
        found = find_reusable(name, fingerprint, inputs, roots)
        return None if found is None else self.refer(name, found, provenance)

    def refer(self, name: str, found: Artifact, provenance: bytes) -> Artifact:
        """Have another root's artifact here under a name of ours, by reference; nothing is copied."""
        origin = found.record.reused_from or found.home.child_uri(found.name)
        return self.commit(name, replace(found.record, reused_from=origin), provenance)


def find_reusable(name: str, fingerprint: str, inputs: Mapping[str, Artifact], roots: Sequence[str]) -> Artifact | None:
    """The artifact as the first of some roots has it, with the same fingerprint and the same inputs."""
    for root in roots:
        found = _find_elsewhere(root, name)
        if found is not None and found.record.fingerprint == fingerprint and _same_inputs(found.record, inputs):
            return found
    return None


def _find_elsewhere(root: str, name: str) -> Artifact | None:
    storage = open_storage(root)
    try:
        return ArtifactStore(storage).find(name)
    except StorageError as error:
        raise StorageError(f"cannot look into the root '{root}' of 'reuse': {error}") from error


def _same_inputs(record: Record, inputs: Mapping[str, Artifact]) -> bool:
    return {role: reference.record for role, reference in record.inputs.items()} == {
        role: artifact.record_digest for role, artifact in inputs.items()
    }
