"""What replicas of a server compute: a gate sees and routes images, and asks whoever holds their experts for the features.

    door (HTTP, alignment, decoder)  ->  gates (trunk, router)  ->  holders of experts

Gates and holders know neither HTTP nor Ray, which `ray_app` puts around them. Each computes in a thread of its own, in
`Batches`, and is ill if a batch does not come to its end. Rejected: one replica that is a whole mixture, of which a machine holds
as many experts as its memory, however many machines there are; alignment and decoder in the replicas, each of which would hold
the rows of all hashtags.

Shape letters: N images, n some of them, S side in pixels, C channels of a map, H and W its sides, D features.
"""

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hardmoe.errors import HardmoeError
from hardmoe.mixture import Judged, Mixture, Seen
from hardmoe.models.backbones import TagClassifier
from hardmoe.serving.batching import Batches
from hardmoe.serving.engine import MOST_IMAGES, slices

SECONDS_OF_A_BATCH = 60.0
"""A batch at work for longer has a device that hangs."""

Features = NDArray[np.float32]


@dataclass(frozen=True)
class Travelling:
    """Images on their way to an expert: `mixture.Seen` as arrays, which pass from process to process without a copy."""

    pixels_n3SS: NDArray[np.uint8]
    """uint8 [n, 3, S, S]."""
    maps_nCHW: NDArray[np.float32] | None

    def __len__(self) -> int:
        return len(self.pixels_n3SS)


Ask = Callable[[int, Travelling], Awaitable[Features]]
"""Features, float32 [n, D], of images by the expert of that number, wherever it is."""


class HangingError(HardmoeError):
    """A batch does not end; the replica is to be replaced."""


def check_at_work(batches: Iterable[Batches[Any, Any]]) -> None:
    """Find batches that hang.

    Raises:
        HangingError: one does.
    """
    longest = max((each.seconds_at_work() for each in batches), default=0.0)
    if longest > SECONDS_OF_A_BATCH:
        raise HangingError(f"a batch has been at work for {longest:.0f} s")


@dataclass
class _Together:
    """A batch behind the gate, on its way through the experts; whoever wants its answer first sends it off."""

    seen: Seen
    judged: Judged
    _answers: "asyncio.Task[Features] | None" = field(default=None, repr=False)

    async def features(self, ask: Ask) -> Features:
        if self._answers is None:
            self._answers = asyncio.create_task(self._ask_all(ask))
        return await asyncio.shield(self._answers)

    async def _ask_all(self, ask: Ask) -> Features:
        numbers = np.unique(self.judged.experts_N).tolist()
        places = [np.flatnonzero(self.judged.experts_N == number) for number in numbers]
        sent = zip(numbers, places, strict=True)
        answers = await asyncio.gather(*(ask(number, self._travelling(rows_n)) for number, rows_n in sent))
        features_ND = np.empty((len(self.seen), answers[0].shape[1]), np.float32)
        for rows_n, features_nD in zip(places, answers, strict=True):
            features_ND[rows_n] = features_nD
        return features_ND

    def _travelling(self, rows_n: NDArray[np.int64]) -> Travelling:
        maps_NCHW = self.seen.maps_NCHW
        maps = None if maps_NCHW is None else maps_NCHW[torch.from_numpy(rows_n).to(maps_NCHW.device)].cpu().numpy()
        return Travelling(self.seen.pixels_N3SS[rows_n], maps)


class Gate:
    """Trunk and router.

    Args:
        mixture: of which only these are loaded.
        ask: for experts' features.
        most_images: in a batch of the trunk.
    """

    def __init__(self, mixture: Mixture, ask: Ask, most_images: int = MOST_IMAGES) -> None:
        mixture.warm_up()
        self._mixture, self._ask = mixture, ask
        self._batches = Batches(self._compute, ThreadPoolExecutor(1, thread_name_prefix="gate"), most_images)

    async def embed(self, pixels_N3SS: NDArray[np.uint8]) -> tuple[Judged, Features]:
        """Every image's expert and whether it is refused, and its features by that expert, float32 [N, D].

        The next images pass the trunk while these are with the experts.
        """
        together, rows = await self._batches(pixels_N3SS, len(pixels_N3SS))
        judged = Judged(together.judged.experts_N[rows], together.judged.refused_N[rows])
        return judged, (await together.features(self._ask))[rows]

    def check_health(self) -> None:
        """Raise if a batch hangs."""
        check_at_work([self._batches])

    def _compute(self, asked: Sequence[NDArray[np.uint8]]) -> list[tuple[_Together, slice]]:
        seen = self._mixture.see(np.concatenate(asked))
        together = _Together(seen, self._mixture.judge_seen(seen))
        return [(together, rows) for rows in slices([len(each) for each in asked])]


class Holder:
    """Some experts of a mixture; which ones are in memory is up to whoever calls it.

    Args:
        mixture: whose trunk and decoder are not loaded.
        most_images: in a batch of one expert.
    """

    def __init__(self, mixture: Mixture, most_images: int = MOST_IMAGES) -> None:
        self._mixture, self._most_images = mixture, most_images
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="experts")
        self._held: weakref.WeakSet[TagClassifier] = weakref.WeakSet()
        self._batches: dict[int, Batches[tuple[TagClassifier, Travelling], Features]] = {}

    @property
    def num_held(self) -> int:
        """How many experts are in memory."""
        return len(self._held)

    async def load(self, expert: int) -> TagClassifier:
        """Read an expert, away from the loop; it is held as long as whoever asked for it refers to it."""
        network = await asyncio.to_thread(self._mixture.load_expert, expert)
        self._held.add(network)
        return network

    async def features(self, expert: int, network: TagClassifier, images: Travelling) -> Features:
        """Features of images, float32 [n, D], by an expert and its network."""
        batches = self._batches.setdefault(expert, Batches(self._compute, self._worker, self._most_images))
        return await batches((network, images), len(images))

    def check_health(self) -> None:
        """Raise if a batch hangs."""
        check_at_work(self._batches.values())

    def _compute(self, asked: Sequence[tuple[TagClassifier, Travelling]]) -> list[Features]:
        # One that was evicted and read again meanwhile is the same network.
        network, images = asked[0][0], [each for _, each in asked]
        pixels_n3SS = np.concatenate([each.pixels_n3SS for each in images])
        maps = [each.maps_nCHW for each in images if each.maps_nCHW is not None]
        maps_nCHW = torch.from_numpy(np.concatenate(maps)).to(self._mixture.device) if maps else None
        features_nD: Features = self._mixture.features_of(network, Seen(pixels_n3SS, maps_nCHW)).numpy()
        return [features_nD[rows] for rows in slices([len(each) for each in images])]
