"""Decoding in a child process: the same pixels and the same refusals, and a child that dies takes nobody with it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import real_images

from hardmoe.data.images import UndecodableImageError, decode
from hardmoe.data.isolation import IsolatedDecoder

IMAGES = [row.image for row in real_images(5)]
DEADLY = Path(__file__).parents[2] / "deadly"


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[IsolatedDecoder]:
    """Its children die of images that end in `deadly`; this process has the real decoder."""
    monkeypatch.syspath_prepend(str(DEADLY))
    with IsolatedDecoder(max_pixels=10_000) as decoder:
        yield decoder


def test_pixels_and_refusals_are_those_of_the_decoder_itself(decoder: IsolatedDecoder) -> None:
    for data in IMAGES:
        np.testing.assert_array_equal(decoder(data), decode(data, 10_000))
    for data in (b"", b"no image", IMAGES[0][:100]):
        with pytest.raises(UndecodableImageError) as expected:
            decode(data, 10_000)
        with pytest.raises(UndecodableImageError) as found:
            decoder(data)
        assert str(found.value) == str(expected.value)
    with IsolatedDecoder(max_pixels=10) as strict, pytest.raises(UndecodableImageError, match="pixels"):
        strict(IMAGES[0])


def test_image_that_kills_the_process_is_refused_and_the_next_one_is_decoded(decoder: IsolatedDecoder) -> None:
    for _ in range(2):
        with pytest.raises(UndecodableImageError, match=r"^decoding it kills the process \(SIGKILL\)$"):
            decoder(IMAGES[0] + b"deadly")
        np.testing.assert_array_equal(decoder(IMAGES[1]), decode(IMAGES[1], 10_000))


def test_image_during_which_a_child_was_killed_once_is_not_at_fault(
    decoder: IsolatedDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system kills whoever is largest when memory is short; that must not decide what is in the dataset."""
    (order := tmp_path / "order").touch()
    monkeypatch.setenv("DEADLY_ONCE", str(order))
    np.testing.assert_array_equal(decoder(IMAGES[0] + b"deadly once"), decode(IMAGES[0], 10_000))
    assert not order.exists()


def test_error_of_the_code_is_no_fault_of_the_image(decoder: IsolatedDecoder) -> None:
    with pytest.raises(RuntimeError, match=r"^the process that decodes ended with 1: ZeroDivisionError: a bug in the decoder$"):
        decoder(IMAGES[0] + b"a bug")
    np.testing.assert_array_equal(decoder(IMAGES[1]), decode(IMAGES[1], 10_000))
