"""Datasets of Hugging Face's `datasets` library: a folder that `save_to_disk` wrote, or a dataset's name.

The encoded bytes are read from the Arrow tables as they are: the library would decode every image and hand on pixels. All
named splits are read; `dataset.split_column: split` takes over their names, where no column is called so. A shard is a range
of rows of one split. A dataset's name is looked up in the library's own cache or on the hub by every process that reads, so
several machines want a saved folder. Rejected: reading the saved Arrow files with pyarrow alone, which knows nothing of class
names and of the library's other layouts.
"""

import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from hardmoe.data.config import DatasetConfig
from hardmoe.data.schemas import SPLITS
from hardmoe.data.sources.base import BadExample, RawExample, SourceFile, SourceShard
from hardmoe.data.sources.fetching import ImageFolder
from hardmoe.data.sources.fields import UnusableRowError, make_example, missing_column
from hardmoe.data.sources.files import find_inputs
from hardmoe.errors import DataError

_BATCH_ROWS = 64
_SPLIT = "split"
"""What `dataset.split_column` says to mean the names of the splits."""
_UNNAMED = "all"
"""The only split of a dataset that was saved without any."""


class HuggingFaceSource:
    """The rows of all splits of one dataset; see the module's docstring."""

    def __init__(self, config: DatasetConfig) -> None:
        """Remember what is asked.

        Raises:
            DataError: `dataset.path` is not one folder or name.
        """
        if not isinstance(config.path, str) or not config.path:
            raise DataError(
                "the source 'huggingface' needs dataset.path; give the folder of a saved dataset, or a dataset's name"
            )
        if "://" in config.path:
            raise DataError(f"dataset.path {config.path!r} is a URI; copy the saved dataset to a folder and give that")
        self._config = config
        self._path = config.path

    @cached_property
    def _splits(self) -> dict[str, Any]:
        """Every split by name, its columns checked."""
        found = _load(self._path)
        splits = dict(found) if isinstance(found, dict) else {str(found.split or _UNNAMED): found}
        for name, rows in splits.items():
            self._check_columns(name, rows)
        return splits

    @property
    def _takes_names(self) -> bool:
        """Whether the splits' own names decide."""
        return self._config.split_column == _SPLIT and all(_SPLIT not in rows.column_names for rows in self._splits.values())

    def _check_columns(self, split: str, rows: Any) -> None:
        there = rows.column_names
        for key in ("image_column", "tags_column", "id_column", "split_column", "license_column", "part_column"):
            column = getattr(self._config, key)
            if column is None or column in there:
                continue
            if key != "split_column" or column != _SPLIT or split == _UNNAMED:
                raise missing_column(f"dataset.path {self._path!r}", key, column, there)
            if split not in SPLITS:
                raise DataError(
                    f"dataset.path {self._path!r} has a split {split!r}, which is none of {', '.join(SPLITS)}; "
                    "save it under one of these names, or leave dataset.split_column out"
                )
        kind = rows.features[self._config.image_column]
        if type(kind).__name__ != "Image" and getattr(kind, "dtype", None) not in ("binary", "large_binary"):
            column = self._config.image_column
            raise DataError(f"dataset.path {self._path!r}: column {column!r} is {kind}, not images; set dataset.image_column")

    def files(self) -> list[SourceFile]:
        """The Arrow files behind the dataset; images that they only name are not among them.

        Raises:
            DataError: there is no such dataset, or a column is missing.
        """
        names = {file["filename"]: None for rows in self._splits.values() for file in rows.cache_files}
        if not names:
            raise DataError(f"dataset.path {self._path!r} has no rows; correct the path")
        # Below the saved folder the names of the splits are part of the files' names.
        files = find_inputs(list(names), "huggingface", "saved").source_files()
        folder = os.path.abspath(Path(self._path).expanduser())  # noqa: PTH100
        if not all(file.path.startswith(f"{folder}/") for file in files):
            return files
        return [SourceFile(file.path[len(folder) + 1 :], file.path, file.size, file.version) for file in files]

    def shards(self) -> list[SourceShard]:
        """Ranges of about `dataset.shard_rows` rows, split by split.

        Raises:
            DataError: there is no such dataset, a column is missing, or it has no rows.
        """
        size = self._config.shard_rows
        items = [
            {"split": split, "start": start, "stop": min(start + size, len(rows))}
            for split, rows in self._splits.items()
            for start in range(0, len(rows), size)
        ]
        if not items:
            raise DataError(f"dataset.path {self._path!r} has no rows; correct the path")
        return [SourceShard(f"{number:05d}-of-{len(items):05d}", item) for number, item in enumerate(items)]

    def read(self, shard: SourceShard) -> Iterator[RawExample | BadExample]:
        """The rows of one range.

        Raises:
            DataError: the files changed so that they cannot be read, or a split is none of train, validation and test.
        """
        split, stop = shard.items["split"], shard.items["stop"]
        names = {self._config.image_column, self._config.tags_column, self._config.id_column}
        names |= {self._config.split_column, self._config.license_column, self._config.part_column}
        rows = self._splits[split]
        columns = sorted(name for name in names if name is not None and name in rows.column_names)
        readers = {name: _reader(rows.features[name], name == self._config.tags_column) for name in columns}
        own_name = {_SPLIT: split} if self._takes_names else {}
        table = rows.select_columns(columns).with_format("arrow")
        for start in range(shard.items["start"], stop, _BATCH_ROWS):
            try:
                batch = table[start : min(start + _BATCH_ROWS, stop)].to_pylist()
            except (OSError, ValueError) as error:
                raise DataError(f"dataset.path {self._path!r} is damaged after row {start} of {split!r} ({error})") from error
            for number, row in enumerate(batch, start):
                yield self._example({name: readers[name](row[name]) for name in columns} | own_name, f"{split}#row={number}")

    def _example(self, values: dict[str, Any], uri: str) -> RawExample | BadExample:
        try:
            image = self._encoded(values[self._config.image_column])
        except UnusableRowError as error:
            return BadExample(uri, str(error))
        return make_example(self._config, image, values, uri)

    def _encoded(self, value: Any) -> bytes | None:
        """The bytes of an image, or of the file that it names."""
        if not isinstance(value, dict) or value.get("bytes") is not None:
            image: bytes | None = value["bytes"] if isinstance(value, dict) else value
            return image
        if not value.get("path"):
            return None
        return self._folder(value["path"]).read(value["path"])

    def _folder(self, named: str) -> ImageFolder:
        """Where a path that stands for an image lies: the library writes paths of its cache, which are absolute."""
        root = self._config.image_root or ("/" if named.startswith("/") else self._path)
        return ImageFolder(root, "dataset.image_root")


def _load(path: str) -> Any:
    """A Dataset or a dictionary of them.

    Raises:
        DataError: the library is not there, or finds no dataset.
    """
    # Before the first import, since the libraries look only then; nothing but the data is to be asked for.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    try:
        import datasets
    except ImportError as error:
        raise DataError("the source 'huggingface' needs the package datasets; pip install 'hardmoe[huggingface]'") from error
    datasets.disable_progress_bars()
    folder = Path(path).expanduser()
    is_saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if not folder.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise DataError(f"dataset.path {path!r} is no folder; correct the path, or give a dataset's name")
    try:
        return datasets.load_from_disk(str(folder), keep_in_memory=False) if is_saved else datasets.load_dataset(path)
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"dataset.path {path!r} cannot be opened as a Hugging Face dataset ({reason}); correct the path"
        ) from error


def _reader(kind: Any, is_tags: bool) -> Callable[[Any], Any]:
    """From what a column's table holds to what it means: a class's number to its name, which is one hashtag."""
    inner: Any = kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", None)
    if hasattr(inner, "int2str"):
        return lambda numbers: None if numbers is None else [inner.int2str(number) for number in numbers if number >= 0]
    if not hasattr(kind, "int2str"):
        return lambda value: value
    if is_tags:
        return lambda number: None if number is None or number < 0 else [kind.int2str(number)]
    return lambda number: None if number is None or number < 0 else kind.int2str(number)
