"""Batches on the device, decoded ahead of the network that wants them.

A few buffers go round: threads decode and resize straight into one while the network works on another, so there is neither a
queue of images nor a copy from one place in memory to the next. On a GPU the buffers are pinned and copied without waiting;
one is filled again only after its copy has ended. With one thread and no GPU nothing could overlap, and nothing is started. The
order, the batches and so the results do not depend on the number of threads. Rejected: processes (Pillow, libjpeg-turbo
and torch's resizing all let go of the interpreter's lock, so threads scale, and pixels need not be sent); a second CUDA
stream (a batch's copy takes 1 % of the time of a network worth a GPU); decoding on the GPU (nvJPEG's pixels are others, so it
would have to be part of the fingerprint).

Shape letters: B batch, S side in pixels.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hardmoe.data.config import PILLOW_MAX_PIXELS
from hardmoe.data.images import UndecodableImageError, load_square_into
from hardmoe.errors import DataError

_IMAGES_PER_TASK = 8
"""Handing over a task costs some 30 microseconds, decoding an image a few hundred."""
_AHEAD_ON_CPU, _AHEAD_ON_GPU = 1, 2
"""Batches being decoded beside the one that the network has. Two on a GPU, so that the threads find work while a copy ends."""


_GPU_BATCH, _LEAST_CPU_BATCH = 256, 16
_CPU_BATCH_BYTES = 8 * 2**20


def inference_batch_size(image_size: int, device: torch.device) -> int:
    """B of every batch that goes through a network without learning: in features, embeddings and use alike.

    Part of what is computed, since a matrix product's last bits depend on it. On a GPU 256. On a CPU as many images as are 8 MB
    of float32, at most 256: a batch then stays in the cache between normalisation and first layer, and no process takes 200 MB
    from the system, page by page, at the start of every shard (at 224 pixels a tenth of the time).
    """
    if device.type == "cuda":
        return _GPU_BATCH
    fitting = _CPU_BATCH_BYTES // (12 * image_size**2)
    return max(_LEAST_CPU_BATCH, min(_GPU_BATCH, 1 << max(0, fitting.bit_length() - 1)))


@dataclass(frozen=True)
class EncodedImage:
    """An image as it is stored, and the id to name it by if it is damaged."""

    example_id: bytes
    data: bytes


@dataclass(frozen=True)
class Staging:
    """How images become batches."""

    image_size: int
    """S, the side to resize to."""
    batch_size: int
    """B, of every batch."""
    num_threads: int
    """Images decoded at once."""
    device: torch.device
    """Where the batches go."""
    reduced: bool = False
    """Whether JPEGs may be scaled down while they are decoded, as `load_square` says."""


@dataclass(frozen=True)
class DeviceBatch:
    """A batch of one size, whatever is left of the stream."""

    images_B3SS: Tensor
    """uint8, channels last, on the device; valid until the next batch is asked for."""
    rows: int
    """How many of them are images; the others are blank."""


class _Buffer:
    """A batch in the host's memory, pinned for a GPU."""

    def __init__(self, staging: Staging) -> None:
        self._device = staging.device
        self._on_gpu = staging.device.type == "cuda"
        side = staging.image_size
        pixels_BSS3 = torch.empty((staging.batch_size, side, side, 3), dtype=torch.uint8, pin_memory=self._on_gpu)
        self.images_B3SS = pixels_BSS3.permute(0, 3, 1, 2)
        self.array_BSS3: NDArray[np.uint8] = pixels_BSS3.numpy()
        self._copied = torch.cuda.Event() if self._on_gpu else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until it may be filled again. An event that was never recorded has happened."""
        if self._copied is not None:
            self._copied.synchronize()

    def on_device(self, rows: int) -> DeviceBatch:
        """Send it off."""
        self.array_BSS3[rows:] = 0
        if self._copied is None:
            return DeviceBatch(self.images_B3SS, rows)
        moved_B3SS = self.images_B3SS.to(self._device, non_blocking=True)
        self._copied.record()
        return DeviceBatch(moved_B3SS, rows)


def staged_batches(images: Iterable[EncodedImage], staging: Staging) -> Generator[DeviceBatch, None, None]:
    """Decode a stream of images into batches; close the iterator if it is not read to its end.

    Args:
        images: the stream; it is read by the calling thread, a few batches ahead.
        staging: see there.

    Yields:
        Batches with all the images in their order.

    Raises:
        DataError: an image cannot be decoded; names its example.
    """
    pieces = _pieces(images, staging.batch_size)
    if staging.num_threads == 1 and staging.device.type == "cpu":
        buffer = _Buffer(staging)
        for piece in pieces:
            _fill(buffer.array_BSS3, piece, staging)
            yield buffer.on_device(len(piece))
        return
    ahead = _AHEAD_ON_GPU if staging.device.type == "cuda" else _AHEAD_ON_CPU
    with ExitStack() as stack:
        pool = ThreadPoolExecutor(staging.num_threads, thread_name_prefix="decode")
        stack.callback(pool.shutdown, cancel_futures=True)
        free, filling = deque[_Buffer](), deque[tuple[_Buffer, int, list[Future[None]]]]()

        def start(pieces: Iterable[list[EncodedImage]]) -> None:
            for piece in pieces:
                buffer = free.popleft() if free else _Buffer(staging)
                buffer.wait()
                filling.append((buffer, len(piece), _fill_in(pool, buffer, piece, staging)))

        start(islice(pieces, ahead))
        while filling:
            start(islice(pieces, 1))
            buffer, rows, tasks = filling.popleft()
            for task in tasks:
                task.result()
            yield buffer.on_device(rows)
            free.append(buffer)


def _pieces(images: Iterable[EncodedImage], size: int) -> Iterator[list[EncodedImage]]:
    stream = iter(images)
    while piece := list(islice(stream, size)):
        yield piece


def _fill_in(pool: ThreadPoolExecutor, buffer: _Buffer, piece: list[EncodedImage], staging: Staging) -> list[Future[None]]:
    starts = range(0, len(piece), _IMAGES_PER_TASK)
    stops = (start + _IMAGES_PER_TASK for start in starts)
    return [
        pool.submit(_fill, buffer.array_BSS3[start:stop], piece[start:stop], staging)
        for start, stop in zip(starts, stops, strict=True)
    ]


@torch.inference_mode()  # without autograd's bookkeeping, resizing an image takes 7 us less
def _fill(target_nSS3: NDArray[np.uint8], images: list[EncodedImage], staging: Staging) -> None:
    """Decode some images into their rows of a batch."""
    for target_SS3, image in zip(target_nSS3, images, strict=False):
        try:
            # Every image was held against the recipe's limit by the dataset stage.
            load_square_into(target_SS3, image.data, PILLOW_MAX_PIXELS, reduced=staging.reduced)
        except UndecodableImageError as error:
            raise DataError(
                f"the image of example {image.example_id.hex()} cannot be decoded: {error}; exclude the example"
            ) from error
