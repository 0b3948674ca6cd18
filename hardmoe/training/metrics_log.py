"""`metrics.jsonl`: one JSON object a line, each a function of the step alone.

No times and no rates, so the file of a resumed training is byte for byte that of an uninterrupted one; those live in
progress files. Rows wait in memory, travel inside every checkpoint, and become a file with the unit's other outputs.
Rejected: a file at its final name that is appended to or rewritten while training, which a worker cut off from its driver
could still replace after another attempt's file was vouched for, or before it was read back.
"""

import json
from collections.abc import Callable, Mapping, Sequence

from hardmoe.config import Json


class MetricsLog:
    """The rows of one attempt at a training."""

    def __init__(self, listener: Callable[[Mapping[str, Json]], None] = lambda row: None) -> None:
        """Begin without rows; the listener hears of each that is added."""
        self._listener = listener
        self.rows: list[dict[str, Json]] = []

    def append(self, row: dict[str, Json]) -> None:
        """Add a row; it has a `step`, which never falls."""
        if self.rows and row["step"] < self.rows[-1]["step"]:
            raise ValueError(f"row of step {row['step']} after step {self.rows[-1]['step']}")
        self.rows.append(row)
        self._listener(row)

    def restore(self, rows: Sequence[dict[str, Json]]) -> None:
        """Go on from the rows of a checkpoint, or from none."""
        self.rows = list(rows)

    def to_bytes(self) -> bytes:
        """The content of `metrics.jsonl`."""
        return "".join(json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n" for row in self.rows).encode()
