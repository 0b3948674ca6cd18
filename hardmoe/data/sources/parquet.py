"""Parquet files of encoded images and hashtags, as data lakes and Hugging Face's datasets hold them.

A shard is a range of row groups of one file, about `dataset.shard_rows` rows: a row group is the smallest piece that can
be read without reading its neighbours, so a larger one is not divided. Only footers are read to list the shards, and
every file's columns are checked then, so a wrong column stops the run before any work. Encoded bytes pass through
unchanged. Rejected: `pyarrow.dataset`, which unifies schemas silently and hides which file and row a value came from.
"""

import glob
import os
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hardmoe.config import Json
from hardmoe.data.config import DatasetConfig
from hardmoe.data.hashtags import split_tags
from hardmoe.data.sources.base import BadExample, RawExample, SourceFile, SourceShard
from hardmoe.errors import DataError

_SPLITS = ("train", "validation", "test")
_BATCH_ROWS = 256


def _expand(pattern: str) -> list[Path]:
    """The files that one entry of `dataset.path` names."""
    if "://" in pattern:
        raise DataError(f"dataset.path {pattern!r} is a URI and the source 'parquet' reads local files; copy or mount it here")
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise DataError(f"dataset.path {pattern!r} is a folder; give a pattern such as {pattern.rstrip('/') + '/*.parquet'!r}")
    if path.exists():
        return [path]
    # pathlib's glob takes no absolute pattern and returns hidden files, such as a half-finished download.
    found = [Path(match) for match in glob.glob(str(path), recursive=True)]  # noqa: PTH207
    if files := [match for match in found if match.is_file()]:
        return files
    here = "" if path.is_absolute() else f" (looked from {Path.cwd()})"
    raise DataError(f"dataset.path {pattern!r} matches no file{here}; correct the path")


def _find_files(config: DatasetConfig) -> dict[str, Path]:
    """Name relative to the files' common folder to path, sorted, each file once."""
    patterns = [config.path] if isinstance(config.path, str) else config.path or []
    if not patterns:
        raise DataError("the source 'parquet' needs dataset.path; give a file, a pattern such as photos/*.parquet, or a list")
    by_place = {path.absolute(): path for pattern in patterns for path in _expand(pattern)}
    folder = os.path.commonpath([place.parent for place in by_place])
    return dict(sorted((place.relative_to(folder).as_posix(), path) for place, path in by_place.items()))


def _open(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        reason = _reason(error)
        raise DataError(f"{path} is not a Parquet file ({reason}); correct dataset.path or write the file again") from error
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there any more; put it back, or correct dataset.path") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({_reason(error)}); correct dataset.path") from error


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
    return _is_binary(type_)


def _is_tags(type_: pa.DataType) -> bool:
    is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
    item = type_.value_type if is_list else type_
    # A file whose rows all lack hashtags is written with the type null, or list<null>.
    return _is_string(item) or bool(pa.types.is_null(item))


def _is_key(type_: pa.DataType) -> bool:
    return _is_string(type_) or _is_binary(type_) or pa.types.is_integer(type_)


_EXPECTED = {
    "image_column": (_is_image, "encoded images: binary, or a struct with a binary field 'bytes'"),
    "tags_column": (_is_tags, "hashtags: list<string>, or one string to be split"),
    "id_column": (_is_key, "names: string, integer or binary"),
    "split_column": (_is_string, "strings: train, validation or test"),
}


class ParquetSource:
    """Rows of Parquet files; see the module's docstring."""

    def __init__(self, config: DatasetConfig) -> None:
        """Remember what is asked; the files are looked for when they are listed, and not by every worker again."""
        self._config = config
        chosen = {key: getattr(config, key) for key in _EXPECTED}
        self._columns: dict[str, str] = {key: column for key, column in chosen.items() if column is not None}

    @cached_property
    def _paths(self) -> dict[str, Path]:
        return _find_files(self._config)

    def files(self) -> list[SourceFile]:
        """The Parquet files, named relative to their common folder.

        Raises:
            DataError: no path, or a path that matches nothing.
        """
        stats = [(name, path, path.stat()) for name, path in self._paths.items()]
        return [SourceFile(name, str(path), stat.st_size, str(stat.st_mtime_ns)) for name, path, stat in stats]

    def shards(self) -> list[SourceShard]:
        """Ranges of row groups, numbered over all files.

        Raises:
            DataError: a file is not Parquet, lacks a column or has one of another type, or there are no rows at all.
        """
        items = [item for name, path in self._paths.items() for item in self._ranges(name, str(path))]
        if not items:
            raise DataError(f"the Parquet files of dataset.path {self._config.path!r} have no rows; correct the path")
        return [SourceShard(f"{number:05d}-of-{len(items):05d}", item) for number, item in enumerate(items)]

    def _ranges(self, name: str, path: str) -> Iterator[dict[str, Json]]:
        """Consecutive row groups of one file, as many as stay within `shard_rows` but at least one."""
        with _open(path) as file:
            self._check_columns(file.schema_arrow, path)
            group_rows = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        start, rows, first_row = 0, 0, 0
        for group, num_rows in enumerate([*group_rows, 0]):
            is_end = group == len(group_rows)
            if rows and (is_end or rows + num_rows > self._config.shard_rows):
                groups = {"row_groups": [start, group], "first_row": first_row, "num_rows": rows}
                yield {"name": name, "path": path, **groups}
                start, rows, first_row = group, 0, first_row + rows
            rows += num_rows

    def _check_columns(self, schema: pa.Schema, path: str) -> None:
        for key, column in self._columns.items():
            fits, expected = _EXPECTED[key]
            if column not in schema.names:
                nearest = get_close_matches(column, schema.names, n=1)
                suggestion = f", perhaps to {nearest[0]!r}" if nearest else ""
                raise DataError(f"{path} has no column {column!r}, only {', '.join(schema.names)}; set dataset.{key}{suggestion}")
            if schema.names.count(column) > 1:
                raise DataError(f"{path} has more than one column {column!r}; rename them or set dataset.{key}")
            if not fits(found := schema.field(column).type):
                raise DataError(f"{path}: column {column!r} is {found}, not {expected}; set dataset.{key} or convert it")

    def read(self, shard: SourceShard) -> Iterator[RawExample | BadExample]:
        """The rows of one shard, in the file's order.

        Raises:
            DataError: the file changed so that it cannot be read, or a split is none of train, validation and test.
        """
        path = shard.items["path"]
        start, end = shard.items["row_groups"]
        row = shard.items["first_row"]
        with _open(path) as file:
            self._check_columns(file.schema_arrow, path)
            columns = sorted(set(self._columns.values()))
            try:
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=range(start, end), columns=columns):
                    yield from self._examples(batch, shard.items["name"], row)
                    row += batch.num_rows
            except (pa.ArrowInvalid, UnicodeDecodeError, OSError) as error:
                where = f"{path} is damaged at row {row} or soon after"
                raise DataError(f"{where} ({_reason(error)}); write the file again") from error

    def _examples(self, batch: pa.RecordBatch, name: str, first_row: int) -> Iterator[RawExample | BadExample]:
        nothing: list[Any] = [None] * batch.num_rows
        images, tags, keys, splits = (
            batch.column(self._columns[key]).to_pylist() if key in self._columns else nothing for key in _EXPECTED
        )
        for offset in range(batch.num_rows):
            # By the file's name within the source and not by its path: moved data must give the same tables.
            uri = f"{name}#row={first_row + offset}"
            image = images[offset]["bytes"] if isinstance(images[offset], dict) else images[offset]
            if image is None:
                yield BadExample(uri, "null image")
            elif "id_column" in self._columns and keys[offset] is None:
                yield BadExample(uri, f"null in the id column {self._columns['id_column']!r}")
            else:
                yield RawExample(image, _tags(tags[offset]), uri, _key(keys[offset]), self._split(splits[offset], uri))

    def _split(self, value: str | None, uri: str) -> str | None:
        column = self._columns.get("split_column")
        if column is not None and value not in _SPLITS:
            found = "null" if value is None else repr(value)
            raise DataError(f"{uri}: split {found} in column {column!r} is none of {', '.join(_SPLITS)}; correct the data")
        return value


def _tags(value: str | list[str | None] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return tuple(split_tags(value)) if isinstance(value, str) else tuple(tag for tag in value if tag is not None)


def _key(value: str | int | bytes | None) -> str | None:
    if value is None:
        return None
    return value.hex() if isinstance(value, bytes) else str(value)
