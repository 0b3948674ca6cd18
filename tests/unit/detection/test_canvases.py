"""Canvases: every object lies in its box, within its range, on no other; any canvas can be drawn alone."""

import numpy as np

from hardmoe.detection.canvas_files import CanvasSet
from hardmoe.detection.canvases import Pool, draw_canvas, ink
from hardmoe.detection.config import CanvasesConfig

CONFIG = CanvasesConfig(size=128, max_objects=6)


def pool(count: int = 12) -> Pool:
    """Black rectangles of different shapes on white, one of them without a margin."""
    images = np.full((count, 32, 32, 3), 255, np.uint8)
    for index, image in enumerate(images):
        image[index : 32 - index, 8:24] = 0
    return Pool(images, np.arange(count) % 3)


def test_ink_is_what_is_not_white() -> None:
    image = np.full((10, 12, 3), 255, np.uint8)
    assert ink(image) is None
    image[2:5, 3:9, 1] = 100
    found = ink(image)
    assert found is not None and found.shape == (3, 6, 3)


def test_boxes_hold_exactly_the_ink_and_have_the_size_of_their_range() -> None:
    for number in range(60):
        canvas = draw_canvas(pool(), CONFIG, 0, "train", number)
        dark = canvas.image_SS3.max(axis=2) < 60
        covered = np.zeros_like(dark)
        for (x, y, right, bottom), size_range in zip(canvas.boxes_M4.astype(int), canvas.ranges_M, strict=True):
            low, high = CONFIG.sizes[size_range]
            assert low <= max(right - x, bottom - y) <= high
            assert not covered[y:bottom, x:right].any(), "objects overlap"
            covered[y:bottom, x:right] = True
            assert dark[y:bottom, x:right].mean() > 0.95
        assert not dark[~covered].any()
        assert 1 <= len(canvas.classes_M) <= 6


def test_a_canvas_depends_on_seed_split_and_number_alone() -> None:
    first = draw_canvas(pool(), CONFIG, 0, "train", 5)
    draw_canvas(pool(), CONFIG, 0, "train", 6)
    again = draw_canvas(pool(), CONFIG, 0, "train", 5)
    assert np.array_equal(first.image_SS3, again.image_SS3) and np.array_equal(first.boxes_M4, again.boxes_M4)
    for other in (("train", 6, 0), ("test", 5, 0), ("train", 5, 1)):
        split, number, seed = other
        assert not np.array_equal(draw_canvas(pool(), CONFIG, seed, split, number).image_SS3, first.image_SS3)


def test_rare_classes_are_on_as_many_canvases_as_common_ones() -> None:
    images = np.zeros((50, 8, 8, 3), np.uint8)
    uneven = Pool(images, np.array([0] * 49 + [1]))
    classes = np.concatenate([draw_canvas(uneven, CONFIG, 0, "train", number).classes_M for number in range(300)])
    assert 0.4 < classes.mean() < 0.6


def test_objects_of_a_set_are_found_by_canvas() -> None:
    canvases = [draw_canvas(pool(), CONFIG, 0, "train", number) for number in range(4)]
    counts = [len(canvas.classes_M) for canvas in canvases]
    stacked = CanvasSet(
        np.stack([canvas.image_SS3 for canvas in canvases]),
        np.concatenate([canvas.boxes_M4 for canvas in canvases]),
        np.concatenate([canvas.classes_M for canvas in canvases]),
        np.concatenate([canvas.ranges_M for canvas in canvases]),
        np.cumsum([0, *counts]),
    )
    assert stacked.canvases_M.tolist() == [number for number, count in enumerate(counts) for _ in range(count)]
    for number, canvas in enumerate(canvases):
        assert np.array_equal(stacked.boxes_M4[stacked.objects(number)], canvas.boxes_M4)
