"""Drawing canvases: images pasted where nothing is yet, in three ranges of size.

An image is cut to its ink, scaled so that its longer side has the drawn length, and multiplied into a light ground, so that dark
icons on white become icons on the ground and photographs stay squares, tinted. Where it lies, how large and which it is comes
from a generator of the canvas's own, seeded by a hash of its split and number: any canvas can be drawn alone. Rejected: pasting
squares as they are, whose white frames give the boxes away.

Shape letters: S side of a canvas, N canvases, M objects, I images, P side of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hardmoe.data.images import resize_square
from hardmoe.detection.config import CanvasesConfig
from hardmoe.hashing import derive_seed

_WHITE = 250
_TRIES = 30


@dataclass(frozen=True)
class Pool:
    """The images that objects are made of."""

    images_IPP3: NDArray[np.uint8]
    classes_I: NDArray[np.int64]


@dataclass(frozen=True)
class Canvas:
    """One canvas and what is on it."""

    image_SS3: NDArray[np.uint8]
    boxes_M4: NDArray[np.float32]
    """xyxy in pixels."""
    classes_M: NDArray[np.int64]
    ranges_M: NDArray[np.int64]
    """0 small, 1 medium, 2 large."""


def ink(image_PP3: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """The part of an image that is not white, uint8 [H, W, 3]; None if it is nothing but white."""
    dark = image_PP3.min(axis=2) < _WHITE
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    if not len(rows):
        return None
    return image_PP3[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def draw_canvas(pool: Pool, config: CanvasesConfig, seed: int, split: str, number: int) -> Canvas:
    """Draw a canvas; the same for the same arguments, whatever was drawn before.

    Classes are drawn before images, so that rare ones are on as many canvases as common ones.
    """
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "canvas", split, number)))
    image_SS3 = _ground(config.size, generator)
    boxes: list[tuple[int, int, int, int]] = []
    classes: list[int] = []
    ranges: list[int] = []
    known = np.unique(pool.classes_I)
    for _ in range(int(generator.integers(1, config.max_objects + 1))):
        size_range = int(generator.integers(len(config.sizes)))
        tag = int(generator.choice(known))
        index = int(generator.choice(np.flatnonzero(pool.classes_I == tag)))
        low, high = config.sizes[size_range]
        object_HW3 = _scaled(pool.images_IPP3[index], int(generator.integers(low, high + 1)))
        if (place := _free_place(object_HW3.shape, boxes, config.size, generator)) is None:
            continue
        x, y = place
        height, width = object_HW3.shape[:2]
        below = image_SS3[y : y + height, x : x + width]
        below[...] = (below.astype(np.uint16) * object_HW3 // 255).astype(np.uint8)
        boxes.append((x, y, x + width, y + height))
        classes.append(tag)
        ranges.append(size_range)
    return Canvas(image_SS3, np.array(boxes, np.float32), np.array(classes, np.int64), np.array(ranges, np.int64))


def _ground(size: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """A light colour that changes from one corner to the other, with a little noise."""
    corners_43 = generator.uniform(150, 255, (4, 3))
    along = np.linspace(0, 1, size)
    top_S3, bottom_S3 = (corners_43[first] * (1 - along[:, None]) + corners_43[first + 1] * along[:, None] for first in (0, 2))
    ground_SS3 = top_S3[None] * (1 - along[:, None, None]) + bottom_S3[None] * along[:, None, None]
    noisy: NDArray[np.uint8] = np.clip(ground_SS3 + generator.normal(0, 6, ground_SS3.shape), 0, 255).astype(np.uint8)
    return noisy


def _scaled(image_PP3: NDArray[np.uint8], longer: int) -> NDArray[np.uint8]:
    """An image's ink with a longer side of so many pixels, and a shorter one of 4 at least."""
    from PIL import Image

    cut = ink(image_PP3)
    assert cut is not None, "the pool has no white images"
    height, width = (max(4, round(longer * side / max(cut.shape[:2]))) for side in cut.shape[:2])
    return np.asarray(Image.fromarray(cut).resize((width, height), Image.Resampling.BILINEAR))


def _free_place(
    shape: Sequence[int], boxes: Sequence[tuple[int, int, int, int]], size: int, generator: np.random.Generator
) -> tuple[int, int] | None:
    """Where an object overlaps no other, x and y; None if some tries found no such place."""
    height, width = shape[:2]
    for _ in range(_TRIES):
        x, y = int(generator.integers(0, size - width + 1)), int(generator.integers(0, size - height + 1))
        if all(x >= right or y >= bottom or x + width <= left or y + height <= top for left, top, right, bottom in boxes):
            return x, y
    return None


def pool_square(image_HW3: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """An image as the pool holds it, [P, P, 3]."""
    return np.ascontiguousarray(resize_square(image_HW3, size).transpose(1, 2, 0))
