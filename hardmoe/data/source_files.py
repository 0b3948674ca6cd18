"""The external files that a dataset was made from, kept with it as a table of name, size and digest.

A dataset is refused when its source's digest is another one; this table is what turns two digests into "changed:
photos/7.parquet". Rejected: comparing with the inventory's cache, which is overwritten by the very look that finds the change.
"""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hardmoe.data.inventory import Inventory, cache_of, take_inventory
from hardmoe.data.schemas import SOURCE_FILES
from hardmoe.data.sources.base import Source
from hardmoe.errors import DataError
from hardmoe.stage import Context, InputArtifact
from hardmoe.tables import build_table, read_table

SOURCE_FILE = "source.parquet"


def checked_inventory(context: Context, source: Source) -> Inventory:
    """The source's files, which must still be those that the run was planned for.

    Raises:
        DataError: some were written to, added or removed meanwhile.
    """
    inventory = take_inventory(source.files(), context.storage, cache_of(context.stage.name))
    if inventory.digest() != context.stage.config["source"]["sha256"]:
        raise DataError(
            "files of dataset.path changed while they were being read; wait until they are complete, "
            f"delete {context.storage.where(context.stage.name)} and run again"
        )
    return inventory


def source_table(inventory: Inventory) -> bytes:
    """The content of `source.parquet`."""
    rows = [(name, size, digest) for name, (size, digest) in sorted(inventory.files.items())]
    columns = {name: [row[index] for row in rows] for index, name in enumerate(SOURCE_FILES.names)}
    return parquet_bytes(build_table(SOURCE_FILES, columns))


def parquet_bytes(table: Any) -> bytes:
    """A small table as Parquet, for a finish to write."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def read_source_table(dataset: InputArtifact) -> Inventory:
    """The files that a finished dataset was made from."""
    table = read_table(dataset.storage, dataset.path(SOURCE_FILE), SOURCE_FILES)
    return Inventory({row["name"]: (row["size"], row["digest"]) for row in table.to_pylist()})
