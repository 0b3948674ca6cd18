"""Decoding in a child process: for the one image among a billion on which a decoder does not raise but dies.

A unit that lost its worker several times is run once more like this, so that its culprit becomes a row in quarantine and not
the end of the run. Images go to the child and pixels come back through pipes; the child is started again when it died. An
image is at fault when it killed two children: one may have been killed for the memory of others. Rejected: every image in a
child always, which costs a copy of all pixels; and `multiprocessing`, which imports the main module of a worker that is not ours.

Shape letters: H height, W width, 3 the channels red, green, blue.
"""

import os
import signal
import struct
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import IO, Self

import numpy as np
from numpy.typing import NDArray

from hardmoe.data.images import UndecodableImageError, decode

_LENGTH = struct.Struct("<q")
_ANSWER = struct.Struct("<qqq")
"""Height, width and 0, before the pixels; or 0, 0 and the length of the reason for which there are none."""
_DEATHS = 2
_MOST_TOLD = 2000


class IsolatedDecoder:
    """`decode`, in a child process.

    Args:
        max_pixels: larger images are refused.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._child: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the decoder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()
        self._errors.close()

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        """The pixels of an image, uint8 [H, W, 3].

        Raises:
            UndecodableImageError: `decode` raised it, or was killed by the image.
            RuntimeError: `decode` raised something else.
        """
        for _ in range(_DEATHS):
            try:
                return self._ask(data)
            except (EOFError, BrokenPipeError) as error:
                code = self._stop()
                if code >= 0:
                    raise RuntimeError(f"the process that decodes ended with {code}: {self._told()}") from error
        raise UndecodableImageError(f"decoding it kills the process ({signal.Signals(-code).name})")

    def _ask(self, data: bytes) -> NDArray[np.uint8]:
        child = self._child = self._child or self._start()
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(_LENGTH.pack(len(data)))
        child.stdin.write(data)
        child.stdin.flush()
        height, width, length = _ANSWER.unpack(_exactly(child.stdout, _ANSWER.size))
        if length:
            raise UndecodableImageError(_exactly(child.stdout, length).decode())
        return np.frombuffer(_exactly(child.stdout, height * width * 3), np.uint8).reshape(height, width, 3)

    def _start(self) -> "subprocess.Popen[bytes]":
        # Whatever made this code importable here does so there.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-c", f"from {__name__} import serve; serve({self._max_pixels})"]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, env=environment)

    def _stop(self) -> int:
        """Let the child end, if there is one; returns its exit code."""
        child, self._child = self._child, None
        if child is None:
            return 0
        assert child.stdin is not None and child.stdout is not None
        child.stdout.close()
        try:
            child.stdin.close()
        except BrokenPipeError:
            return child.wait()
        return child.wait()

    def _told(self) -> str:
        """The last line of what the child said."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:_MOST_TOLD] if lines else "nothing was said"


def serve(max_pixels: int) -> None:
    """Decode what comes by the standard input until it ends; the child's whole life."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # What a library prints must not be taken for pixels.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    while head := sys.stdin.buffer.read(_LENGTH.size):
        data = _exactly(sys.stdin.buffer, *_LENGTH.unpack(head))
        try:
            image_HW3 = decode(data, max_pixels)
        except UndecodableImageError as error:
            reason = (str(error) or "no reason").encode()
            answers.write(_ANSWER.pack(0, 0, len(reason)) + reason)
        else:
            height, width, _ = image_HW3.shape
            answers.write(_ANSWER.pack(height, width, 0))
            answers.write(np.ascontiguousarray(image_HW3).data)
        answers.flush()


def _exactly(source: IO[bytes], size: int) -> bytes:
    """So many bytes.

    Raises:
        EOFError: there are fewer.
    """
    data = source.read(size)
    if len(data) < size:
        raise EOFError
    return data
