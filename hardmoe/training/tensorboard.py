"""A training's curves for TensorBoard, below `_progress/tensorboard/` of its artifact: loss, rates and what validation says.

A storage cannot append, so what was noted goes to a new file every now and then, ever more rarely: TensorBoard reads the files
of a directory in the order of their names, and takes back what a resumed attempt does again. They are for people, stay when the
artifact is finished, and no record vouches for them. Rejected: torch's `SummaryWriter`, which wants a local path and the
`tensorboard` package, and one file rewritten in place, which a reader that has it open never sees.
"""

import logging
import os
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from hardmoe.config import Json
from hardmoe.errors import StorageError
from hardmoe.storage import Storage, join

logger = logging.getLogger(__name__)

_FIRST_SECONDS = 15.0
_SHARE_OF_THE_TIME = 0.02
"""A file no more often than every fiftieth of the time so far: a day of training leaves some four hundred."""
_NOT_CURVES = ("step", "epoch")


class EventFiles:
    """What one attempt at a training notes."""

    def __init__(self, storage: Storage, prefix: str) -> None:
        self._storage = storage
        self._prefix = prefix
        self._began = self._written = time.monotonic()
        self._name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._count = 0
        self._waiting: list[bytes] = []

    def note(self, row: Mapping[str, Json]) -> None:
        """Take in a row of the metrics log, or other numbers with their `step`; writes a file if it is time."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=float(value))
            for name, value in row.items()
            if name not in _NOT_CURVES and isinstance(value, int | float)
        ]
        event = Event(wall_time=time.time(), step=int(row["step"]), summary=Summary(value=values))
        self._waiting.append(event.SerializeToString())
        now = time.monotonic()
        if now - self._written >= max(_FIRST_SECONDS, _SHARE_OF_THE_TIME * (now - self._began)):
            self.write()

    def write(self) -> None:
        """Write what is waiting; curves that cannot be written are no reason to end a training, whose own files will tell."""
        if not self._waiting:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import RecordWriter

        try:
            with tempfile.TemporaryDirectory(prefix="hardmoe-events-") as directory:
                path = Path(directory) / "events"
                writer = RecordWriter(str(path))
                for data in (Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString(), *self._waiting):
                    writer.write(data)
                writer.close()
                data = path.read_bytes()
            self._storage.write_bytes(join(self._prefix, f"{self._name}.{self._count:05d}"), data)
        except (OSError, StorageError) as error:
            # OSError: the machine's own temporary folder may be full, too.
            logger.warning("the curves for TensorBoard are not written: %s", error)
        self._count += 1
        self._waiting.clear()
        self._written = time.monotonic()
