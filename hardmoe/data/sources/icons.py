"""Icon fonts as a tagged image collection: real drawings, tagged by the words in the names that their designers gave.

The fonts and their charmaps come from the package `qtawesome`, whose folder is looked up and never imported, since it
needs Qt. One shard is one font. Where a family is there in several major versions only the newest is read
(`fontawesome6` and not `fontawesome5`): the older ones redraw the same icons under the same names. Further copies are
left to the exact-duplicate stage. Rejected: drawing at the final size, where FreeType's hinting decides the shape; glyphs
are drawn large and averaged down (16,930 glyphs of 32 pixels, 16,725 of them distinct, in 8 s on one core).
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hardmoe.data.config import DatasetConfig
from hardmoe.data.png import write_drawing
from hardmoe.data.sources.base import BadExample, RawExample, SourceFile, SourceShard
from hardmoe.errors import DataError

_FONT_NAME = re.compile(
    r"(?P<family>[A-Za-z]+)(?P<major>\d*)(\.\d+)*(-(?P<style>[A-Za-z]+?))??(-webfont)?(-(?P<version>[\d.]+))?\.ttf"
)
_SHORT = {
    "codicon": "msc",
    "elusiveicons": "ei",
    "fontawesome": "fa",
    "materialdesignicons": "mdi",
    "phosphor": "ph",
    "remixicon": "ri",
}
"""qtawesome's own prefixes, which its users know; another family keeps its name."""
_SHORT_STYLE = {None: "", "regular": "", "solid": "s", "brands": "b"}

_SUPERSAMPLING = 6
_NOWHERE = "\U0010fffe"
"""A code point that is no character, so a font draws its sign for a missing glyph."""


@dataclass(frozen=True)
class _Font:
    name: str
    family: str
    major: int
    version: tuple[int, ...]
    font_file: str
    charmap_file: str


def _describe(path: Path) -> _Font | None:
    """What a font file's name says, or None where it is not a font with a charmap beside it."""
    match = _FONT_NAME.fullmatch(path.name)
    if match is None:
        return None
    suffix = f"-{match['version']}" if match["version"] else ""
    charmap = path.with_name(f"{path.stem.removesuffix(suffix)}-charmap{suffix}.json")
    if not charmap.exists():
        return None
    family, major, style = match["family"], match["major"], match["style"]
    name = _SHORT.get(family, family) + major + _SHORT_STYLE.get(style, f"-{style}")
    version = tuple(int(number) for number in re.findall(r"\d+", suffix))
    return _Font(name, family, int(major or 0), version, path.name, charmap.name)


def _newest_fonts(folder: Path) -> list[_Font]:
    fonts = [font for path in sorted(folder.glob("*.ttf")) if (font := _describe(path))]
    by_age = sorted(fonts, key=lambda font: (font.major, font.version))
    newest = {font.family: font.major for font in by_age}
    by_name = {font.name: font for font in by_age if font.major == newest[font.family]}
    return [by_name[name] for name in sorted(by_name)]


def _font_folder(config: DatasetConfig) -> Path:
    if isinstance(config.path, list):
        raise DataError(f"dataset.path {config.path} is a list; the source 'icons' reads one folder of fonts; give that or none")
    if config.path is not None:
        return Path(config.path).expanduser()
    spec = find_spec("qtawesome")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the source 'icons' needs the fonts of the package qtawesome; pip install 'hardmoe[demo]'")
    return Path(spec.submodule_search_locations[0]) / "fonts"


def tags_of(names: list[str]) -> tuple[str, ...]:
    """The words of an icon's names, sorted, each once; plain numbers and single letters say nothing and are dropped."""
    words = {word for name in names for word in re.split("[-_]", name)}
    return tuple(sorted(word for word in words if len(word) > 1 and not word.isdecimal()))


def _ink(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """A glyph's coverage, cropped to where there is any; None for a blank glyph."""
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (max(1, round(right - left)), max(1, round(bottom - top))), 0)
    ImageDraw.Draw(canvas).text((-left, -top), character, fill=255, font=font)
    box = canvas.getbbox()
    return None if box is None else canvas.crop(box)


def _draw(ink: Image.Image, size: int) -> bytes:
    """The ink in black, centred on a white square, its longer side filling the square but for a margin; as PNG."""
    inner = size - 2 * max(1, size // 16)
    scale = inner / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    icon = Image.new("L", (size, size), 0)
    icon.paste(ink.resize((width, height), Image.Resampling.BOX), ((size - width) // 2, (size - height) // 2))
    grey_HW = 255 - np.asarray(icon)
    return write_drawing(np.repeat(grey_HW[:, :, None], 3, axis=2))


class IconsSource:
    """Every glyph of every icon font in the folder; see the module's docstring."""

    def __init__(self, config: DatasetConfig) -> None:
        """Find the fonts.

        Raises:
            DataError: `qtawesome` is not installed, or the folder has no fonts with charmaps.
        """
        self._size = config.icon_size
        self._folder = _font_folder(config)
        self._fonts = _newest_fonts(self._folder)
        if not self._fonts:
            raise DataError(f"{self._folder} has no icon fonts (NAME.ttf with NAME-charmap.json beside it); correct dataset.path")

    def files(self) -> list[SourceFile]:
        """The fonts and charmaps that are read."""
        names = sorted(name for font in self._fonts for name in (font.font_file, font.charmap_file))
        stats = [(name, (self._folder / name).stat()) for name in names]
        return [SourceFile(name, str(self._folder / name), stat.st_size, str(stat.st_mtime_ns)) for name, stat in stats]

    def shards(self) -> list[SourceShard]:
        """One shard per font, named by qtawesome's prefix."""
        return [SourceShard(font.name, {"font": font.font_file, "charmap": font.charmap_file}) for font in self._fonts]

    def read(self, shard: SourceShard) -> Iterator[RawExample | BadExample]:
        """The glyphs of one font by ascending code point; names of the same code point are united."""
        path = self._folder / shard.items["font"]
        try:
            # The basic layout engine is always there and does no substitutions, unlike Raqm.
            font = ImageFont.truetype(str(path), self._size * _SUPERSAMPLING, layout_engine=ImageFont.Layout.BASIC)
        except OSError as error:
            raise DataError(f"{path} is not a font that FreeType can read ({error}); replace or remove it") from error
        missing = _ink(font, _NOWHERE)
        for code, names in sorted(self._names_by_code(shard.items["charmap"]).items()):
            uri = f"icons:{shard.name}/{names[0]}"
            ink = _ink(font, chr(code))
            if ink is None:
                yield BadExample(uri, "blank glyph")
            elif ink == missing:
                yield BadExample(uri, "glyph missing from the font")
            else:
                yield RawExample(_draw(ink, self._size), tags_of(names), uri)

    def _names_by_code(self, charmap_file: str) -> dict[int, list[str]]:
        path = self._folder / charmap_file
        names: dict[int, list[str]] = defaultdict(list)
        try:
            for name, code in sorted(json.loads(path.read_bytes()).items()):
                names[int(code, 16)].append(name)
        except (ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{path} is not a JSON object of names and hexadecimal codes ({error}); correct it") from error
        return names
