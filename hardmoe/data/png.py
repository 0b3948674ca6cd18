"""PNG: small drawings written without Pillow, and files made sound before Pillow sees them.

Pillow does not check the checksum of the pixel data and stops reading before the one inside them, so 12 % of flipped bits in
a small picture with alpha came through as another picture. It checks those of comments, and refuses a picture for a broken
or an overlong one, which libpng does not. Hence: what the pixels depend on must be sound, and everything else is dropped
where it is not. Rejected: torchvision's decoder, whose process dies of some of these files.
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hardmoe.data.undecodable import UndecodableImageError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def write_drawing(image_HW3: NDArray[np.uint8]) -> bytes:
    """Encode a drawing, uint8 [H, W, 3], as PNG; the same pixels give the same bytes with the same zlib.

    Rows are not filtered, which suits flat colours, and Pillow's way to the same takes three times as long for 32 pixels.
    """
    height, width, _ = image_HW3.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)
    rows[:, 1:] = image_HW3.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows.tobytes())) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def sound_png(data: bytes) -> bytes:
    """The file without its unsound metadata: the same object where there are none.

    Raises:
        UndecodableImageError: the checksum of a chunk that the pixels depend on is wrong.
    """
    unsound: list[tuple[int, int]] = []
    for kind, start, stop in _chunks(data):
        if _is_sound(data, start, stop):
            continue
        if kind in _NEEDED or kind[0:1].isupper():
            raise UndecodableImageError(f"broken image (wrong checksum in its {kind.decode('latin-1')} chunk)")
        unsound.append((start, stop))
    return _without(data, unsound)


def bare_png(data: bytes) -> bytes:
    """The file with nothing in it that the pixels do not depend on."""
    return _without(data, [(start, stop) for kind, start, stop in _chunks(data) if kind not in _NEEDED])


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type and bounds of every whole chunk up to the end of the picture; what follows a chunk that is cut off is Pillow's."""
    start = len(SIGNATURE)
    while start + 12 <= len(data):
        stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if stop > len(data):
            return
        kind = data[start + 4 : start + 8]
        yield kind, start, stop
        if kind == b"IEND":
            return
        start = stop


def _is_sound(data: bytes, start: int, stop: int) -> bool:
    return zlib.crc32(memoryview(data)[start + 4 : stop - 4]) == int.from_bytes(data[stop - 4 : stop], "big")


def _without(data: bytes, bounds: list[tuple[int, int]]) -> bytes:
    if not bounds:
        return data
    starts, stops = [0, *(stop for _, stop in bounds)], [*(start for start, _ in bounds), len(data)]
    return b"".join(data[start:stop] for start, stop in zip(starts, stops, strict=True))
