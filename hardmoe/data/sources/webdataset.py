"""Tars of samples, as WebDataset and img2dataset write them: `0007.jpg`, `0007.json`, `0008.jpg` …

Consecutive members with the same key (the path up to the first dot of its last part) are one sample: one image, and hashtags
from the field `dataset.tags_column` of its `.json`, or from its `.txt`, or its `.cls`, whichever is there first in this
order. Members with other endings (`.seg.png`, `.npy`) are not looked at. A shard is one tar, read once from front to back.
A sample that is not whole spoils itself; an archive that breaks off stops its shard with its name, like any damaged file.
Rejected: the package `webdataset`, which skips or dies of a broken tar as a handler decides, and keeps no places in it.
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from hardmoe.data.byte_ranges import read_ranges
from hardmoe.data.config import DatasetConfig
from hardmoe.data.sources.base import BadExample, Location, RawExample, SourceFile, SourceShard
from hardmoe.data.sources.fields import IMAGE_ENDINGS, MOST_IMAGE_BYTES, TOO_LARGE, UnusableRowError, escaped, make_example
from hardmoe.data.sources.files import Inputs, Storages, find_inputs
from hardmoe.data.sources.tar_stream import DamagedTarError, TarStream
from hardmoe.errors import CorruptFileError, DataError

_METADATA = frozenset({"json", "txt", "cls"})
_MOST_METADATA_BYTES = 16 * 2**20
_KEY = "__key__"
"""WebDataset's own name for a sample's key; `dataset.id_column` may ask for it."""
_RANGES = 256
_RANGES_BYTES = 64 * 2**20
"""So many images, or so many bytes of them, are fetched at a time."""


@dataclass
class _Sample:
    key: str
    image: bytes | None = None
    offset: int = 0
    problem: str | None = None
    metadata: dict[str, bytes] = field(default_factory=dict)

    def add(self, ending: str, member: tarfile.TarInfo, stream: TarStream) -> None:
        """Take one member in, unless something is wrong with the sample already."""
        is_image = ending in IMAGE_ENDINGS
        if self.problem is not None or not (is_image or ending in _METADATA):
            return
        if not member.isreg() or member.issparse():
            self.problem = f"the {'image' if is_image else f'.{ending}'} is not a plain file"
        elif is_image and self.image is not None:
            self.problem, self.image = "two images", None
        elif ending in self.metadata:
            self.problem = f"two .{ending} files"
        elif member.size > (MOST_IMAGE_BYTES if is_image else _MOST_METADATA_BYTES):
            self.problem = TOO_LARGE if is_image else f"the .{ending} is larger than 16 MiB"
        elif is_image:
            self.image, self.offset = stream.read(member), member.offset_data
        else:
            self.metadata[ending] = stream.read(member)

    def values(self, config: DatasetConfig) -> dict[str, Any]:
        """The fields of the `.json`, with hashtags from elsewhere if it has none.

        Raises:
            UnusableRowError: they cannot be read.
        """
        values = _object(self.metadata["json"]) if "json" in self.metadata else {}
        values.setdefault(_KEY, self.key)
        if config.tags_column not in values:
            values[config.tags_column] = self._other_tags(config.tags_column)
        return values

    def _other_tags(self, column: str) -> str | list[str]:
        for ending in ("txt", "cls"):
            if ending in self.metadata:
                try:
                    text = self.metadata[ending].decode()
                except UnicodeDecodeError as error:
                    raise UnusableRowError(f"the .{ending} is not UTF-8") from error
                # A class is one hashtag, whatever is in it.
                return text if ending == "txt" else [text.strip()]
        raise UnusableRowError(f"no hashtags: neither .txt nor .cls nor a .json with the field {column!r}")


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnusableRowError("the .json is not valid JSON") from error
    if not isinstance(found, dict):
        raise UnusableRowError("the .json is not an object")
    return found


class WebDatasetSource:
    """The samples of tars; see the module's docstring."""

    def __init__(self, config: DatasetConfig) -> None:
        """Remember what is asked."""
        self._config = config

    @cached_property
    def _inputs(self) -> Inputs:
        return find_inputs(self._config.path, "webdataset", "photos/*.tar")

    def files(self) -> list[SourceFile]:
        """The tars, named relative to their common folder.

        Raises:
            DataError: no path, or a path that matches nothing.
        """
        return self._inputs.source_files()

    def shards(self) -> list[SourceShard]:
        """One per tar."""
        count = len(self._inputs.files)
        return [
            SourceShard(f"{number:05d}-of-{count:05d}", {"name": name, "root": file.root, "path": file.path})
            for number, (name, file) in enumerate(self._inputs.files.items())
        ]

    def read(self, shard: SourceShard) -> Iterator[RawExample | BadExample]:
        """The samples of one tar, in its order.

        Raises:
            DataError: the archive is damaged, or a split is none of train, validation and test.
            StorageError: it cannot be read.
        """
        storage, name = Storages()[shard.items["root"]], shard.items["name"]
        path = shard.items["path"]
        count = 0
        with closing(storage.open_input(path)) as source:
            try:
                stream = TarStream(source)
                for sample in _samples(stream):
                    yield self._example(sample, name, stream.is_compressed)
                    count += 1
            except DamagedTarError as error:
                where = f"{storage.where(path)} is no tar archive, or damaged after {count} whole samples"
                raise DataError(f"{where} ({error}); write the file again, or take it out of dataset.path") from error

    def _example(self, sample: _Sample, name: str, is_compressed: bool) -> RawExample | BadExample:
        uri = f"{name}#{escaped(sample.key)}"
        try:
            if sample.problem is not None:
                raise UnusableRowError(sample.problem)
            if sample.image is None:
                raise UnusableRowError("no image")
            location = None if is_compressed else Location(name, sample.offset, len(sample.image))
            return make_example(self._config, sample.image, sample.values(self._config), uri, location)
        except UnusableRowError as error:
            return BadExample(uri, str(error))

    def fetch(self, locations: Sequence[Location]) -> Iterator[bytes]:
        """Images again, neighbours in one read; see `ReferableSource`.

        Raises:
            DataError: a tar is gone or was altered.
        """
        storages = Storages()
        for run in _runs(locations):
            name = run[0].file
            file = self._inputs.files.get(name)
            if file is None:
                raise DataError(f"{name} is not among the files of dataset.path {self._config.path!r} any more; put it back")
            offsets_N = np.array([location.offset for location in run], np.int64)
            lengths_N = np.array([location.length for location in run], np.int64)
            try:
                yield from read_ranges(storages[file.root], file.path, offsets_N, lengths_N)
            except CorruptFileError as error:
                raise DataError(f"{error}; put the file back as it was, or run again") from error


def _samples(stream: TarStream) -> Iterator[_Sample]:
    """Members grouped by key; the last sample only once the archive's end has been seen."""
    sample: _Sample | None = None
    for member in stream:
        folder, slash, base = member.name.removeprefix("./").rpartition("/")
        stem, dot, ending = base.partition(".")
        # Without a stem: hidden files, and what macOS puts beside each (`._0007.jpg`).
        if not stem or not dot or member.isdir():
            continue
        key = f"{folder}{slash}{stem}"
        if sample is not None and sample.key != key:
            yield sample
            sample = None
        if sample is None:
            sample = _Sample(key)
        sample.add(ending.lower(), member, stream)
    if sample is not None:
        yield sample


def _runs(locations: Sequence[Location]) -> Iterator[Sequence[Location]]:
    """Consecutive locations in one file, some at a time."""
    start, size = 0, 0
    for end in range(1, len(locations) + 1):
        size += locations[end - 1].length or 0
        is_full = end - start == _RANGES or size >= _RANGES_BYTES
        if is_full or end == len(locations) or locations[end].file != locations[start].file:
            yield locations[start:end]
            start, size = end, 0
