"""Parquet files of images and hashtags, as data lakes and Hugging Face's datasets hold them.

A shard is a range of row groups of one file, about `dataset.shard_rows` rows: a row group is the smallest piece that can
be read without reading its neighbours, so a larger one is not divided. Only footers are read to list the shards, and
every file's columns are checked then, so a wrong column stops the run before any work. Encoded bytes pass through
unchanged; a column of paths or URIs is followed, in parallel, below `dataset.image_root`. Columns are read through bounded
buffers, so a row group of any size passes through a few batches of memory. Rejected: `pyarrow.dataset`, which unifies
schemas silently and hides which file and row a value came from.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cached_property
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hardmoe.config import Json
from hardmoe.data.config import DatasetConfig
from hardmoe.data.sources.base import BadExample, Location, RawExample, SourceFile, SourceShard
from hardmoe.data.sources.fetching import ImageFolder
from hardmoe.data.sources.fields import UnusableRowError, make_example, missing_column
from hardmoe.data.sources.files import InputFile, Inputs, Storages, find_inputs
from hardmoe.errors import DataError, StorageError
from hardmoe.storage import Storage

_BATCH_ROWS = 256
_BATCH_BYTES = 16 * 2**20
_BUFFER_BYTES = 4 * 2**20
"""What is read of a column at a time; without it, or with `pre_buffer`, pyarrow reads a row group's whole column at once."""
_THREADS = 8


@contextmanager
def _opened(storage: Storage, path: str) -> Iterator[pq.ParquetFile]:
    where = storage.where(path)
    try:
        source = storage.open_input(path)
    except StorageError as error:
        raise DataError(f"{error}; put the file back, make it readable, or correct dataset.path") from error
    with closing(source):
        try:
            file = pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        except pa.ArrowInvalid as error:
            reason = _reason(error)
            raise DataError(f"{where} is not a Parquet file ({reason}); correct dataset.path or write the file again") from error
        except OSError as error:
            raise DataError(f"{where} cannot be read ({_reason(error)}); correct dataset.path") from error
        yield file


def _reason(error: Exception) -> str:
    """What pyarrow found, fit for a terminal: its messages may run over lines and quote bytes of the file."""
    text = getattr(error, "strerror", None) or str(error)
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= 200 else f"{line[:197]}..."


def _plain(type_: pa.DataType) -> pa.DataType:
    """A column's type without the dictionary that pandas' categories bring."""
    return type_.value_type if pa.types.is_dictionary(type_) else type_


def _is_string(type_: pa.DataType) -> bool:
    type_ = _plain(type_)
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))


def _is_binary(type_: pa.DataType) -> bool:
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_))


def _is_image(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        return type_.get_field_index("bytes") >= 0 and _is_binary(type_.field("bytes").type)
    return _is_binary(type_) or _is_string(type_)


def _is_tags(type_: pa.DataType) -> bool:
    is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
    item = type_.value_type if is_list else type_
    # A file whose rows all lack hashtags is written with the type null, or list<null>.
    return _is_string(item) or bool(pa.types.is_null(item))


def _is_key(type_: pa.DataType) -> bool:
    return _is_string(type_) or _is_binary(type_) or pa.types.is_integer(type_)


def _is_part(type_: pa.DataType) -> bool:
    return bool(_is_string(type_) or pa.types.is_integer(_plain(type_)) or pa.types.is_null(type_))


def _is_license(type_: pa.DataType) -> bool:
    return bool(_is_string(type_) or pa.types.is_integer(type_) or pa.types.is_null(type_))


_EXPECTED = {
    "image_column": (_is_image, "images: binary, a struct with a binary field 'bytes', or strings that are paths or URIs"),
    "tags_column": (_is_tags, "hashtags: list<string>, or one string to be split"),
    "id_column": (_is_key, "names: string, integer or binary"),
    "split_column": (_is_string, "strings: train, validation or test"),
    "license_column": (_is_license, "licences: string or integer"),
    "part_column": (_is_part, "parts: whole numbers from 0, or strings"),
}


class ParquetSource:
    """Rows of Parquet files; see the module's docstring."""

    def __init__(self, config: DatasetConfig) -> None:
        """Remember what is asked; the files are looked for when they are listed, and not by every worker again."""
        self._config = config
        chosen = {key: getattr(config, key) for key in _EXPECTED}
        self._columns: dict[str, str] = {key: column for key, column in chosen.items() if column is not None}

    @cached_property
    def _inputs(self) -> Inputs:
        return find_inputs(self._config.path, "parquet", "photos/*.parquet")

    def files(self) -> list[SourceFile]:
        """The Parquet files, named relative to their common folder; images that they only name are not among them.

        Raises:
            DataError: no path, or a path that matches nothing.
        """
        return self._inputs.source_files()

    def names_images(self) -> bool:
        """Whether the first table's images are paths or URIs, which all tables' common folder or `image_root` leads to."""
        files = self._inputs.files.items()
        if self._config.image_root is None and any(name != file.path for name, file in files):
            return False
        _, first = next(iter(files))
        storage = Storages()[first.root]
        with _opened(storage, first.path) as opened:
            self._check_columns(opened.schema_arrow, storage.where(first.path))
            return _is_string(opened.schema_arrow.field(self._config.image_column).type)

    def shards(self) -> list[SourceShard]:
        """Ranges of row groups, numbered over all files.

        Raises:
            DataError: a file is not Parquet, lacks a column or has one of another type, or there are no rows at all.
        """
        storages = Storages()
        files = [(name, file, storages[file.root]) for name, file in self._inputs.files.items()]
        with ThreadPoolExecutor(_THREADS) as pool:
            items = [item for ranges in pool.map(lambda file: self._ranges(*file), files) for item in ranges]
        if not items:
            raise DataError(f"the Parquet files of dataset.path {self._config.path!r} have no rows; correct the path")
        return [SourceShard(f"{number:05d}-of-{len(items):05d}", item) for number, item in enumerate(items)]

    def _ranges(self, name: str, file: InputFile, storage: Storage) -> list[dict[str, Json]]:
        """Consecutive row groups of one file, as many as stay within `shard_rows` but at least one."""
        with _opened(storage, file.path) as opened:
            self._check_columns(opened.schema_arrow, storage.where(file.path))
            group_rows = [opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups)]
        ranges: list[dict[str, Json]] = []
        start, rows, first_row = 0, 0, 0
        for group, num_rows in enumerate([*group_rows, 0]):
            is_end = group == len(group_rows)
            if rows and (is_end or rows + num_rows > self._config.shard_rows):
                groups = {"row_groups": [start, group], "first_row": first_row, "num_rows": rows}
                ranges.append({"name": name, "root": file.root, "path": file.path, **groups})
                start, rows, first_row = group, 0, first_row + rows
            rows += num_rows
        return ranges

    def _check_columns(self, schema: pa.Schema, where: str) -> None:
        for key, column in self._columns.items():
            fits, expected = _EXPECTED[key]
            if column not in schema.names:
                raise missing_column(where, key, column, schema.names)
            if schema.names.count(column) > 1:
                raise DataError(f"{where} has more than one column {column!r}; rename them or set dataset.{key}")
            if not fits(found := schema.field(column).type):
                raise DataError(f"{where}: column {column!r} is {found}, not {expected}; set dataset.{key} or convert it")

    def read(self, shard: SourceShard) -> Iterator[RawExample | BadExample]:
        """The rows of one shard, in the file's order.

        Raises:
            DataError: the file changed so that it cannot be read, or a split is none of train, validation and test.
            StorageError: the images lie in an object store that cannot be read.
        """
        name, first_row = shard.items["name"], shard.items["first_row"]
        columns = sorted(set(self._columns.values()))
        with _opened(Storages()[shard.items["root"]], shard.items["path"]) as file:
            where = f"{shard.items['root']}/{shard.items['path']}".partition("?")[0]
            self._check_columns(file.schema_arrow, where)
            _check_groups(file, shard, where)
            rows = _rows(file, range(*shard.items["row_groups"]), columns, (where, first_row))
            if _is_string(file.schema_arrow.field(self._config.image_column).type):
                yield from self._followed(rows, shard)
            else:
                for row, values in rows:
                    image = _encoded(values[self._config.image_column])
                    # By the file's name within the source and not by its path: moved data must give the same tables.
                    yield make_example(self._config, image, values, f"{name}#row={row}", Location(name, row, None))

    def _followed(self, rows: Iterator[tuple[int, Mapping[str, Any]]], shard: SourceShard) -> Iterator[RawExample | BadExample]:
        """Rows whose images are files of their own."""
        name, path, column = shard.items["name"], shard.items["path"], self._config.image_column
        # Without `image_root` paths are relative to the table that names them, and locations to all tables' common folder.
        # Tables in several buckets have none, and the name of such a table is not its path.
        inside = "" if self._config.image_root is not None else path.rpartition("/")[0]
        is_found_again = self._config.image_root is not None or name == path
        folder = self._folder(shard.items["root"])
        for (row, values), found in folder.read_all(rows, lambda item: _below(inside, item[1][column])):
            uri = f"{name}#row={row}"
            if isinstance(found, UnusableRowError):
                yield BadExample(uri, str(found))
            else:
                location = Location(_below(inside, values[column]) or "", 0, len(found)) if is_found_again else None
                yield make_example(self._config, found, values, uri, location)

    def _folder(self, root: str) -> ImageFolder:
        return ImageFolder(self._config.image_root or root, "dataset.image_root")

    def fetch(self, locations: Sequence[Location]) -> Iterator[bytes]:
        """Images again, each row group's column read once where the locations are sorted; see `ReferableSource`.

        Raises:
            DataError: a file is gone or was altered.
        """
        if any(location.length is not None for location in locations):
            yield from self._fetch_files(locations)
        else:
            yield from self._fetch_rows(locations)

    def _fetch_files(self, locations: Sequence[Location]) -> Iterator[bytes]:
        folder = self._folder(self._config.image_root or self._inputs.folder or "")
        yield from folder.read_again(locations)

    def _fetch_rows(self, locations: Sequence[Location]) -> Iterator[bytes]:
        storages = Storages()
        start = 0
        while start < len(locations):
            name = locations[start].file
            end = next((i for i in range(start, len(locations)) if locations[i].file != name), len(locations))
            file = self._inputs.files.get(name)
            if file is None:
                raise DataError(f"{name} is not among the files of dataset.path {self._config.path!r} any more; put it back")
            with _opened(storages[file.root], file.path) as opened:
                where = storages[file.root].where(file.path)
                yield from _images_at(opened, self._config.image_column, [at.offset for at in locations[start:end]], where)
            start = end


def _encoded(value: Any) -> bytes | None:
    image: bytes | None = value["bytes"] if isinstance(value, dict) else value
    return image


def _below(folder: str, named: str | None) -> str | None:
    if named is None or not folder or named.startswith("/") or "://" in named:
        return named
    return f"{folder}/{named}"


def _check_groups(file: pq.ParquetFile, shard: SourceShard, where: str) -> None:
    """Refuse a file that was replaced since its row groups were listed."""
    first, end = shard.items["row_groups"]
    known = end <= file.metadata.num_row_groups
    if not known or sum(file.metadata.row_group(g).num_rows for g in range(first, end)) != shard.items["num_rows"]:
        raise DataError(f"{where} changed while it was being read; wait until it is complete, then run again")


def _rows(
    file: pq.ParquetFile, groups: Sequence[int], columns: Sequence[str], place: tuple[str, int]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number and values of every row of some row groups; arguments and errors are those of `_batches`."""
    for first, batch in _batches(file, groups, columns, place):
        try:
            lists = [batch.column(column).to_pylist() for column in columns]
        except UnicodeDecodeError as error:
            last = first + batch.num_rows - 1
            raise DataError(f"{place[0]} has text that is not UTF-8 in rows {first} to {last}; write it again") from error
        for row, values in enumerate(zip(*lists, strict=True), first):
            yield row, dict(zip(columns, values, strict=True))


def _batches(
    file: pq.ParquetFile, groups: Sequence[int], columns: Sequence[str], place: tuple[str, int]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Number of the first row and values of every batch of some row groups, in bounded memory.

    Args:
        file: the open file.
        groups: numbers of the row groups.
        columns: which to read.
        place: where the file is, for messages, and the number of the first row.

    Raises:
        DataError: the file is damaged.
    """
    where, row = place
    try:
        for batch in file.iter_batches(_batch_rows(file, groups), row_groups=groups, columns=columns, use_threads=False):
            yield row, batch
            row += batch.num_rows
    except (pa.ArrowInvalid, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{where} is damaged at row {row} or soon after ({_reason(error)}); write the file again") from error


def _batch_rows(file: pq.ParquetFile, groups: Sequence[int]) -> int:
    """So many rows as hold about `_BATCH_BYTES`: 256 photographs of 8 MB would be 2 GB."""
    metadata = [file.metadata.row_group(group) for group in groups]
    rows: int = sum(group.num_rows for group in metadata)
    size: int = sum(group.total_byte_size for group in metadata)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(1, size)))


def _images_at(file: pq.ParquetFile, column: str, wanted: Sequence[int], where: str) -> Iterator[bytes]:
    """Images by number of row; a row before its predecessor's batch begins its row group again."""
    group_rows = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    ends = list(accumulate(group_rows))
    group, first, images = -1, 0, pa.array([])
    batches: Iterator[tuple[int, pa.RecordBatch]] = iter(())
    for row in wanted:
        if not 0 <= row < file.metadata.num_rows:
            raise DataError(f"{where} has no row {row} any more; put the file back as it was, or run again")
        if group < 0 or row < first or row >= ends[group]:
            group = bisect_right(ends, row)
            batches = _batches(file, [group], [column], (where, ends[group] - group_rows[group]))
            first, images = row, []
        while row >= first + len(images):
            first, batch = next(batches)
            images = batch.column(column)
        image = _encoded(images[row - first].as_py())
        if image is None:
            raise DataError(f"{where} has no image in row {row} any more; put the file back as it was, or run again")
        yield image
