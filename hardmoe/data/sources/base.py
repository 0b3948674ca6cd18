"""What a source of examples is.

A source lists external files, whose content is its identity, and shards, which are read independently on any worker. A
shard is described by JSON, not by an open object, so it can be written into a plan and sent to another machine. A row that
cannot be used is yielded with a reason, not raised and not skipped: bad rows are counted and kept for the user to see.
Rejected: one iterator over everything, which can be neither divided nor resumed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from hardmoe.config import Json
from hardmoe.data.config import DatasetConfig


@dataclass(frozen=True)
class SourceFile:
    """An external file whose content identifies the source."""

    name: str
    """Relative to the source and unique in it; stays the same when the data are moved."""
    path: str
    """Where to read it here and now."""
    size: int
    """In bytes."""
    mtime_ns: int
    """Time of the last modification; with `size` the key under which a content digest may be cached."""


@dataclass(frozen=True)
class SourceShard:
    """One independently readable piece of a source; picklable, and `items` is plain JSON."""

    name: str
    """Stable and safe as a file name, such as `mdi6` or `00003-of-00016`."""
    items: Mapping[str, Json]
    """Whatever the source needs to read the shard on another machine."""


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
