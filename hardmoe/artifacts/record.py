"""The record of an artifact: `artifact.json`, written last, deterministic, naming every file it vouches for.

An artifact exists exactly when its record does. The record holds what was asked for (kind, version, config, fingerprints of
the inputs) and what came of it (files with size and SHA-256, payload, digests of the inputs' records), and nothing of when,
where or by whom: that is in `provenance.json`. So two runs are equal exactly when their records are. `reused_from` alone,
which says in which root the files lie, is no part of the digest.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from hardmoe.artifacts.fingerprint import digest
from hardmoe.config import Json
from hardmoe.errors import CorruptFileError
from hardmoe.stage import FileEntry

RECORD_NAME = "artifact.json"
PROVENANCE_NAME = "provenance.json"
_FORMAT = 1


@dataclass(frozen=True)
class InputReference:
    """An input as it was when the artifact was built."""

    artifact: str
    fingerprint: str
    record: str
    """Digest of the input's record: an input rebuilt with the same recipe but other bytes differs here alone."""


@dataclass(frozen=True)
class Record:
    """See the module."""

    kind: str
    version: int
    fingerprint: str
    config: Mapping[str, Json]
    inputs: Mapping[str, InputReference]
    files: Sequence[FileEntry]
    payload: Json = field(default_factory=dict)
    reused_from: str | None = None
    """URI of the artifact's directory in another root, where the files lie."""

    def body(self) -> dict[str, Json]:
        """Everything that the digest covers, as plain JSON values."""
        body = {**asdict(self), "format": _FORMAT}
        del body["reused_from"]
        body["files"] = [asdict(entry) for entry in sorted(self.files, key=lambda entry: entry.path)]
        return body

    def digest(self) -> str:
        """Hexadecimal SHA-256 of the body."""
        return digest(self.body())

    def to_bytes(self) -> bytes:
        """The content of `artifact.json`: equal records give equal bytes."""
        body = self.body() | ({"reused_from": self.reused_from} if self.reused_from else {})
        return (json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def parse_record(data: bytes, where: str) -> Record:
    """Read `artifact.json`.

    Raises:
        CorruptFileError: it is not a record of this format; `where` is named.
    """
    try:
        body = json.loads(data)
        if body["format"] != _FORMAT:
            raise CorruptFileError(
                f"{where} has format {body['format']}, this hardmoe reads {_FORMAT}; use the version that wrote it"
            )
        return Record(
            kind=body["kind"],
            version=body["version"],
            fingerprint=body["fingerprint"],
            config=body["config"],
            inputs={role: InputReference(**reference) for role, reference in body["inputs"].items()},
            files=[FileEntry(**entry) for entry in body["files"]],
            payload=body["payload"],
            reused_from=body.get("reused_from"),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{where} is not a record: {error}; delete the artifact's directory and run again") from error
