"""Merging: the rows of one range of content ids, from all ingested shards, become examples.

All copies of an image are in one range: they become one example with united tags, in the strictest split that any of them
names, called by the first of their names; copies that a column puts into different parts are an error. Most images have no
copy, so rows without one are handled as columns and only the others one by one.

Shape letters: N rows, E examples.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hardmoe.arrays import save_arrays
from hardmoe.config import Json
from hardmoe.data.config import DatasetConfig
from hardmoe.data.ids import ID_RANGE, id_order, is_within, key_id, range_bounds, sortable
from hardmoe.data.schemas import INGESTED, MERGED, ORIGIN, SPLITS
from hardmoe.data.shuffle import read_buckets, write_buckets
from hardmoe.errors import DataError
from hardmoe.hashing import hash_fractions
from hardmoe.stage import UnitContext
from hardmoe.tables import build_table, ids_to_array, read_table, write_table

_SPLIT_SEED = 0
"""Not the recipe's seed: runs of several seeds must be judged on the same test examples."""
_NAMED = pa.schema([("example_id", INGESTED.field("content_id").type), ("source_uri", pa.string())])


def merge_range(context: UnitContext, config: DatasetConfig) -> Json:
    """Make the examples of one range, write where each came from, and hand them on."""
    arguments = context.unit.arguments
    index, count = arguments["index"], arguments["of"]
    rows = _rows_of_range(context, index, count)
    merged = _merge(rows, config.part_column)
    ids_E16 = ids_to_array(merged["content_id"])
    splits_E = _splits(config, ids_E16, merged["named"])
    columns = {name: merged[name] for name in MERGED.names if name != "split"} | {"split": pa.array(splits_E, pa.int8())}
    back = arguments["back"]
    shards_E = merged["shard"].to_numpy().astype(np.int64) if back > 1 else np.zeros(len(ids_E16), np.int64)
    write_buckets(context.scratch("examples"), build_table(MERGED, columns), shards_E, back)
    if rows.num_rows:
        _write_origin(context, rows, merged, f"origin/part-{index:05d}-of-{count:05d}.parquet")
    if config.id_column is not None:
        _write_ids(context, rows, merged)
    if rows.num_rows and rows.column("hash").null_count == 0:
        _write_signatures(context, rows, merged, splits_E)
    return {"examples": len(ids_E16), "copies_merged": rows.num_rows - len(ids_E16)}


def _rows_of_range(context: UnitContext, index: int, count: int) -> Any:
    low, high = range_bounds(index, count)
    paths = json.loads(context.storage.read_bytes(context.unit.arguments["rows"]))
    buckets = context.unit.arguments["buckets"]
    rows = read_buckets(context.storage, paths, low * buckets // ID_RANGE, (high - 1) * buckets // ID_RANGE + 1)
    inside_N = is_within(ids_to_array(rows.column("content_id")), low, high)
    return rows.filter(pa.array(inside_N)).sort_by([("content_id", "ascending"), ("source_uri", "ascending")])


def _merge(rows: Any, part_column: str | None) -> dict[str, Any]:
    """Columns of the examples, by ascending content id; `first` and `sizes` say which rows each was made of."""
    keys_N = sortable(ids_to_array(rows.column("content_id")))
    starts_E = np.flatnonzero(np.concatenate([np.ones(min(1, len(keys_N)), bool), keys_N[1:] != keys_N[:-1]]))
    sizes_E = np.diff(np.append(starts_E, len(keys_N)))
    firsts = rows.take(pa.array(starts_E))
    columns = {name: firsts.column(name).combine_chunks() for name in firsts.column_names}
    several = np.flatnonzero(sizes_E > 1).tolist()
    groups = {
        e: rows.slice(starts_E[e], sizes_E[e]).select(["tags", "split", "key", "part", "source_uri"]).to_pydict() for e in several
    }  # few, as a rule
    _check_parts(groups.values(), part_column)
    tags = _replaced(columns["tags"], {e: sorted({t for tags in g["tags"] for t in tags}) for e, g in groups.items()})
    # A copy of a held-out example must not be trained on, whatever its own row says.
    named = _replaced(columns["split"], {e: _strictest(g["split"]) for e, g in groups.items()})
    key = _replaced(columns["key"], {e: min((k for k in g["key"] if k is not None), default=None) for e, g in groups.items()})
    example_id = columns["content_id"]
    if key.null_count < len(key):
        pairs = zip(key.to_pylist(), example_id.to_pylist(), strict=True)
        example_id = pa.array([own if name is None else key_id(name) for name, own in pairs], example_id.type)
    return columns | {"tags": tags, "named": named, "example_id": example_id, "starts": starts_E, "sizes": sizes_E}


def _check_parts(groups: Iterable[Mapping[str, Any]], column: str | None) -> None:
    """Refuse copies of one image in different parts: an example has one, and which of them is meant nobody can know."""
    differing = [group for group in groups if len(set(group["part"])) > 1]
    if differing:
        parts, uris = differing[0]["part"], differing[0]["source_uri"]
        other = next(i for i, part in enumerate(parts) if part != parts[0])
        more = f" ({len(differing) - 1} more images beside it are like that)" if len(differing) > 1 else ""
        raise DataError(
            f"{uris[0]} and {uris[other]} are the same image, but the one is in part {parts[0]!r} and the other in part "
            f"{parts[other]!r} by dataset.part_column {column!r}{more}; correct the column, or leave one of them out"
        )


def _strictest(splits: Sequence[str | None]) -> str | None:
    return next((split for split in reversed(SPLITS) if split in splits), None)


def _replaced(column: Any, values: Mapping[int, Any]) -> Any:
    """The column with other values at some rows."""
    if not values:
        return column
    others = pa.array(list(values.values()), column.type)
    at_E = np.arange(len(column))
    at_E[list(values)] = len(column) + np.arange(len(values))
    return pa.concat_arrays([column, others]).take(pa.array(at_E))


def _splits(config: DatasetConfig, ids_E16: NDArray[np.uint8], named: Any) -> NDArray[np.int8]:
    """The split of every example: as its source says, else by the hash of its content, so that copies never straddle."""
    fractions_E = hash_fractions(ids_E16, _SPLIT_SEED, "split")
    held_out = config.test_fraction + config.validation_fraction
    codes = {split: code for code, split in enumerate(SPLITS)}
    by_hash_E = np.where(
        fractions_E < config.test_fraction, codes["test"], np.where(fractions_E < held_out, codes["validation"], codes["train"])
    )
    if named.null_count == len(named):
        return by_hash_E.astype(np.int8)
    asked = [codes.get(split, -1) for split in named.to_pylist()]
    return np.where(np.array(asked) >= 0, asked, by_hash_E).astype(np.int8)


def _write_origin(context: UnitContext, rows: Any, merged: Mapping[str, Any], name: str) -> None:
    """Sorted by example, as the examples themselves are where nobody named them."""
    table = build_table(ORIGIN, _by_row(rows, merged) | {"license": rows.column("license")})
    write_table(context.output(name), table.sort_by([("example_id", "ascending"), ("source_uri", "ascending")]))


def _by_row(rows: Any, merged: Mapping[str, Any]) -> dict[str, Any]:
    """Example id and source of every row."""
    at_N = np.repeat(np.arange(len(merged["sizes"])), merged["sizes"])
    return {"example_id": merged["example_id"].take(pa.array(at_N)), "source_uri": rows.column("source_uri")}


def _write_ids(context: UnitContext, rows: Any, merged: Mapping[str, Any]) -> None:
    # One row for an example, however many copies it has: an id that is there twice is then of two images.
    first = pa.array(merged["starts"])
    columns = {"example_id": merged["example_id"], "source_uri": rows.column("source_uri").take(first)}
    write_table(context.scratch("ids"), build_table(_NAMED, columns).sort_by("example_id"), row_group_size=1 << 16)


def _write_signatures(context: UnitContext, rows: Any, merged: Mapping[str, Any], splits_E: NDArray[np.int8]) -> None:
    first = pa.array(merged["starts"])
    hashes_E = rows.column("hash").take(first).to_numpy()
    save_arrays(context.scratch("hashes"), {"hash": hashes_E, "split": splits_E})
    save_arrays(context.scratch("sizes"), {name: rows.column(name).take(first).to_numpy() for name in ("pixels", "size")})
    ids = {name: ids_to_array(merged[name]) for name in ("content_id", "example_id")}
    save_arrays(context.scratch("names"), ids)
    with context.scratch("thumbnails") as out:
        # Nothing but one after another, all of one length: a row is found by its number.
        for chunk in rows.column("thumbnail").take(first).chunks:
            out.write(b"".join(chunk.to_pylist()))


def check_ids(context: UnitContext, config: DatasetConfig) -> Json:
    """Refuse two different images under one name, within one range of ids: every join in the run is by id."""
    arguments = context.unit.arguments
    bounds = range_bounds(arguments["index"], arguments["of"])
    paths = json.loads(context.storage.read_bytes(arguments["ids"]))
    table = pa.concat_tables([_named_between(context, path, *bounds) for path in paths])
    ids_N16 = ids_to_array(table.column("example_id"))
    keys_N = sortable(ids_N16)
    order_N = id_order(ids_N16)
    repeated = np.flatnonzero(keys_N[order_N[1:]] == keys_N[order_N[:-1]])
    if len(repeated):
        uris = table.column("source_uri")
        first, second = sorted(uris[int(row)].as_py() for row in order_N[repeated[0] : repeated[0] + 2])
        raise DataError(
            f"{first} and {second} have the same '{config.id_column}' but different images; "
            "correct the column, or leave dataset.id_column out"
        )
    return {"ids": table.num_rows}


def _named_between(context: UnitContext, path: str, low: int, high: int) -> Any:
    table = read_table(context.storage, path, _NAMED)
    return table.filter(pa.array(is_within(ids_to_array(table.column("example_id")), low, high)))
