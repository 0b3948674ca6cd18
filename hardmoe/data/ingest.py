"""The dataset stage: from a source's shards to deduplicated, split, sharded examples.

    ingest     a unit per source shard    decode every image once, hash it, note where its bytes lie; bad rows go to quarantine
    merge      a unit per range of ids    all copies of an image meet: one example with united tags, in one split
    check-ids  by range of ids            no two images under one name
    near-…     see `near_stage`           which images nearly equal which, and which of them are to go
    write      copies: a unit per range of ids; references: a unit per source shard

Copies are global, so no source shard can decide them alone: rows are regrouped by the hash of their content (`shuffle`), and
only they, never pixels. Images that are to be copied are put by as they arrive, one after another, and fetched by byte range
when their shard is written, so no unit holds more than the images of one shard of the dataset. Shards of copies are ranges
of hashes and do not depend on how the source was cut; shards of references keep the source's order, or reading a Parquet
file through them would read every row group a thousand times. Rejected: dropping duplicates per source shard, which keeps
every copy that lies in another one, and a hash table of all ids on the driver.
"""

import json
from collections.abc import Generator, Sequence

from hardmoe.config import Json
from hardmoe.data.config import AUTO_COPY_BYTES, DatasetConfig
from hardmoe.data.given_parts import check_parts, collect_parts, numbers_by_value
from hardmoe.data.ingest_findings import check_ingested, dataset_summary
from hardmoe.data.ingest_shard import ingest_shard
from hardmoe.data.inventory import Inventory
from hardmoe.data.merging import check_ids, merge_range
from hardmoe.data.near_stage import NEAR_PHASES, NearResult, looks_for_near_duplicates, near_phases, run_near_unit
from hardmoe.data.source_files import SOURCE_FILE, checked_inventory, source_table
from hardmoe.data.sources.base import NamingSource, ReferableSource, Source
from hardmoe.data.sources.registry import open_source
from hardmoe.data.splits import check_test_examples
from hardmoe.data.stages import EXPECTED_PARTS, is_followed_by
from hardmoe.data.writing import write_copies, write_references
from hardmoe.errors import DataError
from hardmoe.stage import Completion, Context, DriverContext, Finished, Phase, Unit, UnitContext

_MOST_BUCKETS = 1024
_SHARD_BYTES = 256 * 2**20
"""A shard of copies holds about so many bytes of images at most, whatever `shard_rows` says: a unit holds it in memory."""
_IDS_PER_CHECK = 1 << 22


class DatasetWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Ingest, merge, look for near-duplicates, write."""
        config = _config(context)
        source = open_source(config)
        inventory = checked_inventory(context, source)
        store = _store(config, source, inventory)
        ingested = yield _ingest_phase(config, source, store)
        check_ingested(context.stage, config, ingested)
        parts = _parts(context, config, ingested)
        count = _num_shards(config, store, ingested)
        rows = context.share("rows.json", json.dumps([done.scratch["rows"] for done in ingested]).encode())
        back = len(ingested) if store == "reference" else 1
        # The number of buckets is the ingested files' own business; a range takes those it touches.
        common = {"of": count, "rows": rows, "buckets": _num_buckets(len(ingested)), "back": back}
        merged = yield Phase("merge", [Unit(f"{i:05d}", {"index": i, **common}) for i in range(count)])
        if config.id_column is not None:
            yield _id_phase(context, merged)
        near = NearResult()
        if looks_for_near_duplicates(config):
            near = yield from near_phases(context, config, merged)
        # What every unit of the last phase is told besides.
        common = {"removed": near.removed_path, "parts": _shared_numbers(context, parts)}
        written = yield _write_phase(context, store, ingested, merged, common)
        summary = dataset_summary(config, store, ingested, merged, written, near)
        if is_followed_by(context.stage, "evaluation"):
            check_test_examples(config, summary["sizes"])
        checked_inventory(context, source)
        return Finished(summary | ({"parts": parts} if parts else {}), {SOURCE_FILE: source_table(inventory)})

    def run(self, context: UnitContext) -> Json:
        """One unit of the phase."""
        if context.phase in NEAR_PHASES:
            return run_near_unit(context, _config(context))
        return _RUN[context.phase](context, _config(context))


_RUN = {
    "ingest": ingest_shard,
    "merge": merge_range,
    "check-ids": check_ids,
    "write-copy": write_copies,
    "write-reference": write_references,
}


def _config(context: Context) -> DatasetConfig:
    return context.stage.section(DatasetConfig, "dataset")


def _store(config: DatasetConfig, source: Source, inventory: Inventory) -> str:
    """`copy` or `reference`."""
    can_refer = isinstance(source, ReferableSource)
    if config.store == "reference" and not can_refer:
        raise DataError(f"the source '{config.source}' cannot read single images again; set dataset.store: copy")
    if config.store != "auto":
        return config.store
    if config.store_size is not None or not can_refer:
        return "copy"
    if isinstance(source, NamingSource) and source.names_images():
        # A table of 10 MB may name a terabyte, and to ask for a billion sizes takes days.
        return "reference"
    size = sum(size for size, _ in inventory.files.values())
    # Nothing in a compressed archive has a place of its own.
    is_compressed = any(name.endswith((".gz", ".tgz")) for name in inventory.files)
    return "reference" if size > AUTO_COPY_BYTES and not is_compressed else "copy"


def _ingest_phase(config: DatasetConfig, source: Source, store: str) -> Phase:
    shards = source.shards()
    common = {
        "of": len(shards),
        "store": store,
        "buckets": _num_buckets(len(shards)),
        "near": looks_for_near_duplicates(config),
    }
    units = [
        Unit(shard.name, {"shard": {"name": shard.name, "items": shard.items}, "index": i, **common}, can_isolate=True)
        for i, shard in enumerate(shards)
    ]
    return Phase("ingest", units)


def _num_buckets(num_shards: int) -> int:
    """A power of two near the number of shards."""
    return min(_MOST_BUCKETS, 1 << max(0, num_shards - 1).bit_length())


def _num_shards(config: DatasetConfig, store: str, ingested: Sequence[Completion]) -> int:
    num_rows: int = sum(done.payload["rows"] for done in ingested)
    size: int = sum(done.payload["bytes"] for done in ingested) if store == "copy" else 0
    return max(-(-num_rows // config.shard_rows), -(-size // _SHARD_BYTES))


def _id_phase(context: DriverContext, merged: Sequence[Completion]) -> Phase:
    total = sum(done.payload["examples"] for done in merged)
    count = max(1, -(-total // _IDS_PER_CHECK))
    paths = context.share("ids.json", json.dumps([done.scratch["ids"] for done in merged]).encode())
    return Phase("check-ids", [Unit(f"{i:05d}", {"ids": paths, "index": i, "of": count}) for i in range(count)])


def _write_phase(
    context: DriverContext, store: str, ingested: Sequence[Completion], merged: Sequence[Completion], told: Json
) -> Phase:
    if store == "copy":
        images = context.share("images.json", json.dumps([done.scratch["images"] for done in ingested]).encode())
        common = {"of": len(merged), "images": images, **told}
        units = [Unit(f"{i:05d}", {"index": i, "examples": done.scratch["examples"], **common}) for i, done in enumerate(merged)]
        return Phase("write-copy", units)
    examples = context.share("examples.json", json.dumps([done.scratch["examples"] for done in merged]).encode())
    common = {"of": len(ingested), "examples": examples, **told}
    kept = [i for i, done in enumerate(ingested) if done.payload["rows"]]
    return Phase("write-reference", [Unit(f"{i:05d}", {"index": i, **common}) for i in kept])


def _parts(context: DriverContext, config: DatasetConfig, ingested: Sequence[Completion]) -> Json:
    """The parts that the column gives; None where there is none. Refused now if they are not the experts that are asked for."""
    if config.part_column is None:
        return None
    parts = collect_parts(config.part_column, (done.payload["parts"] for done in ingested))
    if (experts := context.stage.operational.get(EXPECTED_PARTS)) is not None:
        check_parts(parts, experts)
    return parts


def _shared_numbers(context: DriverContext, parts: Json) -> str | None:
    return None if parts is None else context.share("parts.json", json.dumps(numbers_by_value(parts)).encode())
