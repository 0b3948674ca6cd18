"""What the generators of hostile images share: the kinds of outcome, and pictures whose pixels are known."""

import io
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Outcome = Literal["decode", "refuse", "either"]
Pixels = NDArray[np.uint8]

MAX_PIXELS = 100_000_000
"""The limit under which every outcome is stated; the default of `dataset.max_pixels`."""


@dataclass(frozen=True)
class HostileImage:
    """A file and what must become of it."""

    name: str
    data: bytes
    outcome: Outcome
    """`decode`: it must become an example with `pixels`; `refuse`: it must be quarantined; `either`: it must do no harm, and
    if it decodes it must be an image."""
    reason: str
    """Why this is the right outcome."""
    pixels: Pixels | None = None
    """uint8 [H, W, 3], for `decode`."""
    tolerance: int = 0
    """By how much a value may differ from `pixels`, where a formula and not a decoder gave them."""


def decodes(name: str, data: bytes, pixels: Pixels, reason: str, tolerance: int = 0) -> HostileImage:
    """A file that must become an example."""
    return HostileImage(
        name, data, "decode", reason, np.ascontiguousarray(pixels) if pixels.size < 1 << 20 else pixels, tolerance
    )


def refused(name: str, data: bytes, reason: str) -> HostileImage:
    """A file that must be quarantined."""
    return HostileImage(name, data, "refuse", reason)


def either(name: str, data: bytes, reason: str) -> HostileImage:
    """A file about which decoders rightly differ."""
    return HostileImage(name, data, "either", reason)


def picture(height: int = 48, width: int = 64, seed: int = 0) -> Pixels:
    """A picture with slopes, edges and some noise, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    slopes = np.stack([rows * 200 / height, columns * 200 / width, (rows + columns) * 200 / (height + width)], -1)
    discs = (rows - height / 3) ** 2 + (columns - width / 2) ** 2 < (min(height, width) / 3) ** 2
    slopes[discs] = 255 - slopes[discs]
    return np.clip(slopes + rng.normal(20, 8, slopes.shape), 0, 255).astype(np.uint8)


def saved(pixels: Pixels | Image.Image, file_format: str, **options: Any) -> bytes:
    """Encode by Pillow."""
    target = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(target, format=file_format, **options)
    return target.getvalue()


def grey_as_rgb(grey: Pixels) -> Pixels:
    """uint8 [H, W] to [H, W, 3]."""
    return np.repeat(grey[..., None], 3, axis=2)


def over_white(rgb: Pixels, alpha: Pixels) -> Pixels:
    """The colours as they look on white paper."""
    weight = alpha[..., None].astype(np.float64) / 255
    return np.rint(rgb * weight + 255 * (1 - weight)).astype(np.uint8)


def flipped(data: bytes, count: int, seed: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Copies with one bit turned over, at places drawn from a part of the file."""
    draw = random.Random(seed)
    for _ in range(count):
        at = draw.randrange(start, len(data) if stop is None else stop)
        damaged = bytearray(data)
        damaged[at] ^= 1 << draw.randrange(8)
        yield at, bytes(damaged)


def cut(data: bytes, count: int) -> Iterator[tuple[int, bytes]]:
    """Beginnings of a file, evenly spaced, neither nothing nor all of it."""
    for length in evenly(1, len(data) - 1, count):
        yield length, data[:length]


def evenly(first: int, last: int, count: int) -> Iterable[int]:
    """At most so many different whole numbers from first to last."""
    return dict.fromkeys(round(first + (last - first) * step / max(count - 1, 1)) for step in range(count))
