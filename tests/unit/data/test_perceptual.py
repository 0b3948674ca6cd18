"""Thumbnails and hashes, against SciPy's cosine transform."""

import numpy as np
import pytest
from near_duplicate_pairs import CHANGES, changed, photograph
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn

from hardmoe.data.perceptual import NO_HASH, THUMBNAIL_PIXELS, THUMBNAIL_SIDE, perceptual_hashes, thumbnail


def _thumbnails(count: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    return np.stack([thumbnail(photograph(rng)) for _ in range(count)])


def _hash(image_HW3: NDArray[np.uint8]) -> int:
    return int(perceptual_hashes(thumbnail(image_HW3)[None])[0])


def _bits_by_scipy(thumbnail_X: NDArray[np.uint8]) -> tuple[int, float]:
    """How many of the 64 lowest frequencies exceed three tenths of their root mean square, and the closest call."""
    spectrum_SS = dctn(thumbnail_X.reshape(THUMBNAIL_SIDE, THUMBNAIL_SIDE).astype(np.float64), norm="ortho")
    pairs = sorted((u * u + v * v, u, v) for u in range(32) for v in range(32) if u or v)[:64]
    values = np.array([spectrum_SS[u, v] for _, u, v in pairs])
    margins = values - 0.3 * np.sqrt(np.mean(values**2))
    return int((margins > 0).sum()), float(np.abs(margins).min())


def test_hash_of_photographs_has_the_bits_that_scipys_transform_says() -> None:
    thumbnails_NX = _thumbnails(40)
    told = [_bits_by_scipy(thumbnail_X) for thumbnail_X in thumbnails_NX]
    clear = [i for i, (_, margin) in enumerate(told) if margin > 0.5]
    assert len(clear) > 20
    counts = np.bitwise_count(perceptual_hashes(thumbnails_NX))
    assert [int(counts[i]) for i in clear] == [told[i][0] for i in clear]


def test_hash_of_a_single_wave_has_the_single_bit_of_its_frequency() -> None:
    """Every bit is one frequency and no two bits are the same one."""
    places_S = (2 * np.arange(32) + 1) * np.pi / 64
    waves = [np.cos(u * places_S)[:, None] * np.cos(v * places_S) for u in range(9) for v in range(9) if 0 < u * u + v * v < 65]
    hashes_N = perceptual_hashes(np.stack([np.round(128 + 100 * wave).astype(np.uint8).reshape(-1) for wave in waves]))
    assert set(np.bitwise_count(hashes_N)) == {1}
    assert len(set(hashes_N.tolist())) == len(waves) == np.bitwise_count(np.bitwise_or.reduce(hashes_N))


def test_hash_is_the_same_one_by_one_and_in_a_batch() -> None:
    thumbnails_NX = _thumbnails(10)
    assert [int(perceptual_hashes(row[None])[0]) for row in thumbnails_NX] == perceptual_hashes(thumbnails_NX).tolist()


def test_hash_of_no_images_is_empty() -> None:
    assert perceptual_hashes(np.zeros((0, THUMBNAIL_PIXELS), np.uint8)).shape == (0,)


@pytest.mark.parametrize("how", [how for how in CHANGES if how != "cropped"])
def test_hash_and_thumbnail_of_a_changed_photograph_stay_near(how: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(8):
        photo_HW3 = photograph(rng)
        changed_HW3 = changed(photo_HW3, how, rng)
        assert (_hash(photo_HW3) ^ _hash(changed_HW3)).bit_count() <= 4
        assert np.abs(thumbnail(photo_HW3).astype(int) - thumbnail(changed_HW3)).mean() < 12


def test_hash_of_a_symmetric_drawing_is_stable_although_half_its_frequencies_vanish() -> None:
    """Compared with zero, as is usual, their signs are noise."""
    half_HW = np.random.default_rng(0).random((64, 32)).repeat(4, 0).repeat(4, 1)[::8, ::8].repeat(16, 0).repeat(16, 1) > 0.5
    drawing_HW3 = np.repeat(np.where(np.hstack([half_HW, half_HW[:, ::-1]]), 255, 0).astype(np.uint8)[:, :, None], 3, axis=2)
    rng = np.random.default_rng(1)
    for how in ("jpeg", "webp", "resized"):
        assert (_hash(drawing_HW3) ^ _hash(changed(drawing_HW3, how, rng))).bit_count() <= 3


@pytest.mark.parametrize("picture", ["blank", "faint noise", "fine checks"])
def test_image_without_shapes_has_no_hash(picture: str) -> None:
    image_HW3 = np.full((128, 160, 3), 250, np.uint8)
    if picture == "faint noise":
        image_HW3 -= np.random.default_rng(0).integers(0, 4, image_HW3.shape, dtype=np.uint8)
    if picture == "fine checks":
        image_HW3[::2, ::2] = 0
    assert _hash(image_HW3) == NO_HASH


def test_drawing_on_white_has_a_hash() -> None:
    image_HW3 = np.full((128, 128, 3), 255, np.uint8)
    image_HW3[60:64, 20:100] = 0
    assert _hash(image_HW3) != NO_HASH


def test_thumbnail_is_the_whole_image_squashed() -> None:
    """A mark at either end of a wide image is in it, where a central square would have lost it."""
    image_HW3 = np.zeros((40, 400, 3), np.uint8)
    image_HW3[:, :20] = image_HW3[:, -20:] = 255
    thumbnail_SS = thumbnail(image_HW3).reshape(32, 32)
    assert thumbnail_SS[:, 0].min() > 200 and thumbnail_SS[:, -1].min() > 200 and thumbnail_SS[:, 8:24].max() == 0


def test_thumbnail_is_luminance_with_green_the_brightest() -> None:
    colours = [thumbnail(np.full((50, 50, 3), colour, np.uint8))[0] for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    assert [int(grey) for grey in colours] == [76, 150, 29]  # ITU-R 601: 0.299, 0.587, 0.114


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (3000, 2), (31, 33)])
def test_thumbnail_of_any_shape_has_1024_pixels(size: tuple[int, int]) -> None:
    assert thumbnail(np.full((*size, 3), 7, np.uint8)).tolist() == [7] * THUMBNAIL_PIXELS


def test_thumbnail_of_a_view_equals_that_of_its_copy() -> None:
    photo_HW3 = photograph(np.random.default_rng(5))
    view_HW3 = photo_HW3[10:-10:2, 5:-5][:, ::-1]
    assert np.array_equal(thumbnail(view_HW3), thumbnail(np.asarray(Image.fromarray(view_HW3.copy()))))
