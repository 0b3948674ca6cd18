"""Batches that are decoded ahead: what they hold, how far ahead, and what is left when something fails."""

import io
import threading
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from hardmoe.data.images import load_square
from hardmoe.errors import DataError
from hardmoe.training.staging import EncodedImage, Staging, staged_batches

CPU = torch.device("cpu")
LIMIT = 10**6


def encoded(count: int) -> list[EncodedImage]:
    """Small JPEGs and PNGs of several shapes."""
    images = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number % 7, 26, 3), dtype=np.uint8)
        target = io.BytesIO()
        Image.fromarray(pixels).save(target, format="JPEG" if number % 3 else "PNG")
        images.append(EncodedImage(number.to_bytes(16, "big"), target.getvalue()))
    return images


def expected(images: list[EncodedImage], size: int, reduced: bool = False) -> NDArray[np.uint8]:
    return np.stack([load_square(image.data, size, LIMIT, reduced=reduced) for image in images])


def staging(num_threads: int, batch_size: int = 5, **options: bool) -> Staging:
    return Staging(8, batch_size, num_threads, CPU, **options)


def decoding_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize(("count", "batch_size"), [(23, 5), (20, 5), (3, 5), (1, 1), (40, 17)])
def test_batches_hold_every_image_in_order_and_blanks_behind_the_last(num_threads: int, count: int, batch_size: int) -> None:
    images, seen = encoded(count), []
    for batch in staged_batches(images, staging(num_threads, batch_size)):
        assert batch.images_B3SS.shape == (batch_size, 3, 8, 8)
        assert batch.images_B3SS.is_contiguous(memory_format=torch.channels_last)
        assert not batch.images_B3SS[batch.rows :].any()
        seen.append(batch.images_B3SS[: batch.rows].numpy().copy())
    np.testing.assert_array_equal(np.concatenate(seen), expected(images, 8))
    assert [len(rows) for rows in seen[:-1]] == [batch_size] * (len(seen) - 1)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_nothing_gives_no_batch(num_threads: int) -> None:
    assert list(staged_batches([], staging(num_threads))) == []


@pytest.mark.parametrize("num_threads", [1, 2])
def test_reduced_decoding_is_passed_on(num_threads: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    target = io.BytesIO()
    image.save(target, format="JPEG")
    images = [EncodedImage(bytes(16), target.getvalue())]
    (batch,) = staged_batches(images, staging(num_threads, 1, reduced=True))
    np.testing.assert_array_equal(batch.images_B3SS.numpy(), expected(images, 8, reduced=True))
    assert not np.array_equal(batch.images_B3SS.numpy(), expected(images, 8))


@pytest.mark.parametrize(("num_threads", "ahead"), [(1, 0), (2, 1)])
def test_the_stream_is_read_no_further_ahead_than_the_buffers_reach(num_threads: int, ahead: int) -> None:
    pulled = 0

    def stream() -> Iterator[EncodedImage]:
        nonlocal pulled
        for image in encoded(40):
            pulled += 1
            yield image

    with closing(staged_batches(stream(), staging(num_threads))) as batches:
        for given, _ in enumerate(batches, 1):
            assert pulled == min(40, 5 * (given + ahead))


def test_one_thread_without_gpu_starts_no_thread() -> None:
    before = set(threading.enumerate())
    for _ in staged_batches(encoded(12), staging(1)):
        assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("position", [0, 6, 22])
def test_damaged_image_is_named_and_no_thread_is_left(num_threads: int, position: int) -> None:
    images = encoded(23)
    images[position] = EncodedImage(images[position].example_id, images[position].data[:-30])
    with pytest.raises(DataError, match=f"the image of example {position:032x} cannot be decoded: broken image"):
        list(staged_batches(images, staging(num_threads)))
    assert decoding_threads() == []


def test_failing_stream_and_abandoned_batches_leave_no_thread() -> None:
    def failing() -> Iterator[EncodedImage]:
        yield from encoded(7)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(staged_batches(failing(), staging(2)))
    with closing(staged_batches(encoded(23), staging(2))) as batches:
        next(batches)
        assert decoding_threads() != []
    assert decoding_threads() == []


@pytest.mark.gpu
@pytest.mark.parametrize("num_threads", [1, 4])
def test_batches_on_a_gpu_are_those_of_the_cpu_while_buffers_go_round(num_threads: int) -> None:
    """Every batch is held until the end, behind slow work on the device: a buffer filled too early would show in it."""
    images = encoded(67)
    device = torch.device("cuda")
    slow = torch.randn(4096, 4096, device=device)
    held = []
    for batch in staged_batches(images, Staging(8, 5, num_threads, device)):
        held.append(batch.images_B3SS[: batch.rows])
        slow = torch.nn.functional.normalize(slow @ slow)
    np.testing.assert_array_equal(torch.cat(held).cpu().numpy(), expected(images, 8))
