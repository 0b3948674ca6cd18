"""Writing the shards of the dataset: with the images, or with where they lie.

A shard of copies is one range of content ids, its images fetched by byte range from what the ingested shards put by. A shard
of references is what came from one shard of the source, in the source's order, so that reading it reads the source forwards.
Within a shard of copies the rows are sorted by example id. Where a column gives the parts, a small table beside each shard
says so row by row. Rejected: one more column of the shard, whose schema would then depend on the recipe.

Shape letters: E examples, R removed.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hardmoe.arrays import load_arrays
from hardmoe.config import Json
from hardmoe.data.byte_ranges import read_ranges
from hardmoe.data.config import DatasetConfig
from hardmoe.data.ids import is_among
from hardmoe.data.schemas import EXAMPLES, PARTS, PARTS_FOLDER, REFERENCES, SPLITS
from hardmoe.data.shuffle import read_buckets
from hardmoe.stage import UnitContext
from hardmoe.tables import build_table, ids_to_array, write_table

_FILES_AT_ONCE = 8
"""On an object store the wait for an answer is most of the time; on a disk it does no harm."""


def write_copies(context: UnitContext, config: DatasetConfig) -> Json:
    """Write one range of ids with its images."""
    arguments = context.unit.arguments
    rows = _kept(context, read_buckets(context.storage, [arguments["examples"]], 0, 1)).sort_by("example_id")
    images = json.loads(context.storage.read_bytes(arguments["images"]))
    sizes = {}
    for code, split in enumerate(SPLITS):
        chosen = rows.filter(pc.equal(rows.column("split"), code))
        sizes[split] = chosen.num_rows
        if chosen.num_rows:
            columns = {"image": pa.array(_fetched(context, images, chosen), pa.binary())}
            columns |= {name: chosen.column(name) for name in EXAMPLES.names if name != "image"}
            write_table(context.output(_name(split, arguments)), build_table(EXAMPLES, columns))
            _write_parts(context, split, chosen)
    return {"sizes": sizes, "without_tags": _without_tags(rows)}


def write_references(context: UnitContext, config: DatasetConfig) -> Json:
    """Write where the images of one shard of the source lie."""
    arguments = context.unit.arguments
    paths = json.loads(context.storage.read_bytes(arguments["examples"]))
    rows = _kept(context, read_buckets(context.storage, paths, arguments["index"], arguments["index"] + 1))
    rows = rows.sort_by([("file", "ascending"), ("offset", "ascending"), ("content_id", "ascending")])
    sizes = {}
    for code, split in enumerate(SPLITS):
        chosen = rows.filter(pc.equal(rows.column("split"), code))
        sizes[split] = chosen.num_rows
        if chosen.num_rows:
            columns = {name: chosen.column(name) for name in REFERENCES.names}
            write_table(context.output(_name(split, arguments)), build_table(REFERENCES, columns))
            _write_parts(context, split, chosen)
    return {"sizes": sizes, "without_tags": _without_tags(rows)}


def _name(split: str, arguments: Json) -> str:
    return f"split={split}/part-{arguments['index']:05d}-of-{arguments['of']:05d}.parquet"


def _write_parts(context: UnitContext, split: str, rows: Any) -> None:
    """The part of every row, where a column gives it."""
    arguments = context.unit.arguments
    if arguments["parts"] is None:
        return
    numbers = json.loads(context.storage.read_bytes(arguments["parts"]))
    columns = {"example_id": rows.column("example_id"), "part": [numbers[part] for part in rows.column("part").to_pylist()]}
    write_table(context.output(f"{PARTS_FOLDER}/{_name(split, arguments)}"), build_table(PARTS, columns))


def _kept(context: UnitContext, rows: Any) -> Any:
    """The rows but for those that were removed as near-duplicates."""
    path = context.unit.arguments["removed"]
    if path is None:
        return rows
    removed_R16 = load_arrays(context.storage, path)["content_id"]
    return rows.filter(pa.array(~is_among(ids_to_array(rows.column("content_id")), removed_R16)))


def _fetched(context: UnitContext, images: list[str], rows: Any) -> list[bytes]:
    """The encoded images of rows of `MERGED`, in their order."""
    shards_E, offsets_E, lengths_E = (rows.column(name).to_numpy().astype(np.int64) for name in ("shard", "offset", "length"))
    found: list[bytes] = [b""] * rows.num_rows
    by_shard = [np.flatnonzero(shards_E == shard) for shard in np.unique(shards_E)]

    def read(at: NDArray[np.int64]) -> list[bytes]:
        return read_ranges(context.storage, images[int(shards_E[at[0]])], offsets_E[at], lengths_E[at])

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for at, data in zip(by_shard, pool.map(read, by_shard), strict=True):
            for position, image in zip(at.tolist(), data, strict=True):
                found[position] = image
    return found


def _without_tags(rows: Any) -> int:
    return int(np.count_nonzero(rows.column("tags").combine_chunks().value_lengths().to_numpy(zero_copy_only=False) == 0))
