"""Rows on their way between two phases: sorted into buckets where they are written, read bucket by bucket.

Every unit of the first phase writes one file with a record batch per bucket; a unit of the second reads its buckets' batches
out of all files, and no other byte. Arrow's file format finds a batch through its footer; Parquet's row groups cost a
kilobyte of metadata per column and bucket, which for a dozen rows each is more than the rows. Rejected: a small file per
(unit, bucket), which is a million files where there are a thousand of both.

Shape letters: N rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hardmoe.errors import CorruptFileError
from hardmoe.storage import OutputFile, Storage

_OPTIONS = pa.ipc.IpcWriteOptions(compression="zstd")


def write_buckets(
    out: AbstractContextManager[OutputFile], table: Any, bucket_N: NDArray[np.int64], num_buckets: int
) -> OutputFile:
    """Write a table's rows by bucket; within one they keep their order.

    Args:
        out: an opened scratch file.
        table: any table of N rows.
        bucket_N: int64 [N], the bucket of every row.
        num_buckets: how many there are.
    """
    order_N = np.argsort(bucket_N, kind="stable")
    bounds = np.searchsorted(bucket_N[order_N], np.arange(num_buckets + 1))
    with out as sink, pa.ipc.new_file(sink, table.schema, options=_OPTIONS) as writer:
        for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            # By bucket and not all at once: the rows exist twice for one bucket at a time only.
            writer.write_batch(_one_batch(table.take(pa.array(order_N[first:last]))))
        return sink


def read_buckets(storage: Storage, paths: Sequence[str], first: int, last: int, columns: Sequence[str] | None = None) -> Any:
    """The rows of the buckets from `first` up to and excluding `last`, file after file, as one table.

    Raises:
        CorruptFileError: a file is not what `write_buckets` wrote.
        ValueError: there are no files, and so no columns.
    """
    return pa.concat_tables([table for path in paths for table in _tables(storage, path, range(first, last), columns)])


def _tables(storage: Storage, path: str, buckets: range, columns: Sequence[str] | None) -> Iterator[Any]:
    with closing(storage.open_input(path)) as source:
        try:
            reader = pa.ipc.open_file(source)
            for bucket in buckets:
                table = pa.Table.from_batches([reader.get_batch(bucket)])
                yield table if columns is None else table.select(list(columns))
        except (pa.ArrowInvalid, IndexError, OSError) as error:
            raise CorruptFileError(f"{storage.where(path)} is damaged: {error}; delete it and run again") from error


def _one_batch(table: Any) -> Any:
    batches = table.combine_chunks().to_batches()
    return (
        batches[0] if batches else pa.RecordBatch.from_arrays([pa.array([], f.type) for f in table.schema], schema=table.schema)
    )
