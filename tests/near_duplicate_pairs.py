"""Labelled pairs of images for judging the near-duplicate rule: half show one picture twice, half two pictures that look alike.

Photographs are crops of scikit-learn's two sample images and coloured noise with the spectrum of photographs; drawings are
glyphs of icon fonts. Labels come from how a pair was made, never from a measure of likeness. A near-duplicate is the same
picture after one of `CHANGES`; a hard negative is another weight of the same glyph, a glyph of the same name in another
font, another crop of the same photograph, another texture of the same colours, or another near-blank page. Some fonts drew
the same circle or the same brand's logo under the same name: those few count against the rule.
"""

import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

from hardmoe.data.config import DatasetConfig
from hardmoe.data.images import decode
from hardmoe.data.sources.base import RawExample
from hardmoe.data.sources.icons import IconsSource

Picture = NDArray[np.uint8]

_MAX_PIXELS = 10**7
_ICON_SIZE = 48
_FONTS = ("ph", "ri", "msc")
"""Phosphor, Remix Icon and Codicons: many glyphs of the same names, and two of them in several weights."""
_STYLES = ("thin", "light", "bold", "fill", "duotone", "outline", "line")
_SMALLEST = 24


@dataclass(frozen=True)
class Pair:
    """Two images and whether they show the same picture."""

    kind: str
    """`icon` or `photograph`."""
    how: str
    """What was done to the first to get the second, or how the two differ."""
    first_HW3: Picture
    second_HW3: Picture
    same: bool


def _encoded(picture_HW3: Picture, encoding: str, quality: int) -> Picture:
    target = io.BytesIO()
    Image.fromarray(picture_HW3).save(target, format=encoding, quality=quality)
    return decode(target.getvalue(), _MAX_PIXELS)


def _resized(picture_HW3: Picture, rng: np.random.Generator) -> Picture:
    """A quarter to twice the size, with no side below `_SMALLEST` pixels."""
    height, width, _ = picture_HW3.shape
    factor = max(2.0 ** rng.uniform(-2.0, 1.0), _SMALLEST / min(height, width))
    size = (round(width * factor), round(height * factor))
    how = rng.choice([Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
    return np.asarray(Image.fromarray(picture_HW3).resize(size, Image.Resampling(int(how))))


def _brightened(picture_HW3: Picture, rng: np.random.Generator) -> Picture:
    return np.clip(picture_HW3 * rng.choice([0.95, 1.05]) + 0.5, 0, 255).astype(np.uint8)


def _cropped(picture_HW3: Picture, rng: np.random.Generator) -> Picture:
    height, width, _ = picture_HW3.shape
    top, left = round(0.02 * height), round(0.02 * width)
    return picture_HW3[top : height - top, left : width - left]


def _marked(picture_HW3: Picture, rng: np.random.Generator) -> Picture:
    """A line of text, a twentieth of the height, in the lower right corner."""
    image = Image.fromarray(picture_HW3)
    height, width, _ = picture_HW3.shape
    ImageDraw.Draw(image).text((width * 0.97, height * 0.97), "PHOTO AGENCY", "white", anchor="rb", font_size=max(8, height / 20))
    return np.asarray(image)


def _greyed(picture_HW3: Picture, rng: np.random.Generator) -> Picture:
    return np.asarray(Image.fromarray(picture_HW3).convert("L").convert("RGB"))


CHANGES: dict[str, Callable[[Picture, np.random.Generator], Picture]] = {
    "jpeg": lambda picture_HW3, rng: _encoded(picture_HW3, "JPEG", int(rng.integers(30, 96))),
    "webp": lambda picture_HW3, rng: _encoded(picture_HW3, "WEBP", int(rng.integers(30, 96))),
    "resized": _resized,
    "brightness": _brightened,
    "cropped": _cropped,
    "grey": _greyed,
    "watermark": _marked,
}
"""What leaves a picture the same. Every change but the encodings is followed by a JPEG of quality 85."""


def changed(picture_HW3: Picture, how: str, rng: np.random.Generator) -> Picture:
    """The picture after one of `CHANGES`."""
    picture_HW3 = CHANGES[how](picture_HW3, rng)
    return picture_HW3 if how in ("jpeg", "webp") else _encoded(picture_HW3, "JPEG", 85)


@cache
def icons() -> dict[str, dict[str, bytes]]:
    """Encoded glyphs by font and name."""
    source = IconsSource(DatasetConfig(source="icons", icon_size=_ICON_SIZE))
    found: dict[str, dict[str, bytes]] = {}
    for shard in source.shards():
        if shard.name in _FONTS:
            rows = [row for row in source.read(shard) if isinstance(row, RawExample)]
            found[shard.name] = {row.source_uri.partition("/")[2]: row.image for row in rows}
    return found


def _without_style(name: str) -> str:
    return re.sub(rf"-({'|'.join(_STYLES)})$", "", name)


def _weights() -> list[tuple[bytes, bytes]]:
    """The same glyph of one font in two weights: thin, light, regular, bold, filled, outlined."""
    found = []
    for glyphs in icons().values():
        groups: dict[str, list[str]] = defaultdict(list)
        for name in sorted(glyphs):
            groups[_without_style(name)].append(name)
        found += [(glyphs[a], glyphs[b]) for names in groups.values() for a, b in combinations(names, 2)]
    return found


def _other_fonts() -> list[tuple[bytes, bytes]]:
    """Glyphs of the same name in two fonts."""
    named: dict[str, list[tuple[str, bytes]]] = defaultdict(list)
    for font, glyphs in icons().items():
        for name, data in glyphs.items():
            named[_without_style(name)].append((font, data))
    return [(a, b) for _, found in sorted(named.items()) for (font, a), (other, b) in combinations(found, 2) if font != other]


@cache
def _samples() -> list[Picture]:
    return list(load_sample_images().images)


def _texture(seed: int, height: int, width: int) -> Picture:
    """Noise whose spectrum falls as in photographs, in colours that `seed // 2` decides: pairs share them."""
    rng, colours = np.random.default_rng(seed), np.random.default_rng(seed // 2)
    mean_3, mixing_33 = colours.uniform(60, 190, 3), colours.uniform(10, 40, (3, 3))
    frequency_HW = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    frequency_HW[0, 0] = np.inf
    noise_HW3 = rng.standard_normal((height, width, 3))
    smooth_HW3 = np.fft.ifft2(np.fft.fft2(noise_HW3, axes=(0, 1)) / frequency_HW[:, :, None] ** 1.2, axes=(0, 1)).real
    smooth_HW3 /= smooth_HW3.std(axis=(0, 1))
    return np.clip(mean_3 + smooth_HW3 @ mixing_33, 0, 255).astype(np.uint8)


def _page(rng: np.random.Generator) -> Picture:
    """A white page with one to three short dark strokes."""
    image = Image.new("RGB", (200, 260), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 4)):
        x, y = rng.integers(10, 150), rng.integers(10, 250)
        draw.line((x, y, x + rng.integers(10, 50), y + rng.integers(-5, 6)), (40, 40, 40), 3)
    return np.asarray(image)


def _box(photo_HW3: Picture, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of a part of a photograph that is not just sky."""
    height, width, _ = photo_HW3.shape
    while True:
        h, w = int(rng.integers(100, 300)), int(rng.integers(100, 400))
        top, left = int(rng.integers(0, height - h)), int(rng.integers(0, width - w))
        if photo_HW3[top : top + h, left : left + w].mean(axis=2).std() > 20:
            return top, left, top + h, left + w


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection over union of two boxes."""
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(0, height) * max(0, width)
    return common / (sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - common)


def photograph(rng: np.random.Generator) -> Picture:
    """A crop of a real photograph, or a texture."""
    if rng.random() < 0.3:
        return _texture(int(rng.integers(2**31)), int(rng.integers(100, 300)), int(rng.integers(100, 400)))
    photo_HW3 = _samples()[rng.integers(2)]
    top, left, bottom, right = _box(photo_HW3, rng)
    return photo_HW3[top:bottom, left:right]


def _two_crops(rng: np.random.Generator) -> tuple[Picture, Picture]:
    """Two parts of one photograph that share less than three tenths of their union."""
    photo_HW3 = _samples()[rng.integers(2)]
    a = b = _box(photo_HW3, rng)
    while _overlap(a, b) > 0.3:
        b = _box(photo_HW3, rng)
    return photo_HW3[a[0] : a[2], a[1] : a[3]], photo_HW3[b[0] : b[2], b[1] : b[3]]


def near_duplicates(per_kind: int, seed: int) -> Iterator[Pair]:
    """`per_kind` pairs of icons and as many of photographs that show the same picture.

    Drawings get no watermark: a mark on a drawing is how `file-plus` differs from `file`.
    """
    rng = np.random.default_rng(seed)
    glyphs = [data for font in icons().values() for data in font.values()]
    changes = list(CHANGES)
    for i in range(per_kind):
        how = changes[i % (len(changes) - 1)]
        icon_HW3 = decode(glyphs[rng.integers(len(glyphs))], _MAX_PIXELS)
        yield Pair("icon", how, icon_HW3, changed(icon_HW3, how, rng), same=True)
    for i in range(per_kind):
        how = changes[i % len(changes)]
        photo_HW3 = photograph(rng)
        yield Pair("photograph", how, photo_HW3, changed(photo_HW3, how, rng), same=True)


def hard_negatives(per_kind: int, seed: int) -> Iterator[Pair]:
    """`per_kind` pairs of icons and as many of photographs that look alike and are not the same."""
    rng = np.random.default_rng(seed)
    alike = {"weight": _weights(), "other font": _other_fonts()}
    for i in range(per_kind):
        how = list(alike)[i % 2]
        a, b = alike[how][rng.integers(len(alike[how]))]
        while a == b:  # one drawing under two names is an exact copy, which is none of the rule's business
            a, b = alike[how][rng.integers(len(alike[how]))]
        yield Pair("icon", how, decode(a, _MAX_PIXELS), decode(b, _MAX_PIXELS), same=False)
    for i in range(per_kind):
        if i % 3 == 0:
            seed_2 = 2 * int(rng.integers(2**30))
            yield Pair("photograph", "texture", _texture(seed_2, 200, 200), _texture(seed_2 + 1, 200, 200), same=False)
        elif i % 3 == 1:
            yield Pair("photograph", "near-blank", _page(rng), _page(rng), same=False)
        else:
            yield Pair("photograph", "other crop", *_two_crops(rng), same=False)
