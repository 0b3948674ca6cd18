"""JPEG by libjpeg-turbo directly, which is faster than through Pillow and says when it had to make pixels up.

Pillow drops libjpeg's warnings: where the coded data break off or hold an impossible code, the rest of the picture is grey
and nobody is told. Here such a file is refused. Kept are files whose data are followed by bytes that belong to nothing, since
every pixel of theirs came from a valid code: drones, scanners and web cameras write such files by the hundred thousand. The
price, accepted: JPEG has no checksum, and most single flipped bits leave valid codes, hence another picture and no trace but
such left-over bytes. The pixels are those of Pillow bit by bit (both are libjpeg-turbo with the same settings), for 71 % of
its time. Rejected: torchvision's decoder, which also drops the warnings; refusing every warning, which would throw out all
pictures of some cameras for damage that is much rarer than they are.

Shape letters: H height, W width, 3 the channels red, green, blue.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from hardmoe.data.undecodable import UndecodableImageError

SIGNATURE = b"\xff\xd8\xff"
MAX_SCANS = 100
"""A progressive file needs about 10 and never more than some 60; each one costs a pass over all pixels, however few its bytes."""

_MADE_UP = re.compile(r"Corrupt JPEG data: (?!\d+ extraneous)|Premature end of JPEG")
_START_OF_SCAN, _END_OF_IMAGE, _TEMPORARY, _METADATA = 0xDA, 0xD9, 0x01, 0xE1
_SEQUENTIAL = (0xC0, 0xC1)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
# Inside coded data 0xff is followed by 0 (stuffing), by a restart marker, or by another 0xff (fill).
_MARKER_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


@dataclass(frozen=True)
class Header:
    """What the segments in front of the first coded data say."""

    one_scan: bool
    """Whether the first scan holds the whole picture, so that the decoder stops behind it; true of nearly every file."""
    metadata: bool
    """Whether there may be EXIF or XMP, in which a camera says how it was held."""


def read_header(data: bytes) -> Header:
    """Walk through the segments of a file that begins with `SIGNATURE`, once."""
    sequential = metadata = False
    components = b""
    for marker, at in _segments(data):
        if marker == _START_OF_SCAN:
            return Header(sequential and data[at + 4 : at + 5] == components, metadata)
        metadata |= marker == _METADATA
        if marker in _FRAMES:
            sequential, components = marker in _SEQUENTIAL, data[at + 9 : at + 10]
    return Header(one_scan=False, metadata=metadata)


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuse an image that is too large.

    Raises:
        UndecodableImageError: it has more than `max_pixels`.
    """
    if width * height > max_pixels:
        raise UndecodableImageError(f"{width} x {height} pixels, more than dataset.max_pixels={max_pixels}")


def decode_jpeg(data: bytes, header: Header, max_pixels: int, at_least: int | None = None) -> NDArray[np.uint8] | None:
    """Decode a file that begins with `SIGNATURE`.

    Args:
        data: the encoded file.
        header: of this file.
        max_pixels: larger images are refused before their pixels are decoded.
        at_least: the picture may come out 2, 4 or 8 times smaller if its shorter side keeps this many pixels.

    Returns:
        uint8 [H, W, 3], not turned upright; None for the rare kinds that are Pillow's (CMYK, odd subsampling), or that only
        Pillow can explain.

    Raises:
        UndecodableImageError: too large, or parts of the picture are missing.
    """
    if not header.one_scan and _too_many_scans(data):
        raise UndecodableImageError(f"a JPEG of more than {MAX_SCANS} scans, which is made to take long")
    try:
        height, width, colours, _ = cast("tuple[int, int, str, str]", simplejpeg.decode_jpeg_header(data, strict=False))
    except (ValueError, KeyError):  # a KeyError is how it says that it has no name for the subsampling
        return None
    check_pixels(width, height, max_pixels)
    if colours in ("CMYK", "YCCK"):
        _decode(data, colorspace="CMYK")  # for its complaints alone; what the inks mean is Pillow's business
        return None
    if at_least is None or (divisor := _divisor(min(height, width), at_least)) == 1:
        return _decode(data)
    return _decode(data, min_height=-(-height // divisor), min_width=-(-width // divisor))


def _divisor(shorter: int, at_least: int) -> int:
    return next((divisor for divisor in (8, 4, 2) if -(-shorter // divisor) >= at_least), 1)


def _decode(data: bytes, **options: Any) -> NDArray[np.uint8] | None:
    try:
        return cast("NDArray[np.uint8]", simplejpeg.decode_jpeg(data, **options))
    except ValueError as error:
        # Of several complaints only the last is heard, and "left-over bytes" may follow "the file has ended".
        if _MADE_UP.match(str(error)) or all(marker != _END_OF_IMAGE for marker, _ in _segments(data)):
            raise UndecodableImageError(f"broken image ({error})") from error
    try:
        return cast("NDArray[np.uint8]", simplejpeg.decode_jpeg(data, strict=False, **options))
    except ValueError:
        return None


def _too_many_scans(data: bytes) -> bool:
    # Bytes that look like a marker are counted first; only then is the file walked through.
    return data.count(b"\xff\xda") > MAX_SCANS and sum(marker == _START_OF_SCAN for marker, _ in _segments(data)) > MAX_SCANS


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and place of the first picture's segments up to its end, without a preview or a film in or behind the file."""
    # Written for speed, as it runs for every image that is read: the bytes between are only searched where there are some.
    at, size = 2, len(data)
    while at + 2 <= size:
        if data[at] != 0xFF:
            if (at := data.find(b"\xff", at)) < 0:
                return
            continue
        marker = data[at + 1]
        if marker in (0x00, 0xFF):  # a byte that belongs to nothing; fill
            at += 1
            continue
        yield marker, at
        if marker == _END_OF_IMAGE:
            return
        at += 2
        if marker == _TEMPORARY or 0xD0 <= marker <= 0xD7:
            continue
        if at + 2 > size:
            return
        at += data[at] << 8 | data[at + 1]
        if marker == _START_OF_SCAN:
            found = _MARKER_AFTER_SCAN.search(data, at)
            at = found.start() if found else len(data)
