"""From the encoded bytes of an image to pixels, the same way in training, evaluation and serving.

Whatever Pillow throws at hostile or broken bytes becomes one exception with a short reason, so a bad row can be
quarantined and counted. Only raster formats are opened: Pillow would hand PostScript to an external interpreter.
Rejected: torchvision's decoders, which know fewer formats and ignore CMYK, 16-bit and alpha; setting
`Image.MAX_IMAGE_PIXELS`, a global of the host process.

Shape letters: H height, W width, 3 the channels red, green, blue.
"""

import base64
import hashlib
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from hardmoe.data.config import PILLOW_MAX_PIXELS
from hardmoe.errors import HardmoeError

_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "JPEG2000", "TIFF", "BMP", "ICO", "PPM")

# What Pillow's plugins let through: 366,000 randomly damaged files of 10 formats raised nothing else. MemoryError is not
# among them, since it says nothing about the image.
_BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UndecodableImageError(HardmoeError):
    """Bytes that are no usable image; the message is a short reason."""


def content_id(data: bytes) -> bytes:
    """The 16 bytes that name an example by its content: the head of the SHA-256 of the encoded image."""
    return hashlib.sha256(data).digest()[:16]


class _QuietPillow:
    """Silences Pillow's warnings while any thread decodes.

    `warnings.catch_warnings` restores a global list, so two threads that overlap would leave each other's filters behind;
    hence the first one in sets the filter and the last one out restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved = warnings.catch_warnings()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._saved.__exit__(None, None, None)


_quiet_pillow = _QuietPillow()


@cache
def _known_formats() -> tuple[str, ...]:
    """The formats we accept that this build of Pillow can name; asking it for another one is a KeyError."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise UndecodableImageError(f"{image.width} x {image.height} pixels, more than dataset.max_pixels={max_pixels}")


def _load(data: bytes, max_pixels: int) -> Image.Image:
    """The first frame as Pillow decodes it, in the file's own mode."""
    try:
        image = Image.open(io.BytesIO(data), formats=_known_formats())
        _check_pixels(image, max_pixels)
        image.load()
    except UnidentifiedImageError as error:
        raise UndecodableImageError(f"not an image in a known format ({', '.join(_known_formats())})") from error
    except Image.DecompressionBombError as error:
        raise UndecodableImageError(f"far more pixels than dataset.max_pixels={max_pixels}") from error
    except _BROKEN as error:
        raise UndecodableImageError(f"broken image ({type(error).__name__}: {error})") from error
    # The size in a container's header is only a claim; an icon file's frame may be larger.
    _check_pixels(image, max_pixels)
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _BROKEN:
        return image  # broken metadata does not cost a picture
    operation = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if operation is None else image.transpose(operation)


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Pillow clips grey values above 255; these are scaled, 65535 to 255."""
    grey_HW = np.asarray(image).astype(np.int64)
    if grey_HW.min() < 0 or grey_HW.max() > 65535:
        raise UndecodableImageError("32-bit integer pixels, which have no defined brightness; save it with 8 or 16 bits")
    return Image.fromarray(((grey_HW + 128) // 257).astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UndecodableImageError("floating-point pixels, which have no defined brightness; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        return _from_16_bits(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # has only one conversion
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def decode(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """Decode an image, upright, alpha over white, the first frame of an animation.

    Args:
        data: the encoded file.
        max_pixels: larger images are refused before their pixels are decoded.

    Returns:
        uint8 [H, W, 3], writable.

    Raises:
        UndecodableImageError: empty, broken, truncated, too large or without a defined brightness.
    """
    if not data:
        raise UndecodableImageError("empty file")
    with _quiet_pillow():
        image = _upright(_load(data, max_pixels))
        try:
            return np.array(_to_rgb(image))
        except (OSError, ValueError) as error:  # a palette or mode that Pillow opens and cannot convert
            raise UndecodableImageError(f"cannot be converted to RGB ({error})") from error


def resize_square(image_HW3: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Fit an image into a square: the central square of its shorter side, resized by antialiased bilinear filtering.

    Cropping comes first: scaling the whole of a 1 x 100,000 strip would need gigabytes for pixels that are cut off.

    Args:
        image_HW3: uint8 [H, W, 3].
        size: side of the result in pixels.

    Returns:
        uint8 [3, size, size], contiguous.
    """
    height, width, _ = image_HW3.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square_HW3 = image_HW3[top : top + side, left : left + side]
    if side != size:
        square = Image.fromarray(np.ascontiguousarray(square_HW3))
        square_HW3 = np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))
    # np.array copies: the result never shares memory with the argument, whichever path was taken.
    return np.array(square_HW3.transpose(2, 0, 1), order="C")


def encode_png(image_HW3: NDArray[np.uint8]) -> bytes:
    """Encode uint8 [H, W, 3] as PNG; the same pixels give the same bytes with the same Pillow and zlib."""
    target = io.BytesIO()
    Image.fromarray(image_HW3).save(target, format="PNG", compress_level=6)
    return target.getvalue()


def thumbnail_data_uri(data: bytes, size: int) -> str:
    """An encoded image as a `data:image/png;base64,…` square of `size` pixels, for pages without other files.

    Raises:
        UndecodableImageError: as `decode` does.
    """
    # The dataset stage has held the image against the recipe's own limit, which may be above the default.
    pixels_3SS = resize_square(decode(data, PILLOW_MAX_PIXELS), size)
    png = encode_png(np.ascontiguousarray(pixels_3SS.transpose(1, 2, 0)))
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
