"""Hostile PNG files.

Reference: construction. The encoder here is our own and writes every colour type, bit depth and the interlaced order from
pixels that are therefore known; the format's checksums say which damage must be noticed.
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from hostile_base import HostileImage, Pixels, cut, decodes, either, flipped, grey_as_rgb, over_white, picture, refused, saved
from numpy.typing import NDArray
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
FLIPS = 30
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row, first column, and the steps of the seven passes."""

Chunks = list[tuple[bytes, bytes]]


def chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def assembled(chunks: Chunks) -> bytes:
    """A file of these chunks."""
    return SIGNATURE + b"".join(chunk(kind, body) for kind, body in chunks)


def _rows(samples: NDArray[np.uint16], depth: int) -> list[bytes]:
    """Samples [H, W, channels] packed into rows of bytes."""
    if depth == 16:
        return [row.astype(">u2").tobytes() for row in samples]
    if depth == 8:
        return [row.astype(np.uint8).tobytes() for row in samples]
    bits = np.unpackbits(samples[..., 0].astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
    return [np.packbits(row.reshape(-1)).tobytes() for row in bits]


def _filtered(rows: list[bytes], step: int) -> bytes:
    """Rows with the filters none, sub and up in turn."""
    above, out = b"", []
    for number, row in enumerate(rows):
        line = np.frombuffer(row, np.uint8).astype(np.int16)
        left = (
            np.concatenate([np.zeros(min(step, len(line)), np.int16), line[:-step]]) if len(line) > step else np.zeros_like(line)
        )
        up = np.frombuffer(above, np.uint8).astype(np.int16) if above else np.zeros_like(line)
        kind = number % 3
        out.append(bytes([kind]) + (line - (np.zeros_like(line), left, up)[kind]).astype(np.uint8).tobytes())
        above = row
    return b"".join(out)


def png_chunks(samples: NDArray[np.uint16], kind: int, depth: int, interlaced: bool, before: Chunks) -> Chunks:
    """The chunks of a picture: samples [H, W, channels] as they are stored, `before` placed ahead of the pixel data."""
    height, width, channels = samples.shape
    step = max(1, channels * depth // 8)
    parts = [samples[y::dy, x::dx] for y, x, dy, dx in _ADAM7] if interlaced else [samples]
    stream = zlib.compress(b"".join(_filtered(_rows(part, depth), step) for part in parts if part.size), 9)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, int(interlaced))
    third = len(stream) // 3
    return [(b"IHDR", header), *before, (b"IDAT", stream[:third]), (b"IDAT", stream[third:]), (b"IEND", b"")]


def _variants() -> Iterator[tuple[str, Chunks, Pixels, int]]:
    """Name, chunks, the pixels to expect, the tolerance."""
    colour, grey, alpha = picture(29, 37), picture(29, 37)[..., 0], picture(29, 37, seed=1)[..., 1]
    fine = colour.astype(np.uint16) * 257 - 3 * (colour > 0)
    numbers = np.arange(29 * 37).reshape(29, 37) * 7 % 13
    palette = np.random.default_rng(3).integers(0, 256, (256, 3)).astype(np.uint8)
    alphas = np.random.default_rng(4).integers(0, 256, 13).astype(np.uint8)
    text: Chunks = [(b"tEXt", b"Comment\x00a picture"), (b"pHYs", bytes(9)), (b"zTXt", b"More\x00\x00" + zlib.compress(b"words"))]

    def stored(*channels: NDArray[np.integer]) -> NDArray[np.uint16]:
        return np.dstack(channels).astype(np.uint16)

    for interlaced in (False, True):
        tail = "-interlaced" if interlaced else ""
        for depth in (1, 2, 4, 8):
            levels = (numbers % (1 << depth)).astype(np.uint8)
            tones = levels * np.uint8(255 // ((1 << depth) - 1))
            yield f"grey{depth}{tail}", png_chunks(stored(levels), GREY, depth, interlaced, text), grey_as_rgb(tones), 0
            colours = palette[: 1 << depth]
            table: Chunks = [(b"PLTE", colours.tobytes())]
            yield f"palette{depth}{tail}", png_chunks(stored(levels), PALETTE, depth, interlaced, table), colours[levels], 0
            share = alphas[: 1 << depth]
            laid = over_white(colours[levels], np.append(share, np.full(256, 255, np.uint8))[levels])
            see_through: Chunks = [*table, (b"tRNS", share.tobytes())]
            chunks = png_chunks(stored(levels), PALETTE, depth, interlaced, see_through)
            yield f"palette{depth}-tRNS{tail}", chunks, laid, 1
        yield f"rgb8{tail}", png_chunks(stored(colour), COLOUR, 8, interlaced, text), colour, 0
        yield f"rgba8{tail}", png_chunks(stored(colour, alpha), COLOUR_ALPHA, 8, interlaced, []), over_white(colour, alpha), 1
        lit = over_white(grey_as_rgb(grey), alpha)
        yield f"grey-alpha8{tail}", png_chunks(stored(grey, alpha), GREY_ALPHA, 8, interlaced, []), lit, 1
        yield f"grey16{tail}", png_chunks(fine[..., :1], GREY, 16, interlaced, []), grey_as_rgb(grey), 1
        yield f"rgb16{tail}", png_chunks(fine, COLOUR, 16, interlaced, []), colour, 1
        both = np.dstack([fine, alpha.astype(np.uint16) * 257])
        yield f"rgba16{tail}", png_chunks(both, COLOUR_ALPHA, 16, interlaced, []), over_white(colour, alpha), 1
        pair = np.dstack([fine[..., :1], alpha.astype(np.uint16) * 257])
        yield f"grey-alpha16{tail}", png_chunks(pair, GREY_ALPHA, 16, interlaced, []), lit, 1


def png_images() -> Iterator[HostileImage]:
    """All of them."""
    for number, (name, chunks, pixels, tolerance) in enumerate(_variants()):
        data = assembled(chunks)
        yield decodes(f"png/{name}/whole", data, pixels, "a sound file", tolerance)
        yield decodes(f"png/{name}/trailing", data + b"garbage" * 99, pixels, "what follows the end does not count", tolerance)
        yield from _damaged(name, chunks, pixels, tolerance, number)
    yield from _chunk_damage()
    yield from _bombs()
    yield from _odd()


def _damaged(name: str, chunks: Chunks, pixels: Pixels, tolerance: int, seed: int) -> Iterator[HostileImage]:
    data = assembled(chunks)
    bounds, at = [], len(SIGNATURE)
    for kind, body in chunks:
        bounds.append((kind, at, at + 12 + len(body)))
        at += 12 + len(body)
    last_data = max(stop for kind, _, stop in bounds if kind == b"IDAT")
    for length, short in cut(data[: last_data - 16], 10):  # the last 12 bytes hold no pixels, only checksums and the end code
        yield refused(f"png/{name}/cut-at-{length}", short, "pixel data are missing")
    for length in range(last_data - 4, len(data)):
        yield decodes(f"png/{name}/cut-at-{length}", data[:length], pixels, "all pixel data are there", tolerance)
    for count, (place, damaged) in enumerate(flipped(data, FLIPS, seed)):
        label = f"png/{name}/flip-{count}-at-{place}"
        kind, start, _ = next((b for b in bounds if b[1] <= place < b[2]), (b"sign", 0, 0))
        in_length, in_kind = place < start + 4, place < start + 8
        if kind == b"IEND" or (kind != b"sign" and in_length) or (kind[0:1].islower() and kind != b"sign" and in_kind):
            yield either(label, damaged, "it moves the bounds of the chunks, behind which pixels may still be found")
        elif kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"sign"):
            yield refused(label, damaged, f"the checksum of {kind!r} is wrong, and the pixels depend on it")
        else:
            yield decodes(label, damaged, pixels, "only a comment is damaged", tolerance)


def _plain() -> tuple[Chunks, Pixels]:
    pixels = picture(29, 37)
    return png_chunks(pixels.astype(np.uint16), COLOUR, 8, False, []), pixels


def _chunk_damage() -> Iterator[HostileImage]:
    (header, *rest), pixels = _plain()
    good = [header, *rest]
    for place, (kind, _) in enumerate(good[:-1]):
        sound = [chunk(k, b) for k, b in good]
        sound[place] = sound[place][:-4] + bytes(4)
        yield refused(f"png/checksum-0-of-{place}", SIGNATURE + b"".join(sound), f"wrong checksum of {kind!r}")
        without = [entry for at, entry in enumerate(good) if at != place]
        yield refused(f"png/without-{place}", assembled(without), f"{kind!r} is missing")
        halved = [(k, b[: len(b) // 2] if at == place else b) for at, (k, b) in enumerate(good)]
        yield refused(f"png/halved-{place}", assembled(halved), f"half of {kind!r} is missing; its checksum was made anew")
    for kind in (
        b"tEXt",
        b"zTXt",
        b"iTXt",
        b"gAMA",
        b"cHRM",
        b"sRGB",
        b"iCCP",
        b"pHYs",
        b"tIME",
        b"bKGD",
        b"eXIf",
        b"prVt",
        b"acTL",
        b"sBIT",
    ):
        for what, body in {"empty": b"", "random": np.random.default_rng(5).bytes(50), "zeros": bytes(2000)}.items():
            yield decodes(
                f"png/ancillary/{kind.decode()}-{what}", assembled([header, (kind, body), *rest]), pixels, "junk metadata"
            )
            broken = chunk(kind, body)[:-4] + b"\x00\x01\x02\x03"
            data = SIGNATURE + chunk(*header) + broken + b"".join(chunk(*entry) for entry in rest)
            yield decodes(f"png/ancillary/{kind.decode()}-{what}-checksum", data, pixels, "junk metadata with a wrong checksum")
    yield refused(
        "png/unknown-critical", SIGNATURE + chunk(*header) + chunk(b"CRIT", b"?")[:-1] + b"\x00", "a broken critical chunk"
    )


def _bombs() -> Iterator[HostileImage]:
    (header, *rest), pixels = _plain()
    text = zlib.compress(bytes(60_000_000), 9)
    packed = (b"zTXt", b"Comment\x00\x00" + text)
    yield decodes("png/bomb/zTXt", assembled([header, packed, *rest]), pixels, "60 MB of comment, which nobody asked for")
    yield decodes("png/bomb/zTXt-many", assembled([header, *[packed] * 5, *rest]), pixels, "300 MB of comments")
    international = (b"iTXt", b"Comment\x00\x01\x00\x00\x00" + text)
    yield decodes("png/bomb/iTXt", assembled([header, international, *rest]), pixels, "60 MB of comment")
    profile = (b"iCCP", b"name\x00\x00" + text)
    yield decodes("png/bomb/iCCP", assembled([header, profile, *rest]), pixels, "60 MB of colour profile")
    plain = [(b"tEXt", b"Comment\x00" + b"x" * 3_000)] * 300
    yield decodes("png/bomb/tEXt", assembled([header, *plain, *rest]), pixels, "900 kB of comments")
    stream = b"".join(body for kind, body in rest if kind == b"IDAT")
    longer = zlib.compress(zlib.decompress(stream) + bytes(100_000_000), 9)
    yield either("png/bomb/IDAT-too-long", assembled([header, (b"IDAT", longer), rest[-1]]), "100 MB behind the last pixel")
    zeros = zlib.compress(bytes(10_000_000), 9)
    for width, height in ((50_000, 50_000), (100_001, 1000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1), (1, 2**31 - 1)):
        giant = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        yield refused(f"png/bomb/{width}x{height}", assembled([(b"IHDR", giant), (b"IDAT", zeros), rest[-1]]), "too many pixels")
    for width, height, depth, kind in (
        (0, 9, 8, 2),
        (9, 0, 8, 2),
        (9, 9, 7, 2),
        (9, 9, 8, 5),
        (9, 9, 16, 3),
        (9, 9, 0, 0),
        (9, 9, 8, 255),
    ):
        odd = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
        yield refused(f"png/header/{width}x{height}-{depth}-{kind}", assembled([(b"IHDR", odd), *rest]), "an impossible header")
    long_rows = struct.pack(">IIBBBBB", 9000, 9000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(9000 * 1126), 9)
    black = np.broadcast_to(np.uint8(0), (9000, 9000, 3))
    yield decodes(
        "png/9000x9000", assembled([(b"IHDR", long_rows), (b"IDAT", rows), rest[-1]]), black, "large, and within the limit"
    )


def _odd() -> Iterator[HostileImage]:
    (header, *rest), pixels = _plain()
    for height, width in ((1, 1), (1, 20_000), (20_000, 1), (2, 3)):
        long = picture(height, width)
        chunks = png_chunks(long.astype(np.uint16), COLOUR, 8, False, [])
        yield decodes(f"png/size/{height}x{width}", assembled(chunks), long, "an odd size")
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = saved(pixels, "PNG", exif=exif)
        yield decodes(f"png/exif-{orientation}", data, _turned(pixels, orientation), "turned as its metadata say")
    frames = [Image.fromarray(picture(29, 37, seed)) for seed in (7, 8, 9)]
    animated = saved(frames[0], "PNG", save_all=True, append_images=frames[1:])
    yield decodes("png/animated", animated, picture(29, 37, 7), "the first frame of an animation")
    second = animated.index(b"fcTL", animated.index(b"fcTL") + 4)
    yield decodes("png/animated-cut-in-frame-2", animated[: second + 300], picture(29, 37, 7), "the first frame is there")
    many = [header, *((b"IDAT", bytes([byte])) for byte in b"".join(b for k, b in rest if k == b"IDAT")), rest[-1]]
    yield decodes("png/one-byte-chunks", assembled(many), pixels, "legal, if wasteful")
    empty = [header, (b"IDAT", b""), (b"IDAT", b""), *rest]
    yield decodes("png/empty-chunks", assembled(empty), pixels, "legal, if wasteful")
    yield refused("png/signature-only", SIGNATURE, "nothing behind the signature")
    yield refused("png/text-mode", assembled([header, *rest]).replace(b"\r\n", b"\n", 1), "went through a text-mode transfer")
    yield refused("png/leading-newline", b"\n" + assembled([header, *rest]), "it does not begin like any image")
    two = assembled([header, *rest]) + assembled([header, *rest])
    yield decodes("png/two-files", two, pixels, "the first picture counts")


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    from hostile_jpeg import turn

    return turn(pixels, orientation if 1 <= orientation <= 8 else 1)
