"""Which decoder reads which file, and what its pixels mean: any raster image to red, green and blue, upright.

JPEG goes to libjpeg-turbo itself (`jpeg.py`), everything else to Pillow. Whatever Pillow throws at hostile or broken bytes
becomes one exception with a short reason, so a bad row can be quarantined and counted. Only raster formats are opened: Pillow
would hand PostScript to an external interpreter. Rejected: torchvision's decoders, which know fewer formats, ignore CMYK,
16-bit and alpha, and crash on some broken files; setting `Image.MAX_IMAGE_PIXELS`, a global of the host process.

Shape letters: H height, W width, 3 the channels red, green, blue.
"""

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

from hardmoe.data import jpeg, png
from hardmoe.data.jpeg import check_pixels
from hardmoe.data.undecodable import UndecodableImageError

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


def read_pixels(data: bytes, max_pixels: int, at_least: int | None = None) -> NDArray[np.uint8]:
    """Decode an image, upright, alpha over white, the first frame of an animation.

    Args:
        data: the encoded file.
        max_pixels: larger images are refused before their pixels are decoded.
        at_least: a JPEG may come out 2, 4 or 8 times smaller if its shorter side keeps this many pixels.

    Returns:
        uint8 [H, W, 3]; maybe a read-only or strided view.

    Raises:
        UndecodableImageError: empty, broken, truncated, too large or without a defined brightness.
    """
    if not data:
        raise UndecodableImageError("empty file")
    pixels_HW3 = None
    if data.startswith(jpeg.SIGNATURE):
        header = jpeg.read_header(data)
        pixels_HW3 = jpeg.decode_jpeg(data, header, max_pixels, at_least)
        if pixels_HW3 is not None and not header.metadata:
            return pixels_HW3
    with _quiet_pillow():
        if pixels_HW3 is not None:
            return _upright(pixels_HW3, _jpeg_orientation(data))
        image = _load_png(data, max_pixels) if data.startswith(png.SIGNATURE) else _load(data, max_pixels)
        try:
            return _upright(np.asarray(_to_rgb(image)), _orientation(image))
        except (OSError, ValueError) as error:  # a palette or mode that Pillow opens and cannot convert
            raise UndecodableImageError(f"cannot be converted to RGB ({error})") from error


def pixels_of_pillow(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels of an image that Pillow has opened, as `read_pixels` would give them, uint8 [H, W, 3].

    Raises:
        UndecodableImageError: it is broken, or without a defined brightness.
    """
    with _quiet_pillow():
        try:
            return _upright(np.asarray(_to_rgb(image)), _orientation(image))
        except _BROKEN as error:
            raise UndecodableImageError(f"broken image ({type(error).__name__}: {error})") from error


@cache
def _known_formats() -> tuple[str, ...]:
    """The formats we accept that this build of Pillow can name; asking it for another one is a KeyError."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _load(data: bytes, max_pixels: int) -> Image.Image:
    """The first frame as Pillow decodes it, in the file's own mode."""
    try:
        image = Image.open(io.BytesIO(data), formats=_known_formats())
        check_pixels(image.width, image.height, max_pixels)
        image.load()
    except UnidentifiedImageError as error:
        raise UndecodableImageError(f"not an image in a known format ({', '.join(_known_formats())})") from error
    except Image.DecompressionBombError as error:
        raise UndecodableImageError(f"far more pixels than dataset.max_pixels={max_pixels}") from error
    except _BROKEN as error:
        raise UndecodableImageError(f"broken image ({type(error).__name__}: {error})") from error
    # The size in a container's header is only a claim; an icon file's frame may be larger.
    check_pixels(image.width, image.height, max_pixels)
    return image


def _load_png(data: bytes, max_pixels: int) -> Image.Image:
    sound = png.sound_png(data)
    try:
        return _load(sound, max_pixels)
    except UndecodableImageError:
        bare = png.bare_png(sound)
        if len(bare) == len(sound):
            raise
    return _load(bare, max_pixels)


def _orientation(image: Image.Image) -> int:
    """EXIF's number from 1, upright, to 8; broken metadata do not cost a picture."""
    try:
        number = image.getexif().get(_ORIENTATION_TAG)
    except _BROKEN:
        return 1
    return number if isinstance(number, int) else 1


def _jpeg_orientation(data: bytes) -> int:
    try:
        return _orientation(Image.open(io.BytesIO(data), formats=("JPEG",)))
    except _BROKEN:
        return 1


def _upright(pixels_HW3: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn and mirror as EXIF's orientation says, without copying."""
    match orientation:
        case 2:
            return pixels_HW3[:, ::-1]
        case 3:
            return pixels_HW3[::-1, ::-1]
        case 4:
            return pixels_HW3[::-1]
        case 5:
            return pixels_HW3.swapaxes(0, 1)
        case 6:
            return pixels_HW3[::-1].swapaxes(0, 1)
        case 7:
            return pixels_HW3[::-1, ::-1].swapaxes(0, 1)
        case 8:
            return pixels_HW3[:, ::-1].swapaxes(0, 1)
    return pixels_HW3


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
