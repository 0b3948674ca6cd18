"""`metrics.jsonl`: one JSON object a line, each a function of the step alone.

No times and no rates, so the file of a resumed training is byte for byte that of an uninterrupted one; those live in
progress files. Rows wait in memory and the whole file is written atomically at every checkpoint and at the end. Rejected:
appending to the file, which object stores cannot do and which leaves half a row behind a kill.
"""

import json

from hardmoe.config import Json
from hardmoe.errors import CorruptFileError
from hardmoe.storage import Storage


class MetricsLog:
    """The rows of one training at a path of a storage."""

    def __init__(self, storage: Storage, path: str) -> None:
        self.storage = storage
        self.path = path
        self.rows: list[dict[str, Json]] = []

    def append(self, row: dict[str, Json]) -> None:
        """Add a row; it has a `step`, which never falls."""
        if self.rows and row["step"] < self.rows[-1]["step"]:
            raise ValueError(f"row of step {row['step']} after step {self.rows[-1]['step']}")
        self.rows.append(row)

    def cut_back(self, step: int) -> None:
        """Start from the stored rows up to a checkpoint's step; later ones were written by an attempt that was lost.

        Raises:
            CorruptFileError: the stored file is not JSON lines.
        """
        lines = self.storage.read_bytes(self.path).decode().splitlines() if self.storage.exists(self.path) else []
        try:
            rows = [json.loads(line) for line in lines]
        except ValueError as error:
            raise CorruptFileError(f"{self.path} has a line that is not JSON ({error}); delete it to train again") from error
        self.rows = [row for row in rows if row["step"] <= step]

    def flush(self) -> None:
        """Write all rows, replacing the file."""
        lines = [json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n" for row in self.rows]
        self.storage.write_bytes(self.path, "".join(lines).encode())
