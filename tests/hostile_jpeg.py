"""Hostile JPEG files.

Reference: libjpeg-turbo's own strict mode says whether anything was made up (its warnings, taken straight from it), and
Pillow's separate build of the library gives the pixels. Our decoder must refuse what strict mode says is incomplete, and must
read the rest with those pixels.
"""

import io
from collections.abc import Iterator

import numpy as np
import simplejpeg
from hostile_base import MAX_PIXELS, HostileImage, Pixels, decodes, either, evenly, flipped, grey_as_rgb, picture, refused, saved
from PIL import Image

FLIPS = 62
_INCOMPLETE = ("premature end", "bad huffman", "found marker", "bad arithmetic")


def jpeg_images() -> Iterator[HostileImage]:
    """All of them."""
    variants = _variants()
    for number, (name, data) in enumerate(variants.items()):
        yield judged(f"jpeg/{name}/whole", data, "a sound file")
        yield from _truncated(name, data)
        yield from _cut_inside(name, data)
        for count, (at, damaged) in enumerate(flipped(data, FLIPS, seed=number)):
            yield judged(f"jpeg/{name}/flip-{count}-at-{at}", damaged, "one bit turned over")
        yield from _odd_but_sound(name, data)
    yield from _restarts(variants["restart"])
    yield from _headers(variants["420"])
    yield from _orientations()
    yield from _sizes()
    yield _scan_bomb(variants["progressive"])
    yield _ycck()


def _variants() -> dict[str, bytes]:
    colour, grey = picture(), picture(41, 53)[..., 0]
    return {
        "444": saved(colour, "JPEG", quality=90, subsampling=0),
        "422": saved(colour, "JPEG", quality=85, subsampling=1),
        "420": saved(colour, "JPEG", quality=85, subsampling=2),
        "odd-size": saved(picture(37, 61), "JPEG", quality=75, subsampling=2),
        "quality-5": saved(colour, "JPEG", quality=5),
        "optimised": saved(colour, "JPEG", quality=85, optimize=True),
        "grey": saved(grey, "JPEG", quality=85),
        "progressive": saved(colour, "JPEG", quality=85, progressive=True),
        "progressive-grey": saved(grey, "JPEG", quality=90, progressive=True),
        "progressive-444": saved(picture(37, 61), "JPEG", quality=92, progressive=True, subsampling=0),
        "restart": saved(colour, "JPEG", quality=85, restart_marker_blocks=2),
        "restart-progressive": saved(colour, "JPEG", quality=85, progressive=True, restart_marker_rows=1),
        "rgb": saved(colour, "JPEG", quality=85, keep_rgb=True),
        "comment-and-exif": saved(colour, "JPEG", quality=85, comment=b"hello", exif=_exif(1)),
        "cmyk": saved(Image.fromarray(np.concatenate([colour, grey_like(colour)], 2), mode="CMYK"), "JPEG", quality=85),
    }


def grey_like(colour: Pixels) -> Pixels:
    """A fourth channel."""
    return (colour[..., :1] // 3).astype(np.uint8)


def segments(data: bytes) -> list[tuple[int, int, int]]:
    """Marker, start and end of every segment of a sound file; coded data belong to their scan's segment."""
    found, at = [(0xD8, 0, 2)], 2
    while at < len(data):
        marker = data[at + 1]
        end = at + 2 if marker == 0xD9 else at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:
            while not (data[end] == 0xFF and data[end + 1] != 0 and not 0xD0 <= data[end + 1] <= 0xD7):
                end += 1
        found.append((marker, at, end))
        at = end
    return found


def judged(name: str, data: bytes, reason: str) -> HostileImage:
    """The outcome by the reference."""
    if _claimed_pixels(data) > MAX_PIXELS:
        return refused(name, data, f"{reason}; too many pixels")
    verdict = _complaint(data)
    if any(word in verdict.lower() for word in _INCOMPLETE):
        return refused(name, data, f"{reason}; libjpeg: {verdict}")
    if verdict and b"\xff\xd9" not in data:
        return refused(name, data, f"{reason}; no end marker")
    pixels = _by_pillow(data)
    if pixels is None:
        return refused(name, data, f"{reason}; no reference reads it") if verdict else either(name, data, f"{reason}; Pillow: no")
    if verdict and "extraneous" not in verdict and not _readable(data):
        return either(name, data, f"{reason}; libjpeg-turbo's strict interface cannot judge it: {verdict}")
    return decodes(name, data, pixels, f"{reason}; every pixel comes from a valid code")


def _claimed_pixels(data: bytes) -> int:
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):
        return 0
    return height * width


def _complaint(data: bytes) -> str:
    try:
        *_, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        simplejpeg.decode_jpeg(data, "CMYK" if colours in ("CMYK", "YCCK") else "RGB")
    except (ValueError, KeyError) as error:
        return str(error)
    return ""


def _readable(data: bytes) -> bool:
    try:
        simplejpeg.decode_jpeg(data, strict=False)
    except ValueError:
        return False
    return True


def _by_pillow(data: bytes) -> Pixels | None:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "MPO")) as image:
            turned = image.getexif().get(0x0112, 1)
            pixels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, Image.DecompressionBombError):
        return None
    return pixels if turned not in range(2, 9) else turn(pixels, turned)


def turn(pixels: Pixels, orientation: int) -> Pixels:
    """EXIF's eight orientations by NumPy."""
    turns = {1: 0, 2: 0, 3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}
    turned = np.rot90(pixels, turns[orientation])
    return turned[:, ::-1] if orientation in (2, 4, 5, 7) else turned


def _truncated(name: str, data: bytes) -> Iterator[HostileImage]:
    lengths = set()
    for marker, start, end in segments(data):
        lengths |= {start + 1, start + 2, start + 3, (start + end) // 2, end - 1, end}
        if marker == 0xDA:
            header_end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
            lengths |= {header_end, header_end + 1, *evenly(header_end, end, 7)}
    for length in sorted(length for length in lengths if length < len(data)):
        yield refused(f"jpeg/{name}/cut-at-{length}", data[:length], "the file ends before its end marker")


def _cut_inside(name: str, data: bytes) -> Iterator[HostileImage]:
    """Parts are missing, but the end marker is there, so that nothing but the coded data can tell."""
    for marker, start, end in segments(data):
        if marker != 0xDA:
            continue
        first = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        for step in (0, 1, 2, 3):
            at = first + (end - first) * step // 4
            yield judged(f"jpeg/{name}/ends-early-at-{at}", data[:at] + b"\xff\xd9", "the coded data break off, end marker kept")
        middle = (first + end) // 2
        hole = data[: middle - (end - first) // 8] + data[middle + (end - first) // 8 :]
        yield judged(f"jpeg/{name}/hole-at-{middle}", hole, "a hole in the coded data")


def _odd_but_sound(name: str, data: bytes) -> Iterator[HostileImage]:
    pixels = _by_pillow(data)
    assert pixels is not None
    unread = b"\xff\xed\x00\x10" + b"nobody reads it"[:14]
    for what, odd in {
        "trailing-zeros": data + bytes(5000),
        "trailing-garbage": data + np.random.default_rng(1).bytes(3000),
        "trailing-jpeg": data + saved(picture(20, 20), "JPEG"),
        "trailing-html": data + b"<html><body>not found</body></html>",
        "junk-before-end": data[:-2] + bytes(range(1, 200)) + b"\xff\xd9",
        "zeros-before-end": data[:-2] + bytes(64) + b"\xff\xd9",
        "fill-before-end": data[:-2] + b"\xff" * 30 + b"\xff\xd9",
        "unknown-segment": data[:2] + unread + data[2:],
        "fill-between-segments": data[:2] + b"\xff" * 7 + data[2:],
        "empty-comment": data[:2] + b"\xff\xfe\x00\x02" + data[2:],
        "largest-comment": data[:2] + b"\xff\xfe\xff\xff" + b"x" * 65533 + data[2:],
    }.items():
        yield decodes(f"jpeg/{name}/{what}", odd, pixels, "all of the picture is there")
    yield refused(f"jpeg/{name}/leading-garbage", b"garbage " + data, "it does not begin like any image")
    yield refused(f"jpeg/{name}/leading-newline", b"\r\n" + data, "it does not begin like any image")


def _restarts(data: bytes) -> Iterator[HostileImage]:
    places = [at for at in range(len(data) - 1) if data[at] == 0xFF and 0xD0 <= data[at + 1] <= 0xD7]
    for at in places:
        other = bytes([0xFF, 0xD0 + (data[at + 1] + 3) % 8])
        yield judged(f"jpeg/restart/dropped-at-{at}", data[:at] + data[at + 2 :], "a restart marker is missing")
        yield judged(f"jpeg/restart/renamed-at-{at}", data[:at] + other + data[at + 2 :], "a restart marker out of turn")
        yield judged(f"jpeg/restart/twice-at-{at}", data[: at + 2] + data[at:], "a restart marker twice")


def _headers(data: bytes) -> Iterator[HostileImage]:
    """Claims in the frame's header that the data do not keep."""
    ((_, start, end),) = [segment for segment in segments(data) if segment[0] == 0xC0]
    claims = {
        "12-bit": (4, b"\x0c"),
        "16-bit": (4, b"\x10"),
        "0-bit": (4, b"\x00"),
        "height-0": (5, b"\x00\x00"),
        "width-0": (7, b"\x00\x00"),
        "height-doubled": (5, (96).to_bytes(2, "big")),
        "width-doubled": (7, (128).to_bytes(2, "big")),
        "height-halved": (5, (24).to_bytes(2, "big")),
        "65535x65535": (5, b"\xff\xff\xff\xff"),
        "65535x1525": (5, (1525).to_bytes(2, "big") + b"\xff\xff"),
        "no-components": (9, b"\x00"),
        "255-components": (9, b"\xff"),
        "sampling-0": (11, b"\x00"),
        "sampling-15": (11, b"\xff"),
        "quantisation-table-9": (12, b"\x09"),
        "lossless": (1, b"\xc3"),
        "arithmetic": (1, b"\xc9"),
        "hierarchical": (1, b"\xc5"),
        "extended": (1, b"\xc1"),
        "claims-progressive": (1, b"\xc2"),
    }
    for name, (offset, value) in claims.items():
        odd = data[: start + offset] + value + data[start + offset + len(value) :]
        yield judged(f"jpeg/header/{name}", odd, "the frame's header claims something else")
    yield judged("jpeg/header/two-frames", data[:end] + data[start:end] + data[end:], "two frame headers")
    for number, (marker, begin, stop) in enumerate(segments(data)[1:-1]):
        without = data[:begin] + data[stop:]
        yield judged(f"jpeg/header/without-{number}-{marker:02x}", without, "a segment is missing")
        for length in (0, 1, 2, 3, 0xFFFF):
            odd = data[: begin + 2] + length.to_bytes(2, "big") + data[begin + 4 :]
            yield judged(f"jpeg/header/length-{length}-of-{number}-{marker:02x}", odd, "a segment of a wrong length")


def _exif(orientation: int, order: str = "MM") -> bytes:
    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, "big" if order == "MM" else "little")

    value = number(orientation, 2) + bytes(2)
    entry = number(0x0112, 2) + number(3, 2) + number(1, 4) + value
    return b"Exif\x00\x00" + order.encode() + number(42, 2) + number(8, 4) + number(1, 2) + entry + number(0, 4)


def _orientations() -> Iterator[HostileImage]:
    colour = picture()
    upright = _by_pillow(saved(colour, "JPEG", quality=90))
    assert upright is not None
    for order in ("MM", "II"):
        for orientation in range(10):
            data = saved(colour, "JPEG", quality=90, exif=_exif(orientation, order))
            expected = turn(upright, orientation if 1 <= orientation <= 8 else 1)
            yield decodes(f"jpeg/exif/{order}-{orientation}", data, expected, "turned as its camera says, if it says anything")
    good = _exif(6)
    for length in range(6, len(good), 3):
        data = saved(colour, "JPEG", quality=90, exif=good[:length])
        yield either(
            f"jpeg/exif/cut-at-{length}", data, "how much of broken metadata to believe is open; never a reason to refuse"
        )
    for number, junk in enumerate(
        (b"Exif\x00\x00", b"Exif\x00\x00XX*\x00", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00" + bytes(60))
    ):
        data = saved(colour, "JPEG", quality=90, exif=junk)
        yield decodes(f"jpeg/exif/junk-{number}", data, upright, "broken metadata do not cost a picture")


def _sizes() -> Iterator[HostileImage]:
    for height, width in ((1, 1), (1, 2), (2, 1), (1, 20_000), (20_000, 1), (7, 9), (8, 8), (17, 16), (3, 65_000)):
        grey = picture(height, width)[..., 0]
        yield judged(f"jpeg/size/{height}x{width}", saved(grey, "JPEG", quality=50), "an odd size")
    for progressive in (False, True):
        data = saved(np.full((9000, 9000), 77, np.uint8), "JPEG", quality=30, progressive=progressive, optimize=True)
        whole = np.broadcast_to(np.uint8(_by_pillow_corner(data)), (9000, 9000, 3))
        yield decodes(f"jpeg/size/9000x9000-{progressive}", data, whole, "large, and within the limit")
    yield refused("jpeg/size/over-the-limit", saved(np.zeros((10_001, 10_000), np.uint8), "JPEG", quality=5), "too many pixels")


def _by_pillow_corner(data: bytes) -> int:
    with Image.open(io.BytesIO(data)) as image:
        return int(np.asarray(image.crop((0, 0, 1, 1)))[0, 0])


def _scan_bomb(data: bytes) -> HostileImage:
    *_, (_, start, end), _ = segments(data)
    return refused("jpeg/scan-bomb", data[:start] + data[start:end] * 3000 + data[end:], "3,000 passes over every pixel")


def _ycck() -> HostileImage:
    """Inks coded as luminance and colour; Pillow writes none, so the flag of a plain CMYK file is turned over."""
    inks = np.concatenate([picture(), grey_like(picture())], 2)
    data = saved(Image.fromarray(inks, mode="CMYK"), "JPEG", quality=95)
    planes = simplejpeg.decode_jpeg(data, "CMYK").astype(np.float64)
    y, blue, red, black = planes[..., 0], planes[..., 1] - 128, planes[..., 2] - 128, planes[..., 3]
    rgb = np.stack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue], -1)
    # YCCK holds the complement of the inks, and Adobe's files hold inverted inks: what is left over is the complement of RGB.
    paper = (255 - np.clip(rgb, 0, 255)) * black[..., None] / 255
    flag = data.index(b"Adobe") + 11
    return decodes("jpeg/ycck", data[:flag] + b"\x02" + data[flag + 1 :], np.rint(paper).astype(np.uint8), "YCCK", tolerance=3)


def grey_jpeg() -> tuple[bytes, Pixels]:
    """A small sound file and its pixels, for containers that hold one."""
    data = saved(picture(16, 16)[..., 0], "JPEG")
    with Image.open(io.BytesIO(data)) as image:
        return data, grey_as_rgb(np.array(image))
