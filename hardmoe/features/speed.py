"""What limits the features stage on this machine: every step alone, and all of them together, on the user's own images.

Each step is repeated over the same sample until its time is long enough to be trusted: reading the encoded images from the
source, decoding, resizing (already decoded), both in one as the stage does it, the copy to the device, the network, and the
pipeline of all of these. No pipeline is faster than its slowest step, nor than the cores' time allows, which all steps on
the CPU share; how near it comes to that limit is its efficiency.
Rejected: a profiler of a real run, which shows where time went and not what each step could do.

Shape letters: B batch, S side in pixels.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from hardmoe.data.config import DatasetConfig
from hardmoe.data.ids import content_id
from hardmoe.data.images import UndecodableImageError, decode, load_square, resize_square
from hardmoe.data.sources.base import RawExample
from hardmoe.data.sources.registry import open_source
from hardmoe.errors import DataError
from hardmoe.models.backbones import Backbone
from hardmoe.training.inference import device_images, predict_batches
from hardmoe.training.network import Architecture, backbone_of
from hardmoe.training.staging import EncodedImage, Staging, inference_batch_size, staged_batches

_KEPT_DECODED = 64
"""Decoded images held for timing the resizing: 64 of 12 megapixels are 2.3 GB."""
_DECODED_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Step:
    """What one step could do alone."""

    name: str
    images_per_second: float
    num_cores: int
    """Cores that it keeps busy while it does that; 0 for the GPU's own work."""
    note: str = ""


@dataclass(frozen=True)
class Speed:
    """All steps, and the pipeline of them."""

    num_images: int
    bytes_per_image: float
    num_threads: int
    device: str
    steps: Sequence[Step]
    pipeline: float
    """Images per second of the whole, the way the features stage does it."""

    @property
    def limit(self) -> float:
        """Images per second that the steps allow: no more than any of them alone, nor than the cores have time for."""
        counted = self._parts()
        core_seconds = sum(step.num_cores / step.images_per_second for step in counted)
        return min(self.num_threads / core_seconds, *(step.images_per_second for step in counted))

    @property
    def bottleneck(self) -> Step:
        """The slowest step that the pipeline consists of."""
        return min(self._parts(), key=lambda step: step.images_per_second)

    def _parts(self) -> list[Step]:
        """The steps that the pipeline consists of."""
        return [step for step in self.steps if step.name not in ("decode", "resize")]


def measure_speed(dataset: DatasetConfig, network: Architecture, num_threads: int, rows: int, seconds: float) -> Speed:
    """Measure all steps.

    Args:
        dataset: where the images are.
        network: which one, at which size; the number of tags does not matter.
        num_threads: threads for decoding.
        rows: images of the sample.
        seconds: least time of each measurement.

    Raises:
        DataError: there is no image that can be decoded.
    """
    encoded = list(_images(dataset, rows))
    if not encoded:
        raise DataError(f"the source '{dataset.source}' at {dataset.path} has no images; correct dataset.path")
    read_rate = _rate(lambda: sum(1 for _ in _images(dataset, rows)), seconds)
    size, reduced, limit = network.image_size, network.reduced, dataset.max_pixels
    encoded = _decodable(encoded, dataset)
    good = {content_id(data) for data in encoded}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = backbone_of(network, seed=0).to(device).eval()
    decoded = _some_decoded(encoded, limit)
    on_cpu = device.type == "cpu"
    previous = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        steps = [
            Step("read", read_rate, 1, "from the source, by one thread"),
            Step("decode", _threaded(lambda data: decode(data, limit), encoded, num_threads, seconds), num_threads),
            Step("resize", _threaded(lambda image: resize_square(image, size), decoded, num_threads, seconds), num_threads),
            Step(
                "decode and resize",
                _threaded(lambda data: load_square(data, size, limit, reduced=reduced), encoded, num_threads, seconds),
                num_threads,
                f"trunk.decode: {network.decode}",
            ),
        ]
        if not on_cpu:
            steps.append(Step("transfer", _transfer(size, device, seconds), 0, "pinned memory to the GPU"))
        steps.append(Step("network", _network(backbone, size, device, seconds), num_threads if on_cpu else 0, network.backbone))
        staging = Staging(size, inference_batch_size(size, device), num_threads, device, reduced)
        pipeline = _pipeline(backbone, _endless(dataset, rows, good), staging, seconds)
    finally:
        torch.set_num_threads(previous)
    name = torch.cuda.get_device_name(device) if not on_cpu else "CPU"
    return Speed(len(encoded), float(np.mean([len(data) for data in encoded])), num_threads, name, steps, pipeline)


def _images(config: DatasetConfig, rows: int) -> Iterator[bytes]:
    """The first encoded images of the source."""
    source = open_source(config)
    every = (row.image for shard in source.shards() for row in source.read(shard) if isinstance(row, RawExample))
    return islice(every, rows)


def _decodable(images: Sequence[bytes], config: DatasetConfig) -> list[bytes]:
    """Those that can be decoded; the dataset stage counts the others, here they would only end the measurement."""
    good = []
    for data in images:
        with suppress(UndecodableImageError):
            decode(data, config.max_pixels)
            good.append(data)
    if not good:
        raise DataError(f"none of the first {len(images)} images of the source '{config.source}' can be decoded")
    return good


def _some_decoded(images: Sequence[bytes], max_pixels: int) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    for data in images[:_KEPT_DECODED]:
        found.append(decode(data, max_pixels))
        if sum(image.nbytes for image in found) > _DECODED_BYTES:
            break
    return found


def _threaded(work: Callable[..., object], items: Sequence[object], num_threads: int, seconds: float) -> float:
    """Items per second of a function on all threads."""
    with ThreadPoolExecutor(num_threads) as pool:

        def once() -> int:
            for _ in pool.map(work, items, chunksize=1):
                pass
            return len(items)

        return _rate(once, seconds)


def _transfer(size: int, device: torch.device, seconds: float) -> float:
    batch_size = inference_batch_size(size, device)
    batch_B3SS = torch.zeros(batch_size, 3, size, size, dtype=torch.uint8, pin_memory=True)

    def once() -> int:
        batch_B3SS.to(device, non_blocking=True)
        torch.cuda.synchronize(device)
        return batch_size

    return _rate(once, seconds)


def _network(backbone: torch.nn.Module, size: int, device: torch.device, seconds: float) -> float:
    batch_size = inference_batch_size(size, device)
    images_B3SS = device_images(torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8), device)

    def once() -> int:
        with torch.inference_mode():
            backbone(images_B3SS)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return batch_size

    return _rate(once, seconds)


def _endless(config: DatasetConfig, rows: int, good: set[bytes]) -> Iterator[EncodedImage]:
    """The same images again and again, read anew each time."""
    while True:
        for data in _images(config, rows):
            if (identity := content_id(data)) in good:
                yield EncodedImage(identity, data)


def _pipeline(backbone: Backbone, images: Iterator[EncodedImage], staging: Staging, seconds: float) -> float:
    """Images per second from the source to features, in steady state."""
    batches = staged_batches(images, staging)
    try:
        features = predict_batches(backbone, batches)

        def once() -> int:
            next(features)
            if staging.device.type == "cuda":
                torch.cuda.synchronize(staging.device)
            return staging.batch_size

        return _rate(once, seconds)
    finally:
        batches.close()


def _rate(once: Callable[[], int], seconds: float) -> float:
    """Items per second, after a first round that is not counted."""
    once()
    done, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds or not done:
        done += once()
    return done / spent
