"""The dataset stage: from a source's shards to deduplicated, split, sharded examples.

Two phases. `ingest` reads one source shard, decodes every image once to be sure that it can be, and writes the good rows
sorted by the hash of their content. `write` takes one range of those hashes from every ingested file, so that all copies of
an image meet in one unit: they become one example with united tags, in one split. Shards are ranges of hashes, so they do
not depend on how the source was cut. Rejected: dropping duplicates per source shard, which keeps every copy that lies in
another one.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hardmoe.config import Json
from hardmoe.data.config import DatasetConfig
from hardmoe.data.images import UndecodableImageError, content_id, decode
from hardmoe.data.reading import sortable
from hardmoe.data.schemas import EXAMPLES, INGESTED, ORIGIN, QUARANTINE, SPLITS
from hardmoe.data.source_files import SOURCE_FILE, checked_inventory, source_table
from hardmoe.data.sources.base import BadExample, RawExample, SourceShard
from hardmoe.data.sources.registry import open_source
from hardmoe.errors import DataError
from hardmoe.hashing import hash_fractions
from hardmoe.stage import Completion, Context, DriverContext, Finished, Phase, Unit, UnitContext
from hardmoe.tables import build_table, ids_to_array, write_table

_SPLIT_SEED = 0
"""Not the recipe's seed: runs of several seeds must be judged on the same test examples."""
_ID_RANGE = 1 << 64
_NUMBERS = re.compile(r"\b\d+\b")
_REASONS = 20
"""At most so many kinds of reasons are told apart in the record; every row's own reason is in the quarantine tables."""


class DatasetWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Ingest every source shard, then write every range of hashes."""
        config = _config(context)
        source = open_source(config)
        inventory = checked_inventory(context, source)
        shards = source.shards()
        units = [
            Unit(s.name, {"shard": {"name": s.name, "items": s.items}, "index": i, "of": len(shards)})
            for i, s in enumerate(shards)
        ]
        ingested = yield Phase("ingest", units)
        num_rows = sum(done.payload["rows"] for done in ingested)
        if num_rows == 0:
            raise DataError(_nothing_usable(config, ingested))
        count = -(-num_rows // config.shard_rows)
        sources = [done.scratch["rows"] for done in ingested if done.payload["rows"]]
        written = yield Phase("write", [Unit(f"{i:05d}", {"index": i, "of": count, "sources": sources}) for i in range(count)])
        if config.id_column is not None:
            yield Phase("check-ids", [Unit("all", {"sources": [done.scratch["ids"] for done in written]})])
        summary = _summary(config, ingested, written)
        checked_inventory(context, source)
        return Finished(summary, {SOURCE_FILE: source_table(inventory)})

    def run(self, context: UnitContext) -> Json:
        """One source shard, one range of hashes, or the check of the ids."""
        if context.phase == "ingest":
            return _ingest(context)
        if context.phase == "write":
            return _write(context)
        return _check_ids(context)


def _config(context: Context) -> DatasetConfig:
    return context.stage.section(DatasetConfig, "dataset")


def _summary(config: DatasetConfig, ingested: Sequence[Completion], written: Sequence[Completion]) -> Json:
    sizes = {split: sum(done.payload["sizes"][split] for done in written) for split in SPLITS}
    if not sizes["train"]:
        raise DataError(f"no example is left for training ({sizes}); lower dataset.test_fraction or correct dataset.split_column")
    reasons: Counter[str] = Counter()
    for done in ingested:
        reasons.update(done.payload["reasons"])
    listed = dict(_commonest(reasons))
    others = reasons.total() - sum(listed.values())
    return {
        "source": config.source,
        "sizes": sizes,
        "quarantined": reasons.total(),
        "quarantine_reasons": listed | ({"other reasons": others} if others else {}),
        "copies_merged": sum(done.payload["copies_merged"] for done in written),
        "without_tags": sum(done.payload["without_tags"] for done in written),
    }


def _nothing_usable(config: DatasetConfig, ingested: Sequence[Completion]) -> str:
    bad = sum(sum(done.payload["reasons"].values()) for done in ingested)
    examples = sorted({reason for done in ingested for reason in done.payload["reasons"]})[:2]
    found = f"{bad} rows, none with a usable image ({'; '.join(examples)})" if bad else "no rows at all"
    return (
        f"the source '{config.source}' at {config.path or 'its packaged files'} has {found}; correct dataset.path and its columns"
    )


def _ingest(context: UnitContext) -> Json:
    config = _config(context)
    described = context.unit.arguments["shard"]
    shard = SourceShard(described["name"], described["items"])
    good: list[tuple[bytes, RawExample]] = []
    bad: list[BadExample] = []
    for count, row in enumerate(open_source(config).read(shard)):
        checked = _checked(row, config.max_pixels)
        if isinstance(checked, BadExample):
            bad.append(checked)
        else:
            good.append((content_id(checked.image), checked))
        context.progress(count, max(count + 1, config.shard_rows))
    good.sort(key=lambda item: (item[0], item[1].source_uri))
    with context.scratch("rows") as out:
        pq.write_table(_ingested_table(good), out, row_group_size=256, compression="zstd")
    if bad:
        name = f"quarantine/part-{context.unit.arguments['index']:05d}-of-{context.unit.arguments['of']:05d}.parquet"
        columns = {"source_uri": [row.source_uri for row in bad], "reason": [row.reason for row in bad]}
        write_table(context.output(name), build_table(QUARANTINE, columns))
    return {"rows": len(good), "reasons": dict(sorted(Counter(_kind(row.reason) for row in bad).items()))}


def _kind(reason: str) -> str:
    """A reason without the numbers that would make every broken image a kind of its own."""
    head, bracket, details = reason.partition("(")
    return re.sub(r"\d+ x \d+", "N x N", head) + bracket + _NUMBERS.sub("N", details)


def _commonest(reasons: Counter[str]) -> list[tuple[str, int]]:
    """The commonest reasons by number, equally common ones by name."""
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:_REASONS]


def _checked(row: RawExample | BadExample, max_pixels: int) -> RawExample | BadExample:
    if isinstance(row, BadExample):
        return row
    if row.split is not None and row.split not in SPLITS:
        return BadExample(row.source_uri, f"the split is {row.split!r}, not one of {', '.join(SPLITS)}")
    try:
        decode(row.image, max_pixels)
    except UndecodableImageError as error:
        return BadExample(row.source_uri, str(error))
    return row


def _ingested_table(rows: Sequence[tuple[bytes, RawExample]]) -> Any:
    columns = {
        "content_id": [identity for identity, _ in rows],
        "image": [row.image for _, row in rows],
        "tags": [list(row.tags) for _, row in rows],
        "source_uri": [row.source_uri for _, row in rows],
        "key": [row.key for _, row in rows],
        "split": [row.split for _, row in rows],
    }
    return build_table(INGESTED, columns)


def _write(context: UnitContext) -> Json:
    config = _config(context)
    index, count = context.unit.arguments["index"], context.unit.arguments["of"]
    low, high = _range_bounds(index, count)
    rows = [row for path in context.unit.arguments["sources"] for row in _rows_between(context, path, low, high)]
    rows.sort(key=lambda row: (row["content_id"], row["source_uri"]))
    merged = [_merge(copies) for copies in _grouped(rows)]
    merged.sort(key=lambda example: example["example_id"])
    splits = _splits(config, merged)
    sizes = {}
    for split in SPLITS:
        chosen = [example for example, into in zip(merged, splits, strict=True) if into == split]
        sizes[split] = len(chosen)
        if chosen:
            columns = {name: [example[name] for example in chosen] for name in EXAMPLES.names}
            write_table(context.output(f"split={split}/part-{index:05d}-of-{count:05d}.parquet"), build_table(EXAMPLES, columns))
    origins = [(example["example_id"], uri) for example in merged for uri in example["origins"]]
    table = build_table(ORIGIN, {"example_id": [i for i, _ in origins], "source_uri": [uri for _, uri in origins]})
    if origins:
        write_table(context.output(f"origin/part-{index:05d}-of-{count:05d}.parquet"), table)
    if config.id_column is not None:
        # One row for an example, however many copies it has: an id that is there twice is then of two images.
        named = {"example_id": [e["example_id"] for e in merged], "source_uri": [e["origins"][0] for e in merged]}
        write_table(context.scratch("ids"), build_table(ORIGIN, named))
    without_tags = sum(not example["tags"] for example in merged)
    return {"sizes": sizes, "copies_merged": len(rows) - len(merged), "without_tags": without_tags}


def _range_bounds(index: int, count: int) -> tuple[bytes, bytes | None]:
    """The half-open range of ids of one output shard; None for the end."""
    low = (index * _ID_RANGE // count).to_bytes(8, "big")
    return low, None if index + 1 == count else ((index + 1) * _ID_RANGE // count).to_bytes(8, "big")


def _rows_between(context: UnitContext, path: str, low: bytes, high: bytes | None) -> Iterator[dict[str, Any]]:
    """Rows of an ingested file whose content ids lie in the range; reads only the row groups that may hold some."""
    with context.storage.open_input(path) as source:
        file = pq.ParquetFile(source)
        for group in range(file.num_row_groups):
            statistics = file.metadata.row_group(group).column(0).statistics
            known = statistics is not None and statistics.has_min_max
            if known and (statistics.max < low or (high is not None and statistics.min >= high)):
                continue
            for row in file.read_row_group(group).to_pylist():
                if row["content_id"] >= low and (high is None or row["content_id"] < high):
                    yield row


def _grouped(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Consecutive rows of the same content."""
    group: list[dict[str, Any]] = []
    for row in rows:
        if group and row["content_id"] != group[0]["content_id"]:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _merge(copies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One example from all its copies: tags united, the strictest split, the first key as its name."""
    keys = sorted(row["key"] for row in copies if row["key"] is not None)
    named = {row["split"] for row in copies if row["split"] is not None}
    return {
        "example_id": _key_id(keys[0]) if keys else copies[0]["content_id"],
        "content_id": copies[0]["content_id"],
        "image": copies[0]["image"],
        "tags": sorted({tag for row in copies for tag in row["tags"]}),
        "origins": [row["source_uri"] for row in copies],
        # A copy of a held-out example must not be trained on, whatever its own row says.
        "split": next((split for split in reversed(SPLITS) if split in named), None),
    }


def _key_id(key: str) -> bytes:
    return hashlib.sha256(f"key:{key}".encode()).digest()[:16]


def _splits(config: DatasetConfig, examples: Sequence[dict[str, Any]]) -> list[str]:
    """The split of every example: as its source says, else by the hash of its content, so that copies never straddle."""
    ids_N16: NDArray[np.uint8] = np.frombuffer(b"".join(e["content_id"] for e in examples), np.uint8).reshape(-1, 16)
    fractions_N = hash_fractions(ids_N16, _SPLIT_SEED, "split")
    chosen = []
    for example, fraction in zip(examples, fractions_N, strict=True):
        if example["split"] is not None:
            chosen.append(example["split"])
        elif fraction < config.test_fraction:
            chosen.append("test")
        else:
            chosen.append("validation" if fraction < config.test_fraction + config.validation_fraction else "train")
    return chosen


def _check_ids(context: UnitContext) -> Json:
    """Refuse two different images under one key: every join in the run is by id."""
    tables = []
    for path in context.unit.arguments["sources"]:
        with context.storage.open_input(path) as source:
            tables.append(pq.read_table(source))
    table = pa.concat_tables(tables)
    # As arrays: the ids of a hundred million examples are 1.6 GB, and as Python objects ten times that.
    keys_N = sortable(ids_to_array(table.column("example_id")))
    order_N = np.argsort(keys_N)
    repeated = np.flatnonzero(keys_N[order_N[1:]] == keys_N[order_N[:-1]])
    if len(repeated):
        uris = table.column("source_uri")
        first, second = sorted(uris[int(row)].as_py() for row in order_N[repeated[0] : repeated[0] + 2])
        raise DataError(
            f"{first} and {second} have the same '{_config(context).id_column}' but different images; "
            "correct the column, or leave dataset.id_column out"
        )
    return {"ids": table.num_rows}
