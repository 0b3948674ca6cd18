"""Decoding, squaring and encoding of images, against Pillow's and torchvision's own results and NumPy formulas."""

import base64
import hashlib
import io
import os
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features
from torchvision.transforms import v2

from hardmoe.data import decoding, jpeg
from hardmoe.data.config import PILLOW_MAX_PIXELS
from hardmoe.data.ids import content_id
from hardmoe.data.images import (
    UndecodableImageError,
    decode,
    encode_png,
    load_square,
    load_square_into,
    resize_square,
    shrink,
    thumbnail_data_uri,
)
from hardmoe.errors import HardmoeError

torch.set_num_threads(1)

LIMIT = 1_000_000


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height, width):
    """A picture that JPEG keeps within a few grey levels."""
    rows, columns = np.mgrid[0:height, 0:width]
    diagonal = (rows + columns) * 255 // (height + width)
    return np.stack([rows * 255 // height, columns * 255 // width, diagonal], -1).astype(np.uint8)


def saved(image, file_format, **options):
    target = io.BytesIO()
    image.save(target, format=file_format, **options)
    return target.getvalue()


def over_white(rgb, alpha):
    weight = alpha[..., None].astype(np.float64) / 255
    return rgb * weight + 255 * (1 - weight)


def test_content_id_is_the_head_of_sha256():
    assert content_id(b"abc") == bytes.fromhex(hashlib.sha256(b"abc").hexdigest())[:16]


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_exactly(file_format):
    pixels = noise(5, 7)
    decoded = decode(saved(Image.fromarray(pixels), file_format), LIMIT)
    assert decoded.dtype == np.uint8 and decoded.flags.writeable
    np.testing.assert_array_equal(decoded, pixels)


def test_grey_and_bilevel_become_three_equal_channels():
    grey = noise(5, 7, 1)
    np.testing.assert_array_equal(decode(saved(Image.fromarray(grey), "PNG"), LIMIT), np.repeat(grey[..., None], 3, 2))
    bilevel = Image.fromarray(grey).convert("1")
    expected = np.repeat(np.asarray(bilevel)[..., None], 3, 2) * np.uint8(255)
    np.testing.assert_array_equal(decode(saved(bilevel, "PNG"), LIMIT), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(noise(4, 6)), "PNG", exif=exif)
    np.testing.assert_array_equal(decode(data, LIMIT), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


def test_broken_exif_costs_no_picture():
    pixels = noise(4, 6)
    data = saved(Image.fromarray(pixels), "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    np.testing.assert_array_equal(decode(data, LIMIT), pixels)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_white(mode):
    pixels = noise(6, 6, len(mode))
    rgb = pixels[..., :3] if mode == "RGBA" else np.repeat(pixels[..., :1], 3, 2)
    decoded = decode(saved(Image.fromarray(pixels), "PNG"), LIMIT)
    np.testing.assert_allclose(decoded, over_white(rgb, pixels[..., -1]), atol=1)


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 128])])
def test_palette_with_transparency_is_laid_over_white_without_a_warning(transparency):
    colours = np.array([[10, 20, 30], [200, 100, 50], [0, 255, 0]], np.uint8)
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette(colours.ravel().tolist())
    alpha = np.array([255, 0, 255 if transparency == 1 else 128])
    decoded = decode(saved(image, "PNG", transparency=transparency), LIMIT)
    np.testing.assert_allclose(decoded, over_white(colours[indices], alpha[indices]), atol=1)


def test_one_transparent_grey_or_colour_becomes_white():
    grey = np.array([[0, 100, 200]], np.uint8)
    decoded = decode(saved(Image.fromarray(grey), "PNG", transparency=100), LIMIT)
    np.testing.assert_array_equal(decoded[0, :, 0], [0, 255, 200])
    colour = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    decoded = decode(saved(Image.fromarray(colour), "PNG", transparency=(4, 5, 6)), LIMIT)
    np.testing.assert_array_equal(decoded[0], [[1, 2, 3], [255, 255, 255]])


def test_cmyk_becomes_rgb():
    cmyk = Image.fromarray(np.stack([*np.moveaxis(smooth(16, 16), 2, 0), np.full((16, 16), 40, np.uint8)], -1), mode="CMYK")
    decoded = decode(saved(cmyk, "TIFF"), LIMIT)
    ink = np.asarray(cmyk).astype(np.float64)
    np.testing.assert_allclose(decoded, (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255, atol=1)
    assert np.abs(decode(saved(cmyk, "JPEG", quality=95), LIMIT).astype(int) - decoded).mean() < 4


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(file_format):
    grey = np.array([[0, 256, 257, 32768, 65535]], np.uint16)
    decoded = decode(saved(Image.fromarray(grey), file_format), LIMIT)
    np.testing.assert_array_equal(decoded[0, :, 0], np.rint(grey[0] / 257))


def test_pixels_without_a_defined_brightness_are_refused():
    with pytest.raises(UndecodableImageError, match="floating-point"):
        decode(saved(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"), LIMIT)
    with pytest.raises(UndecodableImageError, match="32-bit"):
        decode(saved(Image.fromarray(np.full((2, 2), 70_000, np.int32)), "TIFF"), LIMIT)


@pytest.mark.parametrize("file_format", ["GIF", "PNG"])
def test_first_frame_of_an_animation(file_format):
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    decoded = decode(saved(red, file_format, save_all=True, append_images=[blue]), LIMIT)
    np.testing.assert_array_equal(decoded, np.asarray(red))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_file_is_refused(file_format):
    if not features.check("webp") and file_format == "WEBP":
        pytest.skip("this Pillow has no WebP")
    data = saved(Image.fromarray(noise(64, 64)), file_format)
    assert decode(data, LIMIT).shape == (64, 64, 3)
    with pytest.raises(UndecodableImageError):
        decode(data[: len(data) // 2], LIMIT)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty file"), (b"not an image", "not an image in a known format"), (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image")],
)
def test_what_is_no_image_is_refused_with_a_short_reason(data, reason):
    with pytest.raises(UndecodableImageError, match=reason) as caught:
        decode(data, LIMIT)
    assert isinstance(caught.value, HardmoeError) and len(str(caught.value)) < 150


def test_too_many_pixels_are_refused_before_decoding():
    data = saved(Image.fromarray(noise(20, 30)), "PNG")
    assert decode(data, 600).shape == (20, 30, 3)
    with pytest.raises(UndecodableImageError, match=r"30 x 20 pixels, more than dataset\.max_pixels=599"):
        decode(data, 599)


def test_decompression_bomb_raises_ours_and_warns_nothing(monkeypatch):
    data = saved(Image.new("L", (30, 20)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # warns above 500 and raises above 1,000
    assert decode(data, LIMIT).shape == (20, 30, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(UndecodableImageError, match="far more pixels"):
        decode(data, LIMIT)


_TURNED = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00"
_VALID = [
    *(saved(Image.fromarray(smooth(24, 24)), name) for name in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "ICO", "PPM")),
    saved(Image.fromarray(smooth(24, 24)).quantize(16), "PNG", exif=_TURNED),
]


@settings(max_examples=150)
@given(st.sampled_from(_VALID), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_bytes_are_decoded_or_refused_and_nothing_else(data, edits):
    damaged = bytearray(data)
    for place, value in edits:
        damaged[int(place * len(damaged))] = value
    try:
        decoded = decode(bytes(damaged), LIMIT)
    except UndecodableImageError:
        return
    assert decoded.dtype == np.uint8 and decoded.ndim == 3 and decoded.shape[2] == 3


def test_threads_that_decode_leave_the_warning_filters_as_they_were():
    data = saved(Image.fromarray(noise(64, 64)), "PNG")
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [decode(data, LIMIT) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


@pytest.mark.parametrize("shape", [(64, 64), (50, 64), (91, 40), (10, 14), (32, 33), (1, 500)])
def test_resize_square_agrees_with_torchvision(shape):
    pixels = noise(*shape)
    oracle = v2.Compose([v2.CenterCrop(min(shape)), v2.Resize((32, 32), v2.InterpolationMode.BILINEAR, antialias=True)])
    expected = oracle(torch.from_numpy(pixels).permute(2, 0, 1)).numpy()
    squared = resize_square(pixels, 32)
    assert squared.dtype == np.uint8 and squared.flags.c_contiguous
    # torchvision rounds the crop's corner to even, so an odd difference may move it by a pixel; take its other side then.
    if (max(shape) - min(shape)) % 2:
        mirrored = oracle(torch.from_numpy(np.ascontiguousarray(pixels[::-1, ::-1])).permute(2, 0, 1)).numpy()[:, ::-1, ::-1]
        difference = min(np.abs(squared.astype(int) - other.astype(int)).max() for other in (expected, mirrored))
    else:
        difference = np.abs(squared.astype(int) - expected.astype(int)).max()
    assert difference <= 1


def test_resize_square_returns_a_fitting_image_unchanged_and_unshared():
    pixels = noise(32, 32)
    squared = resize_square(pixels, 32)
    np.testing.assert_array_equal(squared, pixels.transpose(2, 0, 1))
    assert not np.shares_memory(squared, pixels)


def test_resize_square_is_what_torch_computes_with_and_without_vector_instructions():
    program = (
        "import hashlib, numpy as np; from hardmoe.data.images import resize_square;"
        "p = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8);"
        "print(*(hashlib.sha256(resize_square(p, s)).hexdigest() for s in (8, 32, 64, 224, 375, 400)))"
    )
    told = [
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env={**os.environ, **setting}).stdout
        for setting in ({}, {"ATEN_CPU_CAPABILITY": "default"})
    ]
    assert told[0] == told[1] != b""


def jpeg_of(height, width, **options):
    return saved(Image.fromarray(smooth(height, width)), "JPEG", quality=95, **options)


@pytest.mark.parametrize(("shorter", "divisor"), [(31, 1), (32, 1), (63, 2), (64, 2), (128, 4), (255, 8), (256, 8), (2000, 8)])
def test_reduced_decoding_takes_the_largest_divisor_that_leaves_twice_the_size(monkeypatch, shorter, divisor):
    decoded = []

    def watching(*arguments):
        decoded.append(decode_jpeg(*arguments))
        return decoded[-1]

    decode_jpeg = jpeg.decode_jpeg
    monkeypatch.setattr(jpeg, "decode_jpeg", watching)
    load_square(jpeg_of(shorter, shorter + 40), 16, 10**8, reduced=True)
    assert decoded[0].shape[:2] == (-(-shorter // divisor), -(-(shorter + 40) // divisor))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_reduced_decoding_changes_pixels_by_a_little(options):
    data = jpeg_of(300, 400, **options)
    full, reduced = (load_square(data, 32, 10**8, reduced=flag).astype(int) for flag in (False, True))
    assert np.abs(full - reduced).max() <= 4
    assert (full != reduced).any()


def test_reduced_decoding_of_what_is_no_jpeg_is_full_decoding():
    data = saved(Image.fromarray(noise(200, 300)), "PNG")
    np.testing.assert_array_equal(load_square(data, 16, LIMIT, reduced=True), load_square(data, 16, LIMIT))


def test_jpeg_with_made_up_pixels_is_refused_where_pillow_shows_grey():
    """Pillow drops libjpeg's warnings, so a picture whose data break off before its end marker came through half grey."""
    whole = jpeg_of(64, 64)
    broken = whole[: len(whole) * 2 // 3] + b"\xff\xd9"
    assert np.asarray(Image.open(io.BytesIO(broken))).shape == (64, 64, 3)
    with pytest.raises(UndecodableImageError, match="premature end of data segment"):
        decode(broken, LIMIT)


def test_jpeg_with_left_over_bytes_is_kept():
    """Drones and scanners write bytes between the last pixel and the end marker; refusing them would refuse those cameras."""
    whole = jpeg_of(64, 64)
    np.testing.assert_array_equal(decode(whole[:-2] + bytes(range(200)) + whole[-2:], LIMIT), decode(whole, LIMIT))


def test_shrink_returns_the_same_object_where_nothing_is_to_be_done():
    data = jpeg_of(64, 90)
    assert shrink(data, decode(data, LIMIT), 64) is data
    assert shrink(data, decode(data, LIMIT), 100) is data


@pytest.mark.parametrize(
    ("file_format", "options", "stored"),
    [
        ("JPEG", {}, "JPEG"),
        ("WEBP", {}, "JPEG"),
        ("WEBP", {"lossless": True}, "PNG"),
        ("PNG", {}, "PNG"),
        ("GIF", {}, "PNG"),
        ("AVIF", {}, "JPEG"),
    ],
)
def test_shrink_keeps_the_shape_and_the_kind_of_coding(file_format, options, stored):
    data = saved(Image.fromarray(smooth(120, 200)), file_format, **options)
    small = shrink(data, decode(data, LIMIT), 48)
    with Image.open(io.BytesIO(small)) as image:
        assert (image.format, image.size) == (stored, (80, 48))
        expected = Image.fromarray(decode(data, LIMIT)).resize((80, 48), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - np.asarray(expected)).max() <= (
            12 if stored == "JPEG" else 1
        )


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("lossless", [False, True])
def test_shrink_tells_lossy_from_lossless_in_every_container_of_webp(alpha, lossless):
    pixels = np.dstack([smooth(60, 60), noise(60, 60, 1)]) if alpha else smooth(60, 60)
    frames = {"save_all": True, "append_images": [Image.new("RGB", (60, 60))]}
    for more in ({}, {"exif": b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00"}, frames):
        data = saved(Image.fromarray(pixels), "WEBP", lossless=lossless, **more)
        assert shrink(data, decode(data, LIMIT), 16).startswith(b"\x89PNG" if lossless else b"\xff\xd8\xff")


def test_shrink_stores_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg_of(60, 100, exif=exif)
    small = shrink(data, decode(data, LIMIT), 30)
    assert decode(small, LIMIT).shape == (50, 30, 3)


def test_encode_png_is_lossless_and_deterministic():
    pixels = noise(9, 5)
    assert encode_png(pixels) == encode_png(pixels.copy())
    np.testing.assert_array_equal(decode(encode_png(pixels), LIMIT), pixels)


def test_thumbnail_of_an_image_beyond_the_default_limit_is_drawn(monkeypatch: pytest.MonkeyPatch):
    # Once dataset.max_pixels was raised in the recipe, such an image went through the whole run until the report refused it,
    # by the default of that key. Its size is only claimed here: the real one would take a gigabyte.
    limits: list[int] = []
    monkeypatch.setattr(decoding, "check_pixels", lambda width, height, max_pixels: limits.append(max_pixels))
    thumbnail_data_uri(saved(Image.fromarray(smooth(4, 6)), "PNG"), 2)
    assert set(limits) == {PILLOW_MAX_PIXELS}


def test_thumbnail_is_a_png_data_uri_of_the_square():
    pixels = smooth(40, 60)
    uri = thumbnail_data_uri(saved(Image.fromarray(pixels), "PNG"), 16)
    scheme, payload = uri.split(",")
    assert scheme == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(payload))) as thumbnail:
        np.testing.assert_array_equal(np.asarray(thumbnail), resize_square(pixels, 16).transpose(1, 2, 0))


@pytest.mark.parametrize(("height", "width", "size"), [(40, 60, 16), (60, 40, 33), (24, 24, 24), (7, 9, 20)])
@pytest.mark.parametrize("reduced", [False, True])
def test_square_in_a_row_of_a_batch_equals_the_square_alone(height: int, width: int, size: int, reduced: bool) -> None:
    data = saved(Image.fromarray(noise(height, width)), "JPEG", quality=90)
    batch = np.full((3, size, size, 3), 7, np.uint8)
    load_square_into(batch[1], data, LIMIT, reduced=reduced)
    np.testing.assert_array_equal(batch[1].transpose(2, 0, 1), load_square(data, size, LIMIT, reduced=reduced))
    assert (batch[::2] == 7).all()
    with torch.inference_mode():
        inside = np.empty_like(batch[1])
        load_square_into(inside, data, LIMIT, reduced=reduced)
    np.testing.assert_array_equal(inside, batch[1])
