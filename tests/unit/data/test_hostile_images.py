"""Every hostile file gets the outcome that its reference demands, in bounded memory, and harms nothing.

All of them are decoded in one process of their own: a crash, a hang or a leak is then a failure with a name and not the end of
the test run, and the system itself holds the process to its memory.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_images import MAX_PIXELS, HostileImage, hostile_images
from memory import with_tests_path

from hardmoe.data.images import decode, load_square, resize_square

TESTS = Path(__file__).parents[2]

MOST_BYTES_PER_PIXEL = 12
"""Of an image on its way: Pillow's own picture (four bytes a pixel), its rows as bytes twice over, and the result."""
MEMORY_LIMIT = MAX_PIXELS * MOST_BYTES_PER_PIXEL
SECONDS = 120
"""Far above the 10 s that it takes, and far below what a single file could cost that is read the hard way."""


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    """What a process of its own reports after it decoded all files."""
    program = [sys.executable, str(TESTS / "hostile_images.py"), str(MEMORY_LIMIT)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=SECONDS, env=with_tests_path())
    assert done.returncode == 0, done.stderr[-2000:]
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_every_hostile_file_has_the_outcome_its_reference_demands(run: dict[str, Any]) -> None:
    assert run["files"] == len(hostile_images())
    assert run["problems"] == {}


def test_decoding_them_stays_within_twelve_bytes_a_pixel(run: dict[str, Any]) -> None:
    assert run["peak_bytes"] < MEMORY_LIMIT


def test_hostile_files_are_many_different_small_and_mostly_of_a_known_outcome() -> None:
    images = hostile_images()
    outcomes = Counter(image.outcome for image in images)
    assert len(images) >= 3000
    assert len({image.name for image in images}) == len(images)
    assert sum(len(image.data) for image in images) < 60_000_000
    assert outcomes["decode"] > 1500 and outcomes["refuse"] > 3000
    assert outcomes["either"] < len(images) / 10


def _readable_in_every_way() -> list[HostileImage]:
    """About 200 sound files of all formats, none of them large."""
    sound = [image for image in hostile_images() if image.pixels is not None and image.pixels.size < 1_000_000]
    whole = [image for image in sound if image.name.endswith("whole") or "exif" in image.name or "size" in image.name]
    return whole + sound[::17]


@pytest.mark.parametrize("size", [8, 32, 100])
def test_load_square_gives_the_very_pixels_of_decode_and_resize_square(size: int) -> None:
    for image in _readable_in_every_way():
        expected = resize_square(decode(image.data, MAX_PIXELS), size)
        np.testing.assert_array_equal(load_square(image.data, size, MAX_PIXELS), expected, err_msg=image.name)


def test_reduced_decoding_reads_what_full_decoding_reads() -> None:
    for image in _readable_in_every_way():
        assert load_square(image.data, 8, MAX_PIXELS, reduced=True).shape == (3, 8, 8), image.name
