"""What a source of examples is.

A source lists external files, whose content is its identity, and shards, which are read independently on any worker. A
shard is described by JSON, not by an open object, so it can be written into a plan and sent to another machine. A row that
cannot be used is yielded with a reason, not raised and not skipped: bad rows are counted and kept for the user to see.
Rejected: one iterator over everything, which can be neither divided nor resumed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hardmoe.config import Json
from hardmoe.data.config import DatasetConfig


@dataclass(frozen=True)
class SourceFile:
    """An external file whose content identifies the source."""

    name: str
    """Relative to the source and unique in it; stays the same when the data are moved."""
    path: str
    """Where to read it here and now: a local path or a URI."""
    size: int
    """In bytes."""
    version: str
    """Changes when the content does (time of modification, ETag); with `size` the key under which a digest may be cached."""
    digest: str | None = None
    """What an object store says of the content (`etag:…`); None where it has to be read."""


@dataclass(frozen=True)
class SourceShard:
    """One independently readable piece of a source; picklable, and `items` is plain JSON."""

    name: str
    """Stable and safe as a file name, such as `mdi6` or `00003-of-00016`."""
    items: Mapping[str, Json]
    """Whatever the source needs to read the shard on another machine."""


@dataclass(frozen=True)
class Location:
    """Where the encoded bytes of an image can be read again; moves with the source, since it names no absolute place."""

    file: str
    """A `SourceFile.name`; or where an image lies below `image_root` or the tables' common folder."""
    offset: int
    """First byte in the file; or, where `length` is None, the number of the row in it."""
    length: int | None
    """Number of bytes; None for a row of a table."""


@dataclass(frozen=True)
class RawExample:
    """One row of a source, not yet decoded."""

    image: bytes
    """The encoded image, exactly as the source holds it."""
    tags: tuple[str, ...]
    """Hashtags as they came."""
    source_uri: str
    """Where the row came from, for people."""
    key: str | None = None
    """The user's own name of the example, where `dataset.id_column` says so."""
    split: str | None = None
    """`train`, `validation` or `test`, where `dataset.split_column` says so."""
    license: str | None = None
    """The image's licence, where the source knows it."""
    location: Location | None = None
    """Where `fetch` finds these bytes again; None if the source cannot say."""
    part: str | None = None
    """The part of the partition, where `dataset.part_column` says so: a name, or a number's digits."""
    pixels: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
    """Of a source that draws its images: what `image` decodes to, uint8 [H, W, 3], which then need not be decoded."""


@dataclass(frozen=True)
class BadExample:
    """One row of a source that cannot be used."""

    source_uri: str
    """Where the row came from."""
    reason: str
    """Why it cannot be used, in a few words."""


class Source(Protocol):
    """A collection of tagged images; `files` and `shards` are cheap, `read` does the work.

    Two sources made from equal configs over equal files list the same names in the same order and read the same examples.
    """

    def __init__(self, config: DatasetConfig) -> None:
        """Open the source; raises DataError where the config's path or columns cannot work."""

    def files(self) -> list[SourceFile]:
        """The external files, sorted by name."""

    def shards(self) -> list[SourceShard]:
        """The shards, in a stable order; together they hold every row exactly once."""

    def read(self, shard: SourceShard) -> Iterator[RawExample | BadExample]:
        """The rows of one shard, in a stable order."""


@runtime_checkable
class ReferableSource(Source, Protocol):
    """A source that can read single images again, so that a dataset need not hold copies of them."""

    def fetch(self, locations: Sequence[Location]) -> Iterator[bytes]:
        """The encoded bytes at these locations, in this order; cheapest where they are sorted by file and offset.

        Raises:
            DataError: a file is gone or was altered so that it cannot be read.
        """


@runtime_checkable
class NamingSource(ReferableSource, Protocol):
    """A source whose `files` may be tables that only name the images: their sizes then say nothing of the images'."""

    def names_images(self) -> bool:
        """Whether they do, and `fetch` finds every image again."""
