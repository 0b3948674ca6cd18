"""Checkpoints written beside the training: it copies its tensors to host memory and goes on, a thread does the rest.

Serialising, hashing and writing (and S3) take longer than many a step, and none of it needs the device. One write is in
flight at a time. A newer checkpoint takes the place of one that still waits, unless that one is to be kept, so a slow store
costs checkpoints and neither steps nor memory. An error of a write is raised in the training, at its next look. Rejected: a
process for each write, which would copy the tensors once more, and a queue, which grows on a store slower than the training.
"""

import logging
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor

from hardmoe.config import Json
from hardmoe.training.checkpoint import Checkpoints

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Write:
    step: int
    tensors: Mapping[str, Tensor]
    state: Json
    keep: Collection[int]


class BackgroundWriter:
    """Writes one training's checkpoints in order; as a context, it ends when all that was handed over is written."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._changed = threading.Condition()
        self._waiting: list[_Write] = []
        self._in_flight = False
        self._closed = False
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self.submitted: int | None = None
        """Step of the newest checkpoint that was handed over."""
        self.written: int | None = None
        """Step of the newest checkpoint that is in the storage."""

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        if kind is None:
            self.raise_error()
        elif self._error is not None:
            # What ends the training is already being told.
            logger.warning("a checkpoint could not be written either: %s", self._error)

    def submit(self, step: int, tensors: Mapping[str, Tensor], state: Json, keep: Collection[int] = ()) -> None:
        """Hand a checkpoint over; returns at once.

        Args:
            step: of the checkpoint.
            tensors: copies that nobody changes any more.
            state: whatever JSON holds; likewise.
            keep: steps whose checkpoints stay beside the newest two, and are not passed over here.

        Raises:
            StorageError: an earlier one could not be written.
        """
        self.raise_error()
        with self._changed:
            self._waiting = [write for write in self._waiting if write.step in keep]
            self._waiting.append(_Write(step, tensors, state, keep))
            self.submitted = step
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self) -> None:
        """Until all that was handed over is written.

        Raises:
            StorageError: something could not be.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._in_flight)
        self.raise_error()

    def raise_error(self) -> None:
        """Raise what a write failed with, if one did."""
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (write := self._next()) is not None:
            try:
                self._checkpoints.save(write.step, write.tensors, write.state, write.keep)
            except Exception as error:  # noqa: BLE001 - raised again in the training's own thread
                self._error = error
            with self._changed:
                self._in_flight = False
                if self._error is None:
                    self.written = write.step
                else:
                    self._waiting.clear()
                self._changed.notify_all()

    def _next(self) -> _Write | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            self._in_flight = True
            return self._waiting.pop(0)
