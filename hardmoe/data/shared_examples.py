"""Decoded images that several processes of a machine read at once: a file without a name, which the system pages.

An open descriptor is what travels to another process, so nothing is left to clean up, however a process ends. Rejected: shared
memory, of which containers allow 64 MB by default, and an array in each process's own pickled arguments.

Shape letters: M stored images, S side in pixels.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from multiprocessing.reduction import DupFd
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, Any, cast

import numpy as np

from hardmoe.data.loader import ExampleSet
from hardmoe.errors import StorageError


class SharedPixels(AbstractContextManager["SharedPixels"]):
    """The images of an `ExampleSet`; as a context, it closes this process's descriptor at its end."""

    def __init__(self, file: IO[bytes], shape: tuple[int, ...]) -> None:
        self._file = file
        self._shape = shape

    @classmethod
    def of(cls, examples: ExampleSet, scratch_path: Path) -> "SharedPixels":
        """Write a set's images into a file of no name in an existing folder.

        Raises:
            StorageError: the folder is full or not writable.
        """
        try:
            file = cast(IO[bytes], TemporaryFile(dir=scratch_path))  # noqa: SIM115
            examples.storage_M3SS.tofile(file)
            file.flush()
        except OSError as error:
            reason = error.strerror or error
            raise StorageError(f"cannot write decoded images to the scratch folder {scratch_path}: {reason}") from error
        return cls(file, examples.storage_M3SS.shape)

    def put_into(self, examples: ExampleSet) -> ExampleSet:
        """A set that came without its images, with them."""
        if 0 in self._shape:
            return replace(examples, storage_M3SS=np.zeros(self._shape, np.uint8))
        return replace(examples, storage_M3SS=np.memmap(self._file, np.uint8, mode="r", shape=self._shape))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def __reduce__(self) -> tuple[Callable[..., "SharedPixels"], tuple[Any, ...]]:
        return _received, (DupFd(self._file.fileno()), self._shape)


def without_pixels(examples: ExampleSet) -> ExampleSet:
    """A set to be sent to another process, whose images go another way."""
    return replace(examples, storage_M3SS=examples.storage_M3SS[:0])


def _received(descriptor: Any, shape: tuple[int, ...]) -> SharedPixels:
    return SharedPixels(os.fdopen(descriptor.detach(), "rb"), shape)
