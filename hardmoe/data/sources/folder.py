"""A folder of image files, with a CSV or JSONL table of hashtags or with the folders' own names as hashtags.

With `dataset.tags_path` a shard is a range of the table's rows, read without a listing; images that no row names follow in
shards of their own, without hashtags, and who reads those goes through table and listing again. Without it a shard is a run
of sorted names; who reads it lists again, but only the deepest folder that holds the run. So a shard's description stays
small whatever the number of files. Rejected: names in the shards' descriptions, which for ten million files would be a
gigabyte of plan, and one shard per folder, whose sizes differ a thousandfold.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from glob import has_magic
from itertools import islice
from urllib.parse import unquote

from hardmoe.config import Json
from hardmoe.data.config import DatasetConfig
from hardmoe.data.places import split_place
from hardmoe.data.sources.base import BadExample, Location, RawExample, SourceFile, SourceShard
from hardmoe.data.sources.fetching import ImageFolder
from hardmoe.data.sources.fields import IMAGE_ENDINGS, UnusableRowError, escaped, make_example, missing_column, printable
from hardmoe.data.sources.files import Inputs, find_inputs
from hardmoe.data.sources.tags_table import Row, TagsTable
from hardmoe.errors import DataError
from hardmoe.storage import open_storage

_NAMES = ("path", "file_name", "filename", "image")
"""Columns that may hold the image's path, if there is none called `dataset.image_column`."""
_NO_COLUMNS = {"id_column": None, "split_column": None, "license_column": None}
_CHECKED_ROWS = 1000
"""In so many rows of JSONL every column must be found."""


class FolderSource:
    """Image files below a folder; see the module's docstring."""

    def __init__(self, config: DatasetConfig) -> None:
        """Remember what is asked.

        Raises:
            DataError: columns are asked for, and there is no table that could have them.
        """
        self._config = config
        for key in ("id_column", "split_column", "license_column", "part_column"):
            if config.tags_path is None and getattr(config, key) is not None:
                raise DataError(f"dataset.{key} needs a table that has it; set dataset.tags_path, or leave dataset.{key} out")

    @cached_property
    def _images(self) -> Inputs:
        found = _images_in(self._config.path)
        if found.folder is None:
            raise DataError(f"dataset.path {self._config.path} names several stores; the source 'folder' reads one of them")
        if not found.files:
            endings = ", ".join(sorted(IMAGE_ENDINGS))
            raise DataError(f"dataset.path {self._config.path!r} holds no image files ({endings}); correct the path")
        return found

    @cached_property
    def _table(self) -> TagsTable | None:
        if self._config.tags_path is None:
            return None
        return TagsTable(open_storage(split_place(self._config.tags_path)[0]), self._table_name)

    @property
    def _table_name(self) -> str:
        place = self._config.tags_path or ""
        name = split_place(place)[1]
        return unquote(name) if "://" in place else name

    @property
    def _is_one_folder(self) -> bool:
        return isinstance(self._config.path, str) and not has_magic(self._config.path.partition("?")[0])

    def files(self) -> list[SourceFile]:
        """Every image, and the table.

        Raises:
            DataError: no path, or a path that matches nothing.
        """
        files = self._images.source_files()
        if self._config.tags_path is not None:
            files += find_inputs(self._config.tags_path, "folder", "tags.csv", key="dataset.tags_path").source_files()
        return sorted(files, key=lambda file: file.name)

    def shards(self) -> list[SourceShard]:
        """Ranges of the table's rows and of the images that it does not name, or runs of all images.

        Raises:
            DataError: the table lacks a column, or there is no image.
        """
        items = (
            self._runs([(name, file.path) for name, file in self._images.files.items()])
            if self._table is None
            else self._ranges(self._table)
        )
        return [SourceShard(f"{number:05d}-of-{len(items):05d}", item) for number, item in enumerate(items)]

    def _runs(self, images: Sequence[tuple[str, str]]) -> list[dict[str, Json]]:
        size = self._config.shard_rows
        runs = [images[start : start + size] for start in range(0, len(images), size)]
        return [
            {
                "top": self._images.folder,
                "within": self._deepest(run[0][1], run[-1][1]),
                "first": run[0][0],
                "last": run[-1][0],
                "num_rows": len(run),
            }
            for run in runs
        ]

    def _deepest(self, first: str, last: str) -> str:
        """The folder that holds a run of sorted paths; empty where a listing of it alone could be of other files."""
        folder = os.path.commonpath([first.rpartition("/")[0], last.rpartition("/")[0]])
        return folder if self._is_one_folder and not has_magic(folder) and escaped(folder) == folder else ""

    def _ranges(self, table: TagsTable) -> list[dict[str, Json]]:
        column = self._check_columns(table)
        starts: list[tuple[int, int]] = []
        named: set[str] = set()
        rows = 0
        top = self._images.folder or ""
        folder = ImageFolder(top, "dataset.path")
        for row in table.rows():
            if row.number % self._config.shard_rows == 0:
                starts.append((row.offset, row.number))
            rows += 1
            if path := _path_of(row, column, folder):
                named.add(path)
        items: list[dict[str, Json]] = [
            {"top": top, "column": column, "offset": offset, "row": row, "num_rows": min(self._config.shard_rows, rows - row)}
            for offset, row in starts
        ]
        unnamed = [(name, file.path) for name, file in self._images.files.items() if file.path not in named]
        return items + [item | {"column": column} for item in self._runs(unnamed)]

    def _check_columns(self, table: TagsTable) -> str:
        """The column of the images' paths; all columns must be in the header, or in one of the first rows."""
        columns = table.columns()
        where = f"dataset.tags_path {self._config.tags_path!r}"
        if columns is None:
            rows = [row.values for row in islice(table.rows(), _CHECKED_ROWS)]
            columns = list(dict.fromkeys(name for row in rows if not isinstance(row, UnusableRowError) for name in row))
        if not columns:
            raise DataError(f"{where} has no usable row; correct it, or leave it out to take the folders' names as hashtags")
        for key in ("tags_column", "id_column", "split_column", "license_column", "part_column"):
            column = getattr(self._config, key)
            if column is not None and column not in columns:
                raise missing_column(where, key, column, columns)
        names = [name for name in (self._config.image_column, *_NAMES) if name in columns]
        if not names:
            raise missing_column(where, "image_column", self._config.image_column, columns)
        return names[0]

    def read(self, shard: SourceShard) -> Iterator[RawExample | BadExample]:
        """The rows of one range of the table, or the images of one run.

        Raises:
            DataError: the folder or the table changed, or a split is none of train, validation and test.
            StorageError: the images lie in an object store that cannot be read.
        """
        items = shard.items
        folder = ImageFolder(items["top"], "dataset.path")
        if "offset" in items and self._table is not None:
            rows = islice(self._table.rows(items["offset"], items["row"]), items["num_rows"])
            yield from self._tabled(rows, items["column"], folder)
            return
        names = self._names_of_run(items)
        # Columns that an image without a row cannot have are not asked for, but for its part, which it cannot do without.
        config = self._config.model_copy(update=_NO_COLUMNS)
        for (name, path), found in folder.read_all(names, lambda item: item[1]):
            if isinstance(found, UnusableRowError):
                yield BadExample(name, str(found))
            else:
                tags = [] if "column" in items else [printable(part) for part in path.split("/")[:-1]]
                yield make_example(config, found, {config.tags_column: tags}, name, _location(path, found))

    def _tabled(self, rows: Iterable[Row], column: str, folder: ImageFolder) -> Iterator[RawExample | BadExample]:
        for row, found in folder.read_all(rows, lambda row: _text_of(row, column)):
            uri = f"{self._table_name}#row={row.number}"
            if isinstance(row.values, UnusableRowError) or isinstance(found, UnusableRowError):
                yield BadExample(printable(uri), str(row.values if isinstance(row.values, UnusableRowError) else found))
            else:
                name = folder.path_of(str(row.values[column]))
                yield make_example(self._config, found, row.values, escaped(name), _location(name, found))

    def _names_of_run(self, items: Json) -> Iterator[tuple[str, str]]:
        """Names and paths of a run, from a listing of the deepest folder that holds it all."""
        listed = self._listed_again(items)
        if "column" in items and self._table is not None:
            folder = ImageFolder(items["top"], "dataset.path")
            named = {_path_of(row, items["column"], folder) for row in self._table.rows()}
            listed = [(name, path) for name, path in listed if path not in named]
        if len(listed) != items["num_rows"]:
            raise DataError(f"files of dataset.path {self._config.path!r} appeared or vanished while they were read; run again")
        yield from listed

    def _listed_again(self, items: Json) -> list[tuple[str, str]]:
        first, last, within = items["first"], items["last"], items["within"]
        found = self._images if not within else _images_in(open_storage(items["top"]).child_uri(within))
        head = f"{within}/" if within else ""
        files = ((head + name, head + file.path) for name, file in found.files.items())
        return [(name, path) for name, path in files if first <= name <= last]

    def fetch(self, locations: Sequence[Location]) -> Iterator[bytes]:
        """Images again; see `ReferableSource`.

        Raises:
            DataError: a file is gone.
        """
        # Only a list or a pattern needs a listing to say which folder names are relative to.
        top = self._config.path if self._is_one_folder else self._images.folder
        folder = ImageFolder(str(top), "dataset.path")
        yield from folder.read_again(locations)


def _images_in(path: str | list[str] | None) -> Inputs:
    return find_inputs(path, "folder", "photos", IMAGE_ENDINGS)


def _location(path: str, image: bytes) -> Location | None:
    """None for a name that no table can hold."""
    return Location(path, 0, len(image)) if printable(path) == path else None


def _text_of(row: Row, column: str) -> str | None:
    value = None if isinstance(row.values, UnusableRowError) else row.values.get(column)
    return value if isinstance(value, str) else None


def _path_of(row: Row, column: str, folder: ImageFolder) -> str | None:
    """Where a row's image lies, if it lies anywhere below the folder."""
    text = _text_of(row, column)
    try:
        return None if text is None else folder.path_of(text)
    except UnusableRowError:
        return None
