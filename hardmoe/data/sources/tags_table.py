"""A CSV or JSONL file of hashtags, one row per image, read in pieces that are described by a byte offset.

One pass over the file finds where each piece begins and which images are named at all; a worker then reads its own piece and
nothing before it. A row that is broken in itself (other fields, no UTF-8, no JSON) is handed on with its reason. Rejected:
pandas and `pyarrow.csv`, which guess types (an id `007` becomes 7) and lose the number of the row.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from hardmoe.data.encodings import HEAD_BYTES, check_utf8
from hardmoe.data.sources.fields import UnusableRowError
from hardmoe.errors import DataError
from hardmoe.storage import Storage

_BOM = b"\xef\xbb\xbf"
_MOST_LINE_BYTES = 16 * 2**20
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_LINES = {"jsonl", "ndjson"}
_SURROGATE = re.compile("[\ud800-\udfff]")

Values = Mapping[str, Any] | UnusableRowError
"""The fields of a row by column, or why it has none."""


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    number: int
    """Its place, from 0, the header not counted."""
    offset: int
    """Where it begins in the file."""
    values: Values


class TagsTable:
    """The table.

    Args:
        storage: where it is.
        path: the file.

    Raises:
        DataError: the name's ending is of no kind of table that can be read.
    """

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage, self._path = storage, path
        self._where = storage.where(path)
        self._ending = path.rpartition(".")[2].lower()
        if self._ending not in _LINES | _DELIMITERS.keys():
            raise DataError(f"dataset.tags_path {self._where!r} is neither CSV nor JSONL; give a file named .csv, .tsv or .jsonl")

    def columns(self) -> list[str] | None:
        """The header of a CSV file; None for JSONL, whose rows have their own.

        Raises:
            DataError: it is not in UTF-8, or has no header.
        """
        if self._ending in _LINES:
            return None
        with self._opened() as source:
            header = next(self._cells(source), None)
        if not header or not any(header):
            raise DataError(f"{self._where} has no header; give its columns names in the first line")
        if repeated := [name for name in header if header.count(name) > 1]:
            raise DataError(f"{self._where} has more than one column {repeated[0]!r}; rename one")
        return header

    def rows(self, offset: int = 0, number: int = 0) -> Iterator[Row]:
        """The rows from one on, to the end.

        Args:
            offset: where the row begins, as a `Row` says it; 0 for the first.
            number: its number.

        Raises:
            DataError: the file is not in UTF-8, or malformed so that rows cannot be told apart.
            StorageError: it cannot be read.
        """
        columns = self.columns()
        with self._opened() as source:
            if offset:
                source.seek(offset)
            found = self._objects(source) if columns is None else self._records(source, columns, skip=not offset)
            for at, values in found:
                yield Row(number, at, values)
                number += 1

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        with closing(self._storage.open_input(self._path)) as source:
            head = source.read(HEAD_BYTES)
            check_utf8(head, self._where)
            source.seek(len(_BOM) if head.startswith(_BOM) else 0)
            yield source

    def _objects(self, source: BinaryIO) -> Iterator[tuple[int, Values]]:
        at = source.tell()
        for line in self._lines(source):
            if line.strip():
                yield at, _object(line)
            at += len(line)

    def _records(self, source: BinaryIO, columns: list[str], *, skip: bool) -> Iterator[tuple[int, Values]]:
        at = source.tell()
        cells = self._cells(source)
        if skip:
            next(cells, None)
            at = source.tell()
        for record in cells:
            if record:
                yield at, _record(record, columns)
            at = source.tell()

    def _cells(self, source: BinaryIO) -> Iterator[list[str]]:
        """Records of a CSV file; the reader takes one line at a time, so the file stands where the next record begins."""
        # Bytes that are no UTF-8 spoil their own row only.
        text = (line.decode("utf-8", "surrogateescape") for line in self._lines(source))
        # The module's own limit of 128 kB is the process's; a row with many hashtags is longer, and lines are bounded above.
        csv.field_size_limit(max(csv.field_size_limit(), _MOST_LINE_BYTES))
        reader = csv.reader(text, delimiter=_DELIMITERS[self._ending], strict=True)
        try:
            yield from reader
        except csv.Error as error:
            raise DataError(f"{self._where} is no CSV file near byte {source.tell()} ({error}); correct it") from error

    def _lines(self, source: BinaryIO) -> Iterator[bytes]:
        while line := source.readline(_MOST_LINE_BYTES + 1):
            if len(line) > _MOST_LINE_BYTES:
                raise DataError(f"{self._where} has a line of more than 16 MiB before byte {source.tell()}; correct it")
            yield line


def _object(line: bytes) -> Values:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return UnusableRowError("the line is not valid JSON")
    return found if isinstance(found, dict) else UnusableRowError("the line is not a JSON object")


def _record(record: list[str], columns: list[str]) -> Values:
    if len(record) != len(columns):
        return UnusableRowError("the row has another number of cells than the header")
    if any(not cell.isascii() and _SURROGATE.search(cell) for cell in record):
        return UnusableRowError("the row is not UTF-8")
    return dict(zip(columns, record, strict=True))
