"""YFCC100M in its public layout: metadata as tab-separated lines, photos in folders named by the hash of their address.

`dataset.path` names the metadata: `yfcc100m_dataset-0` to `-9` of 23 fields, or the later `yfcc100m_dataset` of 25, whose
lines begin with a number, the photo's id and its hash; plain, `.gz` or `.bz2`. `dataset.image_root` is the folder with
`abc/def/abcdef….jpg`, the bucket's `data/images`. The hash is the MD5 of the download address, every byte in hexadecimal
without a leading zero, so it is computed where a line has none and the list `yfcc100m_hash` is not needed. A shard is a
range of bytes, about `dataset.shard_rows` lines; what is compressed cannot be entered in the middle and is one shard, so
`bzcat FILE | split -l 1000000 - part-` is worth its minutes. The collection's identity is its metadata: nobody can digest a
hundred million photos first, and their names are hashes. Rejected: the machine tags, which no person has written.
"""

import bz2
import gzip
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO, cast
from urllib.parse import unquote_plus

from hardmoe.data.config import DatasetConfig
from hardmoe.data.sources.base import BadExample, Location, RawExample, SourceFile, SourceShard
from hardmoe.data.sources.fetching import ImageFolder
from hardmoe.data.sources.fields import UnusableRowError, printable
from hardmoe.data.sources.files import Inputs, Storages, find_inputs
from hardmoe.errors import DataError

_FIELDS = 23
_FIELDS_WITH_HASH = 25
_TAGS, _ADDRESS, _LICENSE, _MARKER = 8, 14, 15, 22
_LINE_BYTES = 512
"""About the mean length of a line; a constant, so that listing the shards reads nothing."""
_MOST_LINE_BYTES = 1 << 20
_HEXADECIMAL = frozenset("0123456789abcdef")
ID_COLUMN = "photoid"


@dataclass(frozen=True)
class _Photo:
    """What a line says of a photo."""

    identifier: str
    tags: tuple[str, ...]
    license: str | None
    file: str
    """Where it lies below `dataset.image_root`."""

    @property
    def uri(self) -> str:
        return f"yfcc100m:{self.identifier}"


class Yfcc100mSource:
    """Lines of metadata and the photos that they name; see the module's docstring."""

    def __init__(self, config: DatasetConfig) -> None:
        """Remember what is asked.

        Raises:
            DataError: there is no `dataset.image_root`, or `dataset.id_column` is not the one that there is.
        """
        if config.image_root is None:
            raise DataError(
                "the source 'yfcc100m' needs dataset.image_root; give the folder or URI with the photos, such as "
                "'s3://multimedia-commons/data/images?anonymous=true&region=us-west-2'"
            )
        if config.id_column not in (None, ID_COLUMN):
            raise DataError(
                f"dataset.id_column {config.id_column!r} is not in YFCC100M; set it to {ID_COLUMN!r}, or leave it out"
            )
        self._config = config
        self._image_root = config.image_root

    @cached_property
    def _inputs(self) -> Inputs:
        return find_inputs(self._config.path, "yfcc100m", "metadata/yfcc100m_dataset-*")

    @cached_property
    def _images(self) -> ImageFolder:
        return ImageFolder(self._image_root, "dataset.image_root")

    def files(self) -> list[SourceFile]:
        """The pieces of metadata."""
        return self._inputs.source_files()

    def names_images(self) -> bool:
        """Always: the photos are files of their own."""
        return True

    def shards(self) -> list[SourceShard]:
        """Ranges of bytes of the plain pieces, and every compressed piece as a whole."""
        wanted = self._config.shard_rows * _LINE_BYTES
        found = []
        for file in self.files():
            where = self._inputs.files[file.name]
            place = {"name": file.name, "root": where.root, "path": where.path}
            count = 1 if _is_compressed(file.name) else max(1, -(-file.size // wanted))
            bounds = [file.size * part // count for part in range(count)] + [None]
            found += [place | {"from": bounds[part], "to": bounds[part + 1]} for part in range(count)]
        return [SourceShard(f"{index:05d}-of-{len(found):05d}", items) for index, items in enumerate(found)]

    def read(self, shard: SourceShard) -> Iterator[RawExample | BadExample]:
        """The photos of one shard in the lines' order, fetched a bounded way ahead.

        Raises:
            DataError: the piece is damaged, or the photos' folder is not there.
            StorageError: the place of the metadata or of the photos cannot be read.
        """
        rows = (_parsed(line, f"{shard.items['name']}#byte={at}") for at, line in _lines(shard))
        for row, found in self._images.read_all(rows, lambda row: row.file if isinstance(row, _Photo) else None):
            if isinstance(row, BadExample):
                yield row
            elif isinstance(found, UnusableRowError):
                yield BadExample(row.uri, str(found))
            else:
                key = None if self._config.id_column is None else row.identifier
                location = Location(row.file, 0, len(found))
                yield RawExample(found, row.tags, row.uri, key, license=row.license, location=location)

    def fetch(self, locations: Sequence[Location]) -> Iterator[bytes]:
        """The photos' bytes.

        Raises:
            DataError: one is gone, or is another than it was.
        """
        yield from self._images.read_again(locations)


def file_of(address: str) -> str:
    """Where the photo with this download address lies below the bucket's `data/images`."""
    return _file_named("".join(f"{byte:x}" for byte in hashlib.md5(address.encode(), usedforsecurity=False).digest()))


def _file_named(name: str) -> str:
    return f"{name[:3]}/{name[3:6]}/{name}.jpg"


def _parsed(line: bytes, where: str) -> _Photo | BadExample:
    """What a line says, or why it cannot be used; `where` names it for people as long as it has no id."""
    if len(line) > _MOST_LINE_BYTES:
        return BadExample(printable(where), "a line longer than 1 MiB")
    fields = line.decode("utf-8", "replace").rstrip("\r\n").split("\t")
    if len(fields) not in (_FIELDS, _FIELDS_WITH_HASH):
        return BadExample(printable(where), f"neither 23 nor 25 fields ({len(fields)})")
    if len(fields) == _FIELDS_WITH_HASH:
        # The line's number, the id, the hash; then the owner, as the older lines go on after the id.
        _, identifier, hexadecimal, *rest = fields
        fields = [identifier, *rest]
    else:
        hexadecimal = ""
    if not fields[0].isdecimal():
        return BadExample(printable(where), "no photo id")
    uri = f"yfcc100m:{fields[0]}"
    if fields[_MARKER] != "0":
        return BadExample(uri, "a video" if fields[_MARKER] == "1" else "neither a photo nor a video")
    if hexadecimal and not _is_hash(hexadecimal):
        return BadExample(uri, "the hash is not hexadecimal")
    file = _file_named(_shortened(hexadecimal)) if hexadecimal else file_of(fields[_ADDRESS])
    tags = (unquote_plus(tag).strip() for tag in fields[_TAGS].split(","))
    return _Photo(fields[0], tuple(tag for tag in tags if tag), fields[_LICENSE] or None, file)


def _is_hash(text: str) -> bool:
    return 16 <= len(text) <= 32 and set(text) <= _HEXADECIMAL


def _shortened(hexadecimal: str) -> str:
    """A hash of full length as the bucket's files are named: no byte has a leading zero."""
    if len(hexadecimal) < 32:
        return hexadecimal
    return "".join(hexadecimal[at : at + 2].removeprefix("0") for at in range(0, 32, 2))


def _lines(shard: SourceShard) -> Iterator[tuple[int, bytes]]:
    """The lines that begin within the shard's range, with where they begin; the rest of a much too long one is dropped."""
    name, start, end = shard.items["name"], shard.items["from"], shard.items["to"]
    with ExitStack() as stack:
        raw = stack.enter_context(Storages()[shard.items["root"]].open_input(shard.items["path"]))
        file = stack.enter_context(_opened(raw, name))
        try:
            if start:
                # A line belongs to the shard that its first byte is in, so one begun in the shard before is passed over.
                file.seek(start - 1)
                start += _rest_of_line(file) - 1
            at = start
            while (end is None or at < end) and (line := file.readline(_MOST_LINE_BYTES + 1)):
                yield at, line
                at += len(line)
                if len(line) > _MOST_LINE_BYTES and not line.endswith(b"\n"):
                    at += _rest_of_line(file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{name} is damaged ({error}); fetch it again") from error
        except OSError as error:
            if not _is_compressed(name):
                raise
            raise DataError(f"{name} is damaged ({error.strerror or error}); fetch it again") from error


def _rest_of_line(file: BinaryIO) -> int:
    """Pass over what is left of a line; returns how many bytes that was."""
    passed = 0
    while piece := file.readline(_MOST_LINE_BYTES):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
    return passed


def _opened(raw: BinaryIO, name: str) -> BinaryIO:
    if name.endswith(".bz2"):
        return cast(BinaryIO, bz2.open(raw))
    return cast(BinaryIO, gzip.open(raw)) if name.endswith(".gz") else raw


def _is_compressed(name: str) -> bool:
    return name.endswith((".bz2", ".gz"))
