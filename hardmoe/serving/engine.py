"""Who embeds the images of requests, and the threads that decode them.

Images are decoded by threads of their own, as decoders let go of the interpreter's lock; the network takes them in `Batches`.
Rejected: a process per core, each with all experts in memory.

Shape letters: N images, S side in pixels, Z unified dims.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hardmoe.errors import HardmoeError
from hardmoe.mixture import Mixture
from hardmoe.serving.batching import Batches

MOST_IMAGES = 64
"""In a batch."""
MOST_WAITING = 1024
"""Images; more are refused."""
_DECODERS = 4


class BusyError(HardmoeError):
    """More is waiting than will be answered in time."""


@dataclass(frozen=True)
class Found:
    """What the mixture made of some images."""

    experts_N: NDArray[np.int32]
    refused_N: NDArray[np.bool_]
    """Which images get no tag."""
    unified_NZ: torch.Tensor


class Engine(Protocol):
    """Whoever embeds squares of pixels: this process, or replicas on a cluster."""

    async def embed(self, pixels_N3SS: NDArray[np.uint8]) -> Found:
        """The expert and the place in the unified space of every image.

        Raises:
            BusyError: too many images are waiting.
        """
        ...

    async def num_held(self) -> int:
        """How many experts are in memory; one that two processes hold counts twice."""
        ...


def refuse_beyond(most_waiting: int, num_waiting: int) -> None:
    """Refuse what would wait behind too many.

    Raises:
        BusyError: it would.
    """
    if num_waiting > most_waiting:
        raise BusyError("too many images are waiting; try again in a moment")


class LocalEngine:
    """The mixture in this process.

    Args:
        mixture: the mixture.
        most_images: in a batch.
        most_waiting: images waiting; more are refused.
    """

    def __init__(self, mixture: Mixture, most_images: int = MOST_IMAGES, most_waiting: int = MOST_WAITING) -> None:
        self._mixture, self._most_waiting = mixture, most_waiting
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="mixture")
        self._batches: Batches[NDArray[np.uint8], Found] = Batches(self._compute, self._worker, most_images)

    @property
    def num_batches(self) -> int:
        """How many batches were computed."""
        return self._batches.num_batches

    async def embed(self, pixels_N3SS: NDArray[np.uint8]) -> Found:
        """See `Engine`."""
        refuse_beyond(self._most_waiting, self._batches.num_waiting + len(pixels_N3SS))
        return await self._batches(pixels_N3SS, len(pixels_N3SS))

    async def num_held(self) -> int:
        """See `Engine`."""
        return len(self._mixture.experts.numbers)

    def _compute(self, together: Sequence[NDArray[np.uint8]]) -> list[Found]:
        seen = self._mixture.see(np.concatenate(together))
        judged = self._mixture.judge_seen(seen)
        unified_NZ = self._mixture.embed_seen(seen, judged.experts_N)
        return [
            Found(judged.experts_N[rows], judged.refused_N[rows], unified_NZ[rows])
            for rows in slices([len(each) for each in together])
        ]

    def close(self) -> None:
        """Let the worker end."""
        self._worker.shutdown(wait=False, cancel_futures=True)


def slices(lengths: Sequence[int]) -> list[slice]:
    """Where each of some arrays lies once they are concatenated."""
    ends = np.cumsum(lengths).tolist()
    return [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]


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
