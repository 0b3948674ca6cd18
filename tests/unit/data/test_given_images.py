"""Images as users have them: every kind gives the same square, and what is none is refused by its position."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hardmoe.data.given_images import pieces, squares
from hardmoe.data.images import load_square
from hardmoe.errors import DataError

GRADIENT_HW3 = (np.arange(20 * 30 * 3).reshape(20, 30, 3) % 256).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def test_every_kind_of_image_gives_the_square_of_its_file(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(GRADIENT_HW3))
    path = tmp_path / "a b.png"
    path.write_bytes(data)
    tensor = torch.from_numpy(GRADIENT_HW3.transpose(2, 0, 1).copy())
    given = [data, path, str(path), path.as_uri(), Image.open(path), GRADIENT_HW3, tensor]
    found = squares(given, 8)
    assert found.shape == (7, 3, 8, 8) and found.dtype == np.uint8
    for square in found:
        np.testing.assert_array_equal(square, load_square(data, 8, 10**6))


def test_pillows_image_is_turned_upright_and_laid_on_white_as_its_file_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.fromarray(GRADIENT_HW3), "JPEG", exif=exif)
    clear = encoded(Image.fromarray(np.dstack([GRADIENT_HW3, np.full((20, 30), 90, np.uint8)])))
    for data in (turned, clear):
        by_pillow, by_bytes = squares([Image.open(io.BytesIO(data)), data], 8)
        assert np.abs(by_pillow.astype(int) - by_bytes).max() <= 2


def test_more_images_than_one_thread_decodes_keep_their_order() -> None:
    images = [np.full((9, 9, 3), value, np.uint8) for value in range(100)]
    assert squares(images, 4)[:, 0, 0, 0].tolist() == list(range(100))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 8, 8), np.float32), r"item 0 is an array of float32 \[3, 8, 8\]; convert it to uint8 \[height"),
        (np.zeros((8, 8), np.uint8), r"item 0 is an array of uint8 \[8, 8\]"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"item 0 is a tensor of uint8 \[8, 8, 3\]; convert it to uint8 \[3, height"),
        (7, r"item 0 is a int; give paths, URIs"),
    ],
)
def test_what_is_no_image_is_refused_with_what_would_be(image: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        squares([image], 4)


def test_one_image_in_place_of_several_is_refused() -> None:
    for image in (b"x", "a.png", Path("a.png"), Image.fromarray(GRADIENT_HW3), GRADIENT_HW3):
        with pytest.raises(TypeError, match="put it into brackets"):
            squares(image, 4)


def test_image_that_cannot_be_had_is_named_with_its_position(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"image 1 of 2 \(.*none\.png\)"):
        squares([GRADIENT_HW3, tmp_path / "none.png"], 4)
    with pytest.raises(DataError, match="image 0 of 1: no pixels"):
        squares([np.zeros((0, 4, 3), np.uint8)], 4)
    with pytest.raises(DataError, match=r"image 0 of 1 \(https://a/b\.png\): a web address; download"):
        squares(["https://a/b.png"], 4)


def test_pieces_are_as_large_as_is_allowed_and_miss_nothing() -> None:
    images = [GRADIENT_HW3] * 7
    assert [len(piece) for piece in pieces(images, 4, 3 * 16 * 3)] == [3, 3, 1]
    assert [len(piece) for piece in pieces(images, 4, 1)] == [1] * 7
