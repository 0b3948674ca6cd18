"""The features stage where the features were computed elsewhere: files joined to the dataset by example id.

Three phases. `index` notes of every example in which shard and row of the dataset it is; `scatter` reads a piece of a file
and writes its rows by shard; `gather` brings one shard's rows into the order of its examples. Features are never held beyond
one run of 64 MB and one shard; the index takes 24 bytes per example in every scattering unit (2.4 GB for a hundred million).
Rejected: sorting both sides by id ranges, which bounds the index as well but writes every feature twice, since a shard of a
dataset with an id column is no range of ids.

Shape letters: N examples, M rows of a file, n rows of a shard, D width.
"""

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hardmoe.arrays import load_arrays, save_arrays
from hardmoe.config import Json
from hardmoe.data.ids import id_order, id_words
from hardmoe.data.places import open_place
from hardmoe.data.ragged import consecutive
from hardmoe.data.schemas import SPLITS
from hardmoe.data.shuffle import read_buckets, write_buckets
from hardmoe.data.sources.base import SourceFile
from hardmoe.errors import DataError, StorageError
from hardmoe.features.columns import FEATURE, ID, check_columns, read_ids, read_vectors
from hardmoe.features.config import FeaturesConfig
from hardmoe.features.files import features_files, features_inventory
from hardmoe.stage import Completion, DriverContext, Finished, InputArtifact, Phase, Unit, UnitContext, name_within
from hardmoe.tables import (
    ID_TYPE,
    build_table,
    ids_from_array,
    ids_to_array,
    iterate_table,
    vector_type,
    vectors_from_array,
    write_table,
)

_UNIT_ROWS = 1 << 18
"""Row groups of one file are put together to about so many rows for a unit."""
_BATCH_ROWS = 1 << 13
_RUN_BYTES = 64 << 20
"""So many bytes of features are sorted by shard at a time."""
_IDS = pa.schema([(ID, ID_TYPE)])


class ExternalFeaturesWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Index the examples, scatter the files' rows by shard, gather every shard."""
        config = _config(context)
        _check_unchanged(context, config)
        shards = _shards(context.input("dataset"))
        pieces = [piece for number, file in enumerate(features_files(config)) for piece in _pieces(context, number, file)]
        (indexed,) = yield Phase("index", [Unit("all", {"shards": [path for _, path in shards]})])
        common = {"index": indexed.scratch["index"], "shards": len(shards)}
        scattered = yield Phase("scatter", [Unit(piece.name, {**piece.arguments, **common}, piece.cost) for piece in pieces])
        dim = _check_scattered(context, scattered)
        runs = [done.scratch[name] for done in scattered for name in sorted(done.scratch)]
        shared = {"runs": context.share("runs.json", json.dumps(runs).encode()), "dim": dim}
        units = [Unit(_unit_name(path), {"path": path, "bucket": bucket, **shared}) for bucket, (_, path) in enumerate(shards)]
        gathered = yield Phase("gather", units)
        rows = {
            split: sum(d.payload["rows"] for d, (into, _) in zip(gathered, shards, strict=True) if into == split)
            for split in SPLITS
        }
        _check_complete(sum(rows.values()), gathered)
        _check_unchanged(context, config)
        return Finished({"rows": rows, "dim": dim, "extra_rows": sum(done.payload["extra"] for done in scattered)})

    def run(self, context: UnitContext) -> Json:
        """The index, a piece of a file, or a shard."""
        if context.phase == "index":
            return _index(context)
        return _scatter(context) if context.phase == "scatter" else _gather(context)


def _config(context: DriverContext) -> FeaturesConfig:
    return FeaturesConfig.model_validate(context.stage.operational["features"])


def _check_unchanged(context: DriverContext, config: FeaturesConfig) -> None:
    if features_inventory(config, context.storage).digest() != context.stage.config["external"]["sha256"]:
        raise DataError(
            "files of features.path changed while they were being read; wait until they are complete, "
            f"delete {context.storage.where(context.stage.name)} and run again"
        )


def _shards(dataset: InputArtifact) -> list[tuple[str, str]]:
    """Split and path within the dataset of every shard."""
    return [(split, name_within(dataset, path)) for split in SPLITS for path in dataset.files(f"split={split}/")]


def _unit_name(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder.removeprefix('split=')}-{name.removesuffix('.parquet')}"


def _pieces(context: DriverContext, number: int, file: SourceFile) -> Iterator[Unit]:
    """Consecutive row groups of one file, about `_UNIT_ROWS` rows each; the file's columns are checked here."""
    with _opened(file.path) as table:
        check_columns(table.schema_arrow, file.name, context.stage.config["external"]["named_by_key"])
        groups = [table.metadata.row_group(group).num_rows for group in range(table.metadata.num_row_groups)]
    first = rows = 0
    for group, count in enumerate(groups):
        rows += count
        if rows >= _UNIT_ROWS or (rows and group + 1 == len(groups)):
            arguments = {"path": file.path, "file": file.name, "groups": [first, group + 1]}
            yield Unit(f"{number:05d}-{first:05d}", arguments, cost=rows)
            first, rows = group + 1, 0


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    with ExitStack() as stack:
        try:
            table = pq.ParquetFile(stack.enter_context(closing(open_place(path))))
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} is not a whole Parquet file ({_first_line(error)}); correct features.path") from error
        except StorageError as error:
            raise DataError(f"{path} cannot be read ({error}); correct features.path") from error
        yield table


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _index(context: UnitContext) -> Json:
    """Shard and row of every example, by its id."""
    dataset = context.input("dataset")
    ids, shard, row = [np.zeros((0, 16), np.uint8)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for bucket, path in enumerate(context.unit.arguments["shards"]):
        ids_n16 = _ids_of(dataset, path)
        ids.append(ids_n16)
        shard.append(np.full(len(ids_n16), bucket, np.int32))
        row.append(np.arange(len(ids_n16), dtype=np.int32))
    all_N16 = np.concatenate(ids)
    order_N = id_order(all_N16)
    high_N, low_N = id_words(all_N16)
    arrays: dict[str, NDArray[Any]] = {"high": high_N, "low": low_N, "shard": np.concatenate(shard), "row": np.concatenate(row)}
    save_arrays(context.scratch("index"), {name: array[order_N] for name, array in arrays.items()})
    return {"examples": len(order_N)}


def _ids_of(dataset: InputArtifact, path: str) -> NDArray[np.uint8]:
    pieces = [ids_to_array(t.column(ID)) for t in iterate_table(dataset.storage, dataset.path(path), _IDS, rows=1 << 16)]
    return np.concatenate(pieces) if pieces else np.zeros((0, 16), np.uint8)


@dataclass(frozen=True)
class _Index:
    """Where examples are, sorted by id."""

    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    shard: NDArray[np.int32]
    row: NDArray[np.int32]

    def find(self, ids_M16: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of these ids are examples' (positions among the M), and at which places of the index they are."""
        high_M, low_M = id_words(ids_M16)
        first_M = np.searchsorted(self.high, high_M, "left")
        # Two examples may share the first half of their ids; then every one of the range is looked at.
        count_M = np.searchsorted(self.high, high_M, "right") - first_M
        position = np.repeat(np.arange(len(ids_M16)), count_M)
        place = consecutive(first_M, count_M)
        same = self.low[place] == low_M[position]
        return position[same], place[same]


def _scatter(context: UnitContext) -> Json:
    arguments = context.unit.arguments
    index = _Index(**load_arrays(context.storage, arguments["index"]))
    waiting: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float16]]] = []
    rows = extra = size = runs = 0
    widths: set[int] = set()
    for ids_M16, vectors_MD in _rows_of(context):
        position, place = index.find(ids_M16)
        widths.add(vectors_MD.shape[1])
        if len(widths) > 1:
            raise DataError(
                f"{arguments['file']}: features of {min(widths)} and of {max(widths)} numbers; all must have one length"
            )
        rows, extra = rows + len(ids_M16), extra + len(ids_M16) - len(position)
        waiting.append((index.shard[place], index.row[place], vectors_MD[position]))
        size += waiting[-1][2].nbytes
        if size >= _RUN_BYTES:
            _write_run(context, runs, waiting)
            waiting, size, runs = [], 0, runs + 1
        context.progress(rows, context.unit.cost)
    if waiting:
        _write_run(context, runs, waiting)
    return {"rows": rows, "extra": extra, "widths": sorted(widths)}


def _rows_of(context: UnitContext) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float16]]]:
    arguments, named_by_key = context.unit.arguments, context.stage.config["external"]["named_by_key"]
    file = arguments["file"]
    with _opened(arguments["path"]) as table:
        try:
            for batch in table.iter_batches(
                _BATCH_ROWS, row_groups=range(*arguments["groups"]), columns=[ID, FEATURE], use_threads=False
            ):
                yield read_ids(batch.column(ID), file, named_by_key), read_vectors(batch.column(FEATURE), file)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file} is damaged ({_first_line(error)}); write it again") from error


def _write_run(context: UnitContext, number: int, waiting: Sequence[tuple[Any, Any, Any]]) -> None:
    shard_M, row_M, vectors_MD = (np.concatenate(columns) for columns in zip(*waiting, strict=True))
    # As opaque bytes: a row is moved as a whole, and Arrow takes those of any width.
    kind = pa.binary(2 * vectors_MD.shape[1])
    vectors = pa.FixedSizeBinaryArray.from_buffers(kind, len(vectors_MD), [None, pa.py_buffer(vectors_MD)])
    table = pa.table({"row": row_M, "vector": vectors})
    write_buckets(context.scratch(f"run-{number:05d}"), table, shard_M.astype(np.int64), context.unit.arguments["shards"])


def _check_scattered(context: DriverContext, scattered: Sequence[Completion]) -> int:
    """The width of all features.

    Raises:
        DataError: there are several widths, or no row is an example's.
    """
    rows, extra = (sum(done.payload[name] for done in scattered) for name in ("rows", "extra"))
    if rows == extra:
        keyed = context.stage.config["external"]["named_by_key"]
        named = "keys of dataset.id_column" if keyed else "ids of dataset/split=…, or set dataset.id_column"
        raise DataError(f"none of the {rows} rows of features.path is of an example of the dataset; give the {named}")
    widths = sorted({width for done in scattered for width in done.payload["widths"]})
    if len(widths) > 1:
        raise DataError(f"the files of features.path have features of different widths {widths}; give features of one width")
    return int(widths[0])


def _gather(context: UnitContext) -> Json:
    arguments, dataset = context.unit.arguments, context.input("dataset")
    ids_n16 = _ids_of(dataset, arguments["path"])
    runs, bucket = json.loads(context.storage.read_bytes(arguments["runs"])), arguments["bucket"]
    found = read_buckets(context.storage, runs, bucket, bucket + 1)
    row_M = found.column("row").to_numpy()
    chunks = found.column("vector").chunks
    width = arguments["dim"]
    parts = [np.frombuffer(c.buffers()[1], np.float16, width * len(c), 2 * width * c.offset) for c in chunks if len(c)]
    vectors_MD = np.concatenate([np.zeros(0, np.float16), *parts]).reshape(-1, width)
    order_M = np.argsort(row_M, kind="stable")
    row_M, vectors_MD = row_M[order_M], vectors_MD[order_M]
    again = np.flatnonzero(row_M[1:] == row_M[:-1])
    if len(differing := again[(vectors_MD[again] != vectors_MD[again + 1]).any(axis=1)]):
        example = ids_n16[row_M[differing[0]]].tobytes().hex()
        raise DataError(f"features.path has two different features of example {example}; keep one")
    missing = np.setdiff1d(np.arange(len(ids_n16)), row_M)
    if len(missing):
        return {"rows": len(ids_n16), "missing": len(missing), "example": ids_n16[missing[0]].tobytes().hex()}
    first_n = np.searchsorted(row_M, np.arange(len(ids_n16)))
    schema = pa.schema([(ID, ID_TYPE), (FEATURE, vector_type(width))])
    columns = {ID: ids_from_array(ids_n16), FEATURE: vectors_from_array(vectors_MD[first_n])}
    write_table(context.output(arguments["path"]), build_table(schema, columns))
    return {"rows": len(ids_n16), "missing": 0, "example": None}


def _check_complete(examples: int, gathered: Sequence[Completion]) -> None:
    if missing := sum(done.payload["missing"] for done in gathered):
        example = next(done.payload["example"] for done in gathered if done.payload["missing"])
        raise DataError(
            f"{missing} of {examples} examples have no feature in features.path, such as {example}; add them, or leave these "
            "images out of the dataset"
        )
