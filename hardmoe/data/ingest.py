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
from collections import Counter
from collections.abc import Generator, Sequence

from hardmoe.config import Json
from hardmoe.data.config import DatasetConfig
from hardmoe.data.given_parts import check_parts, collect_parts, numbers_by_value
from hardmoe.data.ingest_shard import ingest_shard
from hardmoe.data.inventory import Inventory
from hardmoe.data.merging import check_ids, merge_range
from hardmoe.data.near_stage import NEAR_PHASES, NearResult, looks_for_near_duplicates, near_phases, run_near_unit
from hardmoe.data.schemas import SPLITS
from hardmoe.data.source_files import SOURCE_FILE, checked_inventory, source_table
from hardmoe.data.sources.base import NamingSource, ReferableSource, Source
from hardmoe.data.sources.registry import open_source
from hardmoe.data.splits import check_test_examples
from hardmoe.data.stages import EXPECTED_PARTS, is_followed_by
from hardmoe.data.writing import write_copies, write_references
from hardmoe.errors import DataError
from hardmoe.stage import Completion, Context, DriverContext, Finished, Phase, Stage, Unit, UnitContext

_MOST_BUCKETS = 1024
_AUTO_COPY_BYTES = 64 * 2**30
_SHARD_BYTES = 256 * 2**20
"""A shard of copies holds about so many bytes of images at most, whatever `shard_rows` says: a unit holds it in memory."""
_IDS_PER_CHECK = 1 << 22
_LISTED = "'hardmoe logs dataset' lists them"
_REASONS = 20
"""At most so many kinds of reasons are told apart in the record; every row's own reason is in the quarantine tables."""


class DatasetWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Ingest, merge, look for near-duplicates, write."""
        config = _config(context)
        source = open_source(config)
        inventory = checked_inventory(context, source)
        store = _store(config, source, inventory)
        ingested = yield _ingest_phase(config, source, store)
        _check_ingested(context.stage, config, ingested)
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
        summary = _summary(config, store, ingested, merged, written, near)
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
    return "reference" if size > _AUTO_COPY_BYTES and not is_compressed else "copy"


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


def _check_ingested(stage: Stage, config: DatasetConfig, ingested: Sequence[Completion]) -> None:
    good = sum(done.payload["rows"] for done in ingested)
    reasons = _reasons(ingested)
    bad = reasons.total()
    examples = "; ".join(f"{reason} ({count})" for reason, count in _commonest(reasons)[:2])
    if not good:
        found = f"{bad} rows, none with a usable image ({examples}; {_LISTED})" if bad else "no rows at all"
        raise DataError(
            f"the source '{config.source}' at {_listed(config.path or 'its packaged files')} has {found}; "
            "correct dataset.path and its columns" + (" or dataset.image_root" if "no such file" in reasons else "")
        )
    if is_followed_by(stage, "vocabulary") and not any(done.payload["tagged"] for done in ingested):
        raise DataError(_without_hashtags(config, good, examples))
    if bad > config.max_bad_fraction * (good + bad):
        raise DataError(
            f"{bad} of {good + bad} rows cannot be used, more than dataset.max_bad_fraction={config.max_bad_fraction:g} "
            f"({examples}; {_LISTED}); correct dataset.path and its columns, or raise max_bad_fraction"
        )


def _without_hashtags(config: DatasetConfig, num_images: int, reasons: str) -> str:
    """Why no image has a hashtag: known here, before anything is copied."""
    if config.source != "folder":
        return f"none of the {num_images} images has a hashtag; correct dataset.tags_column"
    if config.tags_path is None:
        return (
            f"none of the {num_images} images below {_listed(config.path)} lies in a folder whose name would be its hashtag; "
            "set dataset.tags_path to a table of hashtags"
        )
    told = f" ({reasons}; {_LISTED})" if reasons else ""
    return (
        f"no row of {config.tags_path} gives any of the {num_images} images below {_listed(config.path)} a hashtag{told}; its "
        "paths must be relative to dataset.path, and dataset.tags_column must name its column of hashtags"
    )


def _listed(path: str | list[str] | None) -> str:
    return ", ".join(path) if isinstance(path, list) else str(path)


def _reasons(ingested: Sequence[Completion]) -> Counter[str]:
    reasons: Counter[str] = Counter()
    for done in ingested:
        reasons.update(done.payload["reasons"])
    return reasons


def _commonest(reasons: Counter[str]) -> list[tuple[str, int]]:
    """The commonest reasons by number, equally common ones by name."""
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:_REASONS]


def _summary(
    config: DatasetConfig,
    store: str,
    ingested: Sequence[Completion],
    merged: Sequence[Completion],
    written: Sequence[Completion],
    near: NearResult,
) -> Json:
    sizes = {split: sum(done.payload["sizes"][split] for done in written) for split in SPLITS}
    if not sizes["train"] and near.summary() and (removed := near.summary()["removed"]["train"]):
        raise DataError(
            f"no example is left for training, since all {removed} training images nearly equal others; "
            "set dataset.near_duplicates: none, or lower dataset.near_difference"
        )
    if not sizes["train"]:
        raise DataError(f"no example is left for training ({sizes}); lower dataset.test_fraction or correct dataset.split_column")
    reasons = _reasons(ingested)
    listed = dict(_commonest(reasons))
    others = reasons.total() - sum(listed.values())
    return {
        "source": config.source,
        "store": store,
        "sizes": sizes,
        "quarantined": reasons.total(),
        "quarantine_reasons": listed | ({"other reasons": others} if others else {}),
        "copies_merged": sum(done.payload["copies_merged"] for done in merged),
        "near_duplicates": near.summary(),
        "without_tags": sum(done.payload["without_tags"] for done in written),
    }
