"""Hostile files of the formats without checksums, and files that are no images at all.

Reference: construction from known pixels by lossless coding, wherever there is one. What a turned bit makes of a format without
checksums is another valid picture as often as not, so there the only claim is that no harm is done.
"""

import gzip
import io
import struct
import zipfile
from collections.abc import Iterator

import numpy as np
from hostile_base import (
    HostileImage,
    Pixels,
    cut,
    decodes,
    either,
    flipped,
    grey_as_rgb,
    over_white,
    picture,
    refused,
    saved,
)
from hostile_jpeg import grey_jpeg, turn
from PIL import Image

FLIPS = 14
NO_CHECKSUM = "the format has no checksum, so another picture is as good an answer as none"


def other_images() -> Iterator[HostileImage]:
    """All of them."""
    for number, (name, data, pixels, tolerance) in enumerate(_sound()):
        yield decodes(f"{name}/whole", data, pixels, "a sound file", tolerance)
        for length, short in cut(data[:-24], 12):  # the last bytes may be padding
            if name.endswith(("animated", "pages")):
                yield either(f"{name}/cut-at-{length}", short, "the first of its pictures may be whole")
            else:
                yield refused(f"{name}/cut-at-{length}", short, "pixel data are missing")
        for count, (at, damaged) in enumerate(flipped(data, FLIPS, number)):
            yield either(f"{name}/flip-{count}-at-{at}", damaged, NO_CHECKSUM)
        if not name.startswith(("tiff", "avif", "jpeg2000", "ico", "ppm/ascii")):
            yield decodes(
                f"{name}/trailing", data + b"\x00garbage" * 50, pixels, "what follows the end does not count", tolerance
            )
        yield refused(f"{name}/leading", b"garbage!" + data, "it does not begin like any image")
    yield from _gif()
    yield from _tiff()
    yield from _icons()
    yield from _no_images()


def _sound() -> Iterator[tuple[str, bytes, Pixels, int]]:
    """Name, file, pixels, tolerance."""
    colour, grey, alpha = picture(29, 37), picture(29, 37)[..., 0], picture(29, 37, seed=1)[..., 1]
    seen = over_white(colour, alpha)
    table = Image.fromarray(colour).quantize(32)
    few = np.array(table.convert("RGB"))
    bilevel = Image.fromarray(grey).convert("1")
    black_white = grey_as_rgb(np.asarray(bilevel).astype(np.uint8) * np.uint8(255))
    rgba = Image.fromarray(np.dstack([colour, alpha]))
    inks = np.dstack([colour, grey // 3])
    paper = np.rint((255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255).astype(np.uint8)
    frames = [Image.fromarray(picture(29, 37, seed)) for seed in (7, 8, 9)]
    fine = grey.astype(np.uint16) * 257
    yield "gif/palette", saved(table, "GIF"), few, 0
    yield "gif/interlaced", saved(table, "GIF", interlace=1), few, 0
    yield "gif/animated", saved(table, "GIF", save_all=True, append_images=[f.quantize(32) for f in frames]), few, 0
    yield "webp/lossless", saved(colour, "WEBP", lossless=True), colour, 0
    yield "webp/lossless-alpha", saved(rgba, "WEBP", lossless=True, exact=True), seen, 1
    lossless = {"lossless": True, "save_all": True, "duration": 40}
    yield "webp/animated", saved(frames[0], "WEBP", append_images=frames[1:], **lossless), picture(29, 37, 7), 0
    for name, compression in {"raw": None, "lzw": "tiff_lzw", "deflate": "tiff_adobe_deflate", "packbits": "packbits"}.items():
        yield f"tiff/rgb-{name}", saved(colour, "TIFF", compression=compression), colour, 0
    yield "tiff/bilevel-group4", saved(bilevel, "TIFF", compression="group4"), black_white, 0
    yield "tiff/rgba", saved(rgba, "TIFF"), seen, 1
    yield "tiff/palette", saved(table, "TIFF"), few, 0
    yield "tiff/cmyk", saved(Image.fromarray(inks, mode="CMYK"), "TIFF"), paper, 1
    yield "tiff/grey16", saved(Image.fromarray(fine), "TIFF"), grey_as_rgb(grey), 0
    yield "tiff/pages", saved(frames[0], "TIFF", save_all=True, append_images=frames[1:]), picture(29, 37, 7), 0
    yield "tiff/tiled", tiled_tiff(picture(32, 48)), picture(32, 48), 0
    for name, image, expected in (("rgb", colour, colour), ("grey", grey, grey_as_rgb(grey)), ("palette", table, few)):
        yield f"bmp/{name}", saved(image, "BMP"), expected, 0
    yield "bmp/bilevel", saved(bilevel, "BMP"), black_white, 0
    yield "bmp/top-down", _top_down_bmp(colour), colour, 0
    yield "bmp/555", *_bmp_555(colour), 0
    yield "ppm/rgb", saved(colour, "PPM"), colour, 0
    yield "ppm/grey16", b"P5 37 29 65535\n" + fine.astype(">u2").tobytes(), grey_as_rgb(grey), 0
    yield "ppm/ascii", _ascii_ppm(colour), colour, 0
    yield "ico/png", saved(colour[:29, :29], "ICO", sizes=[(29, 29)]), colour[:29, :29], 0
    yield "jpeg2000/lossless", saved(colour, "JPEG2000", irreversible=False), colour, 0
    yield "avif/high-quality", saved(picture(32, 48), "AVIF", quality=100, subsampling="4:4:4"), picture(32, 48), 6


def _gif() -> Iterator[HostileImage]:
    head = b"GIF89a" + struct.pack("<HHBBB", 8, 6, 0x80, 0, 0) + bytes([255, 0, 0, 0, 0, 255])
    frame = b"," + struct.pack("<HHHHB", 0, 0, 8, 6, 0) + b"\x02" + _gif_codes(48) + b"\x00"
    red = np.tile(np.array([255, 0, 0], np.uint8), (6, 8, 1))
    yield decodes("gif/by-hand", head + frame + b";", red, "a sound file")
    yield decodes("gif/without-trailer", head + frame, red, "all of the picture is there")
    yield refused("gif/no-frames", head + b";", "there is no picture in it")
    yield refused("gif/header-only", head, "there is no picture in it")
    yield refused("gif/signature-only", b"GIF89a", "there is no picture in it")
    for what, bounds in {
        "outside": (5, 5, 8, 6),
        "far-outside": (6000, 6000, 8, 6),
        "larger": (0, 0, 800, 600),
        "empty": (0, 0, 0, 0),
    }.items():
        odd = b"," + struct.pack("<HHHHB", *bounds, 0) + frame[10:]
        yield either(f"gif/frame-{what}", head + odd + b";", "how much of a frame beyond the canvas to show is open")
    wide = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + head[13:]
    yield refused("gif/65535x65535", wide + frame + b";", "too many pixels")
    comment = b"\x21\xfe" + b"".join(b"\xff" + b"x" * 255 for _ in range(2000)) + b"\x00"
    yield decodes("gif/long-comment", head + comment + frame + b";", red, "510 kB of comment")
    clear = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    clear.putpalette([10, 20, 30, 40, 50, 60])
    expected = np.array([[[10, 20, 30], [255] * 3], [[255] * 3, [10, 20, 30]]], np.uint8)
    yield decodes("gif/transparent", saved(clear, "GIF", transparency=1), expected, "transparent is white")


def _gif_codes(count: int) -> bytes:
    """The colour 0 so many times, with a code of three bits for each and the table cleared every two, so that it stays so."""
    codes = [code for _ in range(count // 2) for code in (4, 0, 0)] + [5]
    value = sum(code << (3 * place) for place, code in enumerate(codes))
    data = value.to_bytes((3 * len(codes) + 7) // 8, "little")
    return b"".join(bytes([len(part)]) + part for part in (data[at : at + 255] for at in range(0, len(data), 255)))


def tiff(entries: dict[int, tuple[int, int, bytes]], body: bytes, following: int = 0) -> bytes:
    """A little-endian file: `body` from byte 8 on, then one directory of tag -> (type, count, four bytes of value)."""
    at = 8 + len(body)
    rows = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, (kind, count, value) in sorted(entries.items()))
    return b"II*\x00" + struct.pack("<I", at) + body + struct.pack("<H", len(entries)) + rows + struct.pack("<I", following)


def _long(value: int) -> tuple[int, int, bytes]:
    return 4, 1, struct.pack("<I", value)


def _grey_entries(width: int, height: int, bits: int = 8) -> dict[int, tuple[int, int, bytes]]:
    """A directory of a grey picture in one strip right behind the file's header."""
    numbers = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: width * height * bits // 8}
    return {tag: _long(value) for tag, value in numbers.items()}


def tiled_tiff(pixels: Pixels) -> bytes:
    """Tiles of 16 x 16, uncompressed; the sides must be multiples of 16."""
    height, width, _ = pixels.shape
    tiles = [pixels[y : y + 16, x : x + 16].tobytes() for y in range(0, height, 16) for x in range(0, width, 16)]
    count, data = len(tiles), b"".join(tiles)
    offsets = struct.pack(f"<{count}I", *(8 + 768 * n for n in range(count)))
    sizes = struct.pack(f"<{count}I", *[768] * count)
    bits = struct.pack("<3H", 8, 8, 8)
    at = 8 + len(data)
    numbers = {256: width, 257: height, 259: 1, 262: 2, 277: 3, 322: 16, 323: 16}
    entries = {tag: _long(value) for tag, value in numbers.items()}
    entries[324] = (4, count, struct.pack("<I", at))
    entries[325] = (4, count, struct.pack("<I", at + len(offsets)))
    entries[258] = (3, 3, struct.pack("<I", at + len(offsets) + len(sizes)))
    return tiff(entries, data + offsets + sizes + bits)


def _tiff() -> Iterator[HostileImage]:
    grey = picture(6, 8)[..., 0]
    entries, body = _grey_entries(8, 6), grey.tobytes()
    good, rgb = tiff(entries, body), grey_as_rgb(grey)
    yield decodes("tiff/by-hand", good, rgb, "a sound file")
    yield decodes(
        "tiff/directory-loop", tiff(entries, body, following=8 + len(body)), rgb, "the second page is the first one again"
    )
    yield decodes("tiff/next-page-nowhere", tiff(entries, body, following=2**31), rgb, "the first page is there")
    yield refused("tiff/directory-nowhere", good[:4] + struct.pack("<I", 2**31) + good[8:], "there is no directory")
    yield refused("tiff/directory-in-header", good[:4] + struct.pack("<I", 0) + good[8:], "there is no directory")
    yield refused("tiff/strip-nowhere", tiff({**entries, 273: _long(2**31)}, body), "its pixels lie behind its end")
    yield refused("tiff/strip-too-short", tiff({**entries, 257: _long(600), 278: _long(600)}, body), "most rows are missing")
    yield refused("tiff/50000x50000", tiff({**entries, 256: _long(50_000), 257: _long(50_000)}, body), "too many pixels")
    yield refused("tiff/0x6", tiff({**entries, 256: _long(0)}, body), "it has no width")
    yield refused("tiff/compression-12345", tiff({**entries, 259: _long(12345)}, body), "an unknown coding")
    yield refused("tiff/no-entries", tiff({}, body), "an empty directory")
    many = tiff({**entries, 273: (4, 2**30, struct.pack("<I", 8))}, body)
    yield either("tiff/a-milliard-strips", many, "a count that no file could hold")
    for name, array in {
        "float32": grey.astype(np.float32),
        "int32": np.full((6, 8), 70_000, np.int32),
        "negative": np.full((6, 8), -5, np.int32),
    }.items():
        yield refused(f"tiff/{name}", saved(Image.fromarray(array), "TIFF"), "its values have no defined brightness")
    signed = {**_grey_entries(8, 6, 16), 339: _long(2)}
    yield refused(
        "tiff/int16-negative", tiff(signed, np.full((6, 8), -5, "<i2").tobytes()), "its values have no defined brightness"
    )
    double = {**_grey_entries(8, 6, 64), 339: _long(3)}
    yield refused("tiff/float64", tiff(double, np.zeros((6, 8)).tobytes()), "its values have no defined brightness")
    for orientation in range(1, 9):
        turned = tiff({**entries, 274: _long(orientation)}, body)
        yield decodes(f"tiff/orientation-{orientation}", turned, turn(rgb, orientation), "turned as its directory says")


def _top_down_bmp(pixels: Pixels) -> bytes:
    height, width, _ = pixels.shape
    rows = b"".join(row[:, ::-1].tobytes().ljust(-(-3 * width // 4) * 4, b"\0") for row in pixels)
    info = struct.pack("<IiiHHIIiiII", 40, width, -height, 1, 24, 0, len(rows), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(rows), 0, 0, 54) + info + rows


def _bmp_555(pixels: Pixels) -> tuple[bytes, Pixels]:
    five = (pixels >> 3).astype(np.uint16)
    height, width, _ = pixels.shape
    words = five[..., 0] << 10 | five[..., 1] << 5 | five[..., 2]
    rows = b"".join(row.astype("<u2").tobytes().ljust(-(-2 * width // 4) * 4, b"\0") for row in words[::-1])
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 16, 0, len(rows), 0, 0, 0, 0)
    data = b"BM" + struct.pack("<IHHI", 54 + len(rows), 0, 0, 54) + info + rows
    return data, (five.astype(np.float64) * 255 / 31).astype(np.uint8)


def _ascii_ppm(pixels: Pixels) -> bytes:
    height, width, _ = pixels.shape
    return f"P3 {width} {height} 255\n".encode() + b" ".join(str(value).encode() for value in pixels.reshape(-1).tolist()) + b"\n"


def _icons() -> Iterator[HostileImage]:
    inside = picture(40, 40)
    png = saved(inside, "PNG")

    def icon(width: int, height: int, body: bytes, count: int = 1, offset: int = 22) -> bytes:
        return struct.pack("<HHH", 0, 1, count) + struct.pack("<BBBBHHII", width, height, 0, 0, 1, 32, len(body), offset) + body

    yield decodes("ico/png-of-its-size", icon(40, 40, png), inside, "a sound file")
    yield decodes("ico/png-of-another-size", icon(16, 16, png), inside, "the picture decides, not the directory's claim")
    huge = png[:16] + struct.pack(">II", 60_000, 60_000) + png[24:]
    yield refused("ico/png-of-60000x60000", icon(16, 16, huge), "too many pixels, and a wrong checksum")
    yield refused("ico/empty", icon(16, 16, b""), "there is no picture in it")
    yield refused("ico/nowhere", icon(16, 16, png, offset=2**31), "its picture lies behind its end")
    yield refused("ico/no-entries", struct.pack("<HHH", 0, 1, 0), "there is no picture in it")
    yield refused("ico/jpeg-inside", icon(16, 16, grey_jpeg()[0]), "icons hold PNG or BMP")
    yield refused("ico/many-claimed", icon(16, 16, png, count=65535)[:30], "the directory is cut off")


def _no_images() -> Iterator[HostileImage]:
    yield refused("nothing", b"", "an empty file")
    for value in range(0, 256, 5):
        yield refused(f"one-byte-{value}", bytes([value]), "one byte")
    jpeg, expected = grey_jpeg()
    page = io.BytesIO()
    with zipfile.ZipFile(page, "w") as archive:
        archive.writestr(zipfile.ZipInfo("picture.jpg", (2020, 1, 1, 0, 0, 0)), jpeg)
    yield decodes("wrong-extension.png", jpeg, expected, "content decides, not the name")
    texts = {
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "json": b'{"error": "rate limit exceeded"}',
        "text": b"photo unavailable\n" * 40,
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>',
        "xml": b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>',
        "pdf": b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\ntrailer << /Root 1 0 R >>\n%%EOF",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\nshowpage\n",
        "zip": page.getvalue(),
        "gzip": gzip.compress(jpeg, mtime=0),
        "base64": b"data:image/jpeg;base64,/9j/4AAQSkZJRgABAQAAAQABAAD/2wBD",
        "mp4": b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2avc1mp41" + bytes(300),
        "heic": b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(300),
        "riff-sound": b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(30),
        "webp-header": b"RIFF\x24\x00\x00\x00WEBP",
        "elf": b"\x7fELF\x02\x01\x01" + bytes(300),
        "photoshop": b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(12),
        "byte-order-mark": b"\xef\xbb\xbf" + jpeg,
        "utf-16": "photo".encode("utf-16"),
        "jpeg-start": b"\xff\xd8",
        "jpeg-start-3": b"\xff\xd8\xff",
        "jpeg-start-end": b"\xff\xd8\xff\xd9",
        "jpeg-tables-only": b"\xff\xd8\xff\xdb\x00\x43\x00" + bytes(range(1, 65)) + b"\xff\xd9",
        "bmp-header": b"BM" + bytes(12),
        "tiff-header": b"II*\x00",
        "bigtiff-header": b"II+\x00\x08\x00\x00\x00",
        "ppm-header": b"P6 9 9 255\n",
        "ppm-endless-comment": b"P6\n#" + b"x" * 200_000,
        "ppm-huge": b"P6 99999 99999 255\n" + bytes(1000),
        "zeros": bytes(20_000),
        "ones": b"\xff" * 20_000,
    }
    for name, data in texts.items():
        yield refused(f"no-image/{name}", data, "not a raster image, or nothing but its beginning")
    rng = np.random.default_rng(11)
    for number in range(60):
        yield refused(f"no-image/random-{number}", b"\x00\x01" + rng.bytes(int(rng.integers(1, 4000))), "random bytes")
    for number, head in enumerate(
        (b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\xff\x0f\0\0WEBPVP8 ", b"II*\0", b"BM", b"P6 9 9 255\n")
    ):
        for repeat in range(8):
            size = 200 if head.startswith(b"P6") else 3000
            yield refused(f"no-image/begins-{number}-{repeat}", head + rng.bytes(size), "random bytes behind a true beginning")
