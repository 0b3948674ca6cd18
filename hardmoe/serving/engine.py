"""Answers for requests that come one by one, computed together: what arrives while a batch is at work is the next batch.

Nobody waits for a batch to fill: an idle server answers at once, and a busy one has its batches filled by those who wait. Images
are decoded by threads of their own, as decoders let go of the interpreter's lock. Rejected: waiting some milliseconds for
company, which costs an idle server's only visitor that time; a process per core, each with all experts in memory.

Shape letters: N images, S side in pixels, Z unified dims.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hardmoe.errors import HardmoeError
from hardmoe.mixture import Mixture

_DECODERS = 4


class BusyError(HardmoeError):
    """More is waiting than will be answered in time."""


@dataclass(frozen=True)
class Found:
    """What the mixture made of some images."""

    experts_N: NDArray[np.int32]
    unified_NZ: torch.Tensor


class Engine(Protocol):
    """Whoever embeds squares of pixels: this process, or replicas on a cluster."""

    async def embed(self, pixels_N3SS: NDArray[np.uint8]) -> Found:
        """The expert and the place in the unified space of every image."""
        ...


class LocalEngine:
    """See the module. Belongs to the event loop that it is first used in.

    Args:
        mixture: the mixture.
        most_images: in a batch.
        most_waiting: images waiting; more are refused.
    """

    def __init__(self, mixture: Mixture, most_images: int = 64, most_waiting: int = 1024) -> None:
        self._mixture = mixture
        self._most_images, self._most_waiting = most_images, most_waiting
        self._waiting: deque[tuple[NDArray[np.uint8], asyncio.Future[Found]]] = deque()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="mixture")
        self._task: asyncio.Task[None] | None = None
        self.num_batches = 0
        """How many batches were computed."""

    async def embed(self, pixels_N3SS: NDArray[np.uint8]) -> Found:
        """See `Engine`.

        Raises:
            BusyError: too many images are waiting.
        """
        if sum(len(pixels) for pixels, _ in self._waiting) + len(pixels_N3SS) > self._most_waiting:
            raise BusyError("too many images are waiting; try again in a moment")
        future: asyncio.Future[Found] = asyncio.get_running_loop().create_future()
        self._waiting.append((pixels_N3SS, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        """Batch after batch until nobody waits."""
        while self._waiting:
            batch = self._next_batch()
            pixels_N3SS = np.concatenate([pixels for pixels, _ in batch])
            try:
                found = await asyncio.get_running_loop().run_in_executor(self._worker, self._compute, pixels_N3SS)
            except Exception as error:  # noqa: BLE001 - whoever waits must be told, whatever it is
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            start = 0
            for pixels, future in batch:
                rows = slice(start, start := start + len(pixels))
                if not future.done():
                    future.set_result(Found(found.experts_N[rows], found.unified_NZ[rows]))

    def _next_batch(self) -> list[tuple[NDArray[np.uint8], "asyncio.Future[Found]"]]:
        """As many requests as fit, one at least; those whose sender is gone are left out."""
        batch: list[tuple[NDArray[np.uint8], asyncio.Future[Found]]] = []
        images = 0
        while self._waiting and (not batch or images + len(self._waiting[0][0]) <= self._most_images):
            pixels, future = self._waiting.popleft()
            batch.append((pixels, future))
            images += len(pixels)
        return batch

    def _compute(self, pixels_N3SS: NDArray[np.uint8]) -> Found:
        self.num_batches += 1
        seen = self._mixture.see(pixels_N3SS)
        experts_N = self._mixture.route_seen(seen)
        return Found(experts_N, self._mixture.embed_seen(seen, experts_N))

    def close(self) -> None:
        """Let the worker end."""
        self._worker.shutdown(wait=False, cancel_futures=True)


class Decoders:
    """Threads that turn encoded images into squares.

    Args:
        mixture: whose squares.
        max_pixels: larger images are refused before their pixels are decoded.
    """

    def __init__(self, mixture: Mixture, max_pixels: int) -> None:
        self._mixture, self._max_pixels = mixture, max_pixels
        self._pool = ThreadPoolExecutor(_DECODERS, thread_name_prefix="requests")

    async def __call__(self, images: Sequence[bytes]) -> NDArray[np.uint8]:
        """Squares uint8 [N, 3, S, S].

        Raises:
            DataError: an image cannot be decoded, or is too large.
        """

        def decode() -> NDArray[np.uint8]:
            return self._mixture.pixels(images, self._max_pixels)

        return await asyncio.get_running_loop().run_in_executor(self._pool, decode)
