"""Parquet tables with a fixed schema, written atomically and read strictly.

A table's columns are fixed where it is written and checked where it is read, so that a truncated shard, a renamed column or
another type is one clear error that names the file, never a wrong number later. Rejected: Arrow datasets over directories,
which read whatever lies there; hardmoe reads the files that a record names. Rejected too: Arrow's threads, here and wherever
else a Parquet file is read. They call back into Python for every byte, so one that still lets go of a buffer when the process
ends takes it down ("terminate called without an active exception"), and workers have a process for every core already.

Shape letters: N rows, D feature dimension.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hardmoe.errors import CorruptFileError, SchemaError
from hardmoe.storage import OutputFile, Storage

ID_TYPE = pa.binary(16)
"""Type of `example_id`: sixteen bytes, shown as hexadecimal digits."""

IMAGE = "image"
"""Name of the column of encoded images, where a table has one."""

_MOST_GROUP_ROWS = 1024
_LEAST_GROUP_ROWS = 16
_GROUP_BYTES = 4 * 2**20
"""Of the images of a row group, at most: few enough to stay in the cache on their way through the reader."""


def vector_type(dimension: int) -> Any:
    """Type of a column of float16 vectors of one length."""
    return pa.list_(pa.float16(), dimension)


def write_table(out: AbstractContextManager[OutputFile], table: Any, row_group_size: int | None = None) -> OutputFile:
    """Write a table as Parquet into an output that `Storage.open_output` (or a unit) opened; returns the closed output.

    The same table gives the same bytes. Images are compressed already: their column is stored as it is, without dictionary, in
    row groups of a few megabytes. An image of 43 kB is then read in 29 us, its checksum included, instead of 71.
    """
    with out as sink:
        holds_images = IMAGE in table.column_names
        others = [_leaf(field) for field in table.schema if field.name != IMAGE]
        options = {
            "compression": {IMAGE: "none"} | dict.fromkeys(others, "zstd") if holds_images else "zstd",
            "use_dictionary": others if holds_images else True,
            "row_group_size": row_group_size or (_image_rows(table) if holds_images else _MOST_GROUP_ROWS),
        }
        # Without checksums five of six altered bytes of a feature shard are read as other numbers, without a word.
        pq.write_table(table, sink, write_statistics=True, store_schema=True, write_page_checksum=True, **options)
        return sink


def _leaf(field: Any) -> str:
    """What Parquet calls the values of a column: those of lists have a name of their own."""
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else str(field.name)


def _image_rows(table: Any) -> int:
    """A power of two, so that readers who take as many at a time cut no row group in two."""
    mean_bytes: int = max(1, table.column(IMAGE).nbytes // max(1, table.num_rows))
    fitting = _GROUP_BYTES // mean_bytes
    return max(_LEAST_GROUP_ROWS, min(_MOST_GROUP_ROWS, 1 << max(0, fitting.bit_length() - 1)))


def read_table(storage: Storage, path: str, schema: Any, columns: Sequence[str] | None = None) -> Any:
    """Read a whole table, or some of its columns.

    Args:
        storage: the root.
        path: the file in it.
        schema: the expected `pyarrow.Schema`; vector columns may be given by `vector_type` of any dimension -1.
        columns: names of the columns wanted; all of the schema's by default.

    Raises:
        CorruptFileError: the file is truncated or not Parquet.
        SchemaError: columns are missing or of other types.
    """
    return pa.concat_tables(list(iterate_table(storage, path, schema, columns, whole=True)))


def iterate_table(
    storage: Storage, path: str, schema: Any, columns: Sequence[str] | None = None, *, whole: bool = False, rows: int = 1024
) -> Iterator[Any]:
    """Read a table piece by piece, at most `rows` rows at a time, in the order in which it was written."""
    where = storage.where(path)
    with closing(storage.open_input(path)) as source:
        try:
            # Reading ahead would copy every row group once more.
            file = pq.ParquetFile(source, memory_map=False, page_checksum_verification=True, pre_buffer=False)
            found = file.schema_arrow
        except (pa.ArrowInvalid, OSError) as error:
            raise CorruptFileError(f"{where} is truncated or not Parquet: {_first_line(error)}") from error
        _check_schema(where, found, schema)
        names = list(columns) if columns is not None else schema.names
        try:
            if whole:
                yield file.read(columns=names, use_threads=False)
            else:
                for batch in file.iter_batches(batch_size=rows, columns=names, use_threads=False):
                    yield pa.Table.from_batches([batch])
        except (pa.ArrowInvalid, OSError) as error:
            raise CorruptFileError(f"{where} is damaged: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _check_schema(where: str, found: Any, expected: Any) -> None:
    for field in expected:
        index = found.get_field_index(field.name)
        if index < 0:
            raise SchemaError(f"{where} has no column '{field.name}'; it has {', '.join(found.names)}")
        there = found.field(index).type
        if there != field.type and not _same_vectors(there, field.type):
            raise SchemaError(f"{where}: column '{field.name}' is {there} where {field.type} is expected")


def _same_vectors(found: Any, expected: Any) -> bool:
    """Whether both are float16 vectors and the expected dimension is left open (-1, a variable list)."""
    return bool(pa.types.is_fixed_size_list(found) and pa.types.is_list(expected) and found.value_type == expected.value_type)


def ids_to_array(column: Any) -> NDArray[np.uint8]:
    """An `example_id` column as uint8 [N, 16]."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [np.frombuffer(c.buffers()[1], np.uint8, 16 * len(c), 16 * c.offset).reshape(-1, 16) for c in chunks if len(c)]
    return np.concatenate(parts) if parts else np.zeros((0, 16), np.uint8)


def ids_from_array(ids_N16: NDArray[np.uint8]) -> Any:
    """The reverse of `ids_to_array`: a pyarrow array of sixteen-byte ids."""
    return pa.FixedSizeBinaryArray.from_buffers(ID_TYPE, len(ids_N16), [None, pa.py_buffer(np.ascontiguousarray(ids_N16))])


def vectors_to_array(column: Any) -> NDArray[np.float16]:
    """A column of float16 vectors as float16 [N, D]."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    dimension = column.type.list_size
    parts = [c.flatten().to_numpy(zero_copy_only=False).reshape(-1, dimension) for c in chunks]
    return np.concatenate(parts) if parts else np.zeros((0, dimension), np.float16)


def vectors_from_array(vectors_ND: NDArray[np.floating[Any]]) -> Any:
    """The reverse: a pyarrow array of float16 vectors of one length."""
    flat = np.ascontiguousarray(vectors_ND, dtype=np.float16).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), vectors_ND.shape[1])


def lists_to_csr(column: Any) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """A list<int32> column as (values int32 [M], offsets int64 [N + 1])."""
    combined = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(combined, pa.ChunkedArray):
        combined = pa.concat_arrays(combined.chunks) if combined.num_chunks else pa.array([], combined.type)
    lengths = combined.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return combined.flatten().to_numpy(zero_copy_only=False).astype(np.int32), offsets


def build_table(schema: Any, columns: Mapping[str, Any]) -> Any:
    """A table of exactly the schema's columns, in its order."""
    return pa.table([_column(columns[field.name], field.type) for field in schema], schema=schema)


def _column(values: Any, kind: Any) -> Any:
    return values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, kind)
