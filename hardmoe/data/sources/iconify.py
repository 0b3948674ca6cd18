"""The icon sets of the npm package `@iconify/json`: 390,000 drawings with the names that their many designers gave.

`dataset.path` is the unpacked package. A shard is one set, or a range of a large set's names. A drawing's hashtags are the
words in its name, in the aliases that show the same picture, and in the titles of the categories that list it. An alias that
turns, mirrors or crops its parent is another picture and an example of its own. The designer's frame fills the square: a
dot stays smaller than a circle. Sets keep their colours. Rejected: reading the `.tgz` itself, of which every shard would
have to be unpacked from the start; drawing hidden icons out, which are as real as the others.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardmoe.data.config import DatasetConfig
from hardmoe.data.png import write_drawing
from hardmoe.data.sources.base import BadExample, RawExample, SourceFile, SourceShard
from hardmoe.data.sources.fields import printable
from hardmoe.data.sources.icons import tags_of
from hardmoe.data.sources.svg import Frame, UndrawableSvgError, draw
from hardmoe.errors import DataError

_COLLECTIONS = "collections.json"
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CHANGES = ("left", "top", "width", "height", "rotate", "hFlip", "vFlip")
_DEFAULT_SIDE = 16
"""Of a frame without width or height, as Iconify defines it."""


@dataclass
class _Drawing:
    """A picture with a name of its own: an icon, or an alias that changes one."""

    parent: str
    """The icon with the body."""
    changes: Mapping[str, Any]
    """Frame and transformations, those of all its parents included."""
    names: list[str] = field(default_factory=list)
    """Its own, then those of aliases that show the same."""
    categories: list[str] = field(default_factory=list)


class IconifySource:
    """Every icon of every set in the package; see the module's docstring."""

    def __init__(self, config: DatasetConfig) -> None:
        """Find the sets.

        Raises:
            DataError: the path is not the unpacked package, or `resvg-py` is not installed.
        """
        self._size = config.icon_size
        self._shard_rows = config.shard_rows
        if find_spec("resvg_py") is None:
            raise DataError("the source 'iconify' needs the package resvg-py; pip install 'hardmoe[iconify]'")
        self._folder = _package(config.path)
        self._sets = sorted((self._folder / "json").glob("*.json"))
        if not self._sets:
            raise DataError(
                f"{self._folder} is not the unpacked npm package @iconify/json: it has no json/*.json; correct dataset.path"
            )
        if strange := [path for path in self._sets if not _SAFE_NAME.fullmatch(path.stem)]:
            raise DataError(f"{strange[0]} is not named like an icon set; take it out of the folder")

    def files(self) -> list[SourceFile]:
        """The sets, and the table of contents where there is one."""
        names = [f"json/{path.name}" for path in self._sets]
        if (self._folder / _COLLECTIONS).is_file():
            names.append(_COLLECTIONS)
        stats = [(name, (self._folder / name).stat()) for name in sorted(names)]
        # npm gives every file of every release one and the same time of modification.
        return [
            SourceFile(name, str(self._folder / name), stat.st_size, f"{stat.st_mtime_ns}-{stat.st_ctime_ns}")
            for name, stat in stats
        ]

    def shards(self) -> list[SourceShard]:
        """One shard per set of about `dataset.shard_rows` icons, several of equal size for a larger one."""
        totals = _totals(self._folder / _COLLECTIONS)
        found = []
        for path in self._sets:
            pieces = -(-(totals.get(path.stem) or len(_Set(path).drawings)) // self._shard_rows) or 1
            names = [path.stem] if pieces == 1 else [f"{path.stem}-{piece:02d}-of-{pieces:02d}" for piece in range(pieces)]
            found += [SourceShard(name, {"set": path.stem, "piece": [i, pieces]}) for i, name in enumerate(names)]
        return found

    def read(self, shard: SourceShard) -> Iterator[RawExample | BadExample]:
        """The icons of one set, or of a part of it, by name.

        Raises:
            DataError: the set is gone or is not an icon set.
        """
        icons = _Set(self._folder / "json" / f"{shard.items['set']}.json")
        piece, pieces = shard.items["piece"]
        names = sorted(icons.drawings)
        for name in names[len(names) * piece // pieces : len(names) * (piece + 1) // pieces]:
            uri = printable(f"iconify:{shard.items['set']}/{name}")
            try:
                image_SS3 = icons.draw(icons.drawings[name], self._size)
            except UndrawableSvgError as error:
                yield BadExample(uri, str(error))
            else:
                yield RawExample(write_drawing(image_SS3), icons.tags(name), uri, license=icons.license, pixels=image_SS3)


class _Set:
    """One icon set, read and with its aliases followed."""

    def __init__(self, path: Path) -> None:
        body = _load(path)
        self._body = body
        self._icons = body["icons"]
        self._aliases = _mapping(body.get("aliases"))
        info = _mapping(_mapping(body.get("info")).get("license"))
        found = info.get("spdx") or info.get("title")
        self.license = printable(found) if isinstance(found, str) else None
        self.drawings: dict[str, _Drawing] = {name: _Drawing(name, _mapping(icon), [name]) for name, icon in self._icons.items()}
        shown = {name: self._follow(name) for name in sorted(self._aliases.keys() - self._icons.keys())}
        for name, drawing in shown.items():
            if name != drawing:
                self.drawings[drawing].names.append(name)
        shown |= {name: name for name in self._icons}
        for title, names in sorted(_mapping(body.get("categories")).items()):
            listed = names if isinstance(names, list) else []
            for drawing in {shown[name] for name in listed if isinstance(name, str) and name in shown}:
                self.drawings[drawing].categories.append(re.sub(r"\W+", "-", title))

    def _follow(self, alias: str) -> str:
        """The name of the drawing that an alias shows; makes the drawing where the alias is one of its own."""
        chain = [alias]
        while (parent := self._parent(chain[-1])) not in self._icons:
            if parent not in self._aliases or parent in chain:
                self.drawings[alias] = _Drawing("", {}, [alias])  # an alias of nothing: a row, to be counted as a bad one
                return alias
            chain.append(parent)
        shown = parent
        for name in reversed(chain):
            changes = {key: value for key in _CHANGES if (value := self._aliases[name].get(key))}
            if changes and name not in self.drawings:
                self.drawings[name] = _Drawing(parent, _combined(self.drawings[shown].changes, changes), [name])
            shown = name if changes else shown
        return shown

    def _parent(self, alias: str) -> str:
        parent = _mapping(self._aliases[alias]).get("parent")
        return parent if isinstance(parent, str) else ""

    def tags(self, name: str) -> tuple[str, ...]:
        """The words of a drawing's names and categories."""
        drawing = self.drawings[name]
        return tags_of([printable(text.casefold()) for text in drawing.names + drawing.categories])

    def draw(self, drawing: _Drawing, size: int) -> NDArray[np.uint8]:
        """Render one drawing, uint8 [size, size, 3].

        Raises:
            UndrawableSvgError: it cannot be drawn.
        """
        body = _mapping(self._icons.get(drawing.parent)).get("body")
        if not isinstance(body, str):
            raise UndrawableSvgError("no drawing of that name" if not drawing.parent else "no body")
        defaults = {key: self._body[key] for key in _CHANGES[:4] if key in self._body}
        settings = {"left": 0, "top": 0, "width": _DEFAULT_SIDE, "height": _DEFAULT_SIDE} | defaults | dict(drawing.changes)
        try:
            frame = Frame(*(float(settings[key]) for key in _CHANGES[:4]))
            quarters = int(settings.get("rotate", 0)) % 4
        except (TypeError, ValueError, OverflowError) as error:
            raise UndrawableSvgError("a frame or rotation that is no number") from error
        image_SS3 = draw(body, frame, size)
        # The square is turned and not the drawing: the same pixels, without a second way to write it down.
        image_SS3 = image_SS3[:, ::-1] if settings.get("hFlip") else image_SS3
        image_SS3 = image_SS3[::-1] if settings.get("vFlip") else image_SS3
        return np.ascontiguousarray(np.rot90(image_SS3, -quarters))


def _combined(parent: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Iconify's rule: turns add up, two flips cancel each other, a frame is replaced."""
    merged = {**parent, **changes}
    if isinstance(parent.get("rotate"), int) and isinstance(changes.get("rotate"), int):
        merged["rotate"] = parent["rotate"] + changes["rotate"]
    for flip in ("hFlip", "vFlip"):
        merged[flip] = bool(parent.get(flip)) != bool(changes.get(flip))
    return merged


def _mapping(value: object) -> Mapping[str, Any]:
    """The value where it is an object of JSON; a stranger's file may hold anything."""
    return value if isinstance(value, dict) else {}


def _load(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); unpack the package again") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); unpack the package again") from error
    if not isinstance(body, dict) or not isinstance(body.get("icons"), dict):
        raise DataError(f"{path} is not an Iconify icon set: it has no object 'icons'; take it out of the folder")
    return body


def _totals(contents: Path) -> dict[str, int]:
    """About how many icons a set has, by prefix, so that listing the shards need not read 480 MB."""
    if not contents.is_file():
        return {}
    try:
        described = _mapping(json.loads(contents.read_bytes()))
    except ValueError as error:
        raise DataError(f"{contents} is not JSON ({error}); unpack the package again") from error
    totals = {prefix: _mapping(info).get("total") for prefix, info in described.items()}
    return {prefix: total for prefix, total in totals.items() if isinstance(total, int)}


def _package(path: str | list[str] | None) -> Path:
    """The unpacked package's folder."""
    if not isinstance(path, str) or "://" in path:
        raise DataError(
            f"the source 'iconify' reads one local folder, not dataset.path {path!r}; run 'npm pack @iconify/json', unpack it "
            "with 'tar xf' and give the folder package/"
        )
    folder = Path(path).expanduser()
    if folder.is_file():
        raise DataError(f"dataset.path {path!r} is an archive; unpack it with 'tar xf {path}' and give the folder package/")
    if not folder.is_dir():
        here = "" if folder.is_absolute() else f" (looked from {Path.cwd()})"
        raise DataError(
            f"dataset.path {path!r} is not there{here}; run 'npm pack @iconify/json', unpack it with 'tar xf' and give package/"
        )
    return folder
