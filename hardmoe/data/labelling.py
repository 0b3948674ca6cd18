"""The vocabulary stage: canonical tags, counted on training examples; every example's tags as indices, beside the images.

Three phases: `count` a training shard's tags, `choose` among all of them in one unit, `label` every shard. The driver holds
no count: whoever chooses merges them bucket by bucket, at 150 bytes for every distinct tag (seen: 0.8 GB for 5 million). The
labels are tables of their own, so a new alias rewrites a few bytes per example and never an image. Rejected: indices in the
dataset's shards, which would make every change of the vocabulary a change of everything.
"""

import hashlib
import json
from collections.abc import Generator, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hardmoe.config import Json
from hardmoe.data.aliases import TagRules, parse_rules, read_aliases, read_list
from hardmoe.data.config import HashtagsConfig
from hardmoe.data.label_ranges import RANGES_FILE, range_of, ranges_table
from hardmoe.data.schemas import EXAMPLES, LABELS, SPLITS, UNLABELLED
from hardmoe.data.shuffle import read_buckets, write_buckets
from hardmoe.data.splits import check_test_labels
from hardmoe.data.stages import is_followed_by
from hardmoe.data.vocabulary import BUCKETS, Choice, buckets_of, choose_tags, count_tags, encode_tags, lists_of, merge_counts
from hardmoe.errors import DataError
from hardmoe.stage import Completion, DriverContext, Finished, InputArtifact, Phase, Unit, UnitContext
from hardmoe.tables import build_table, ids_to_array, read_table, write_table

_TOP_TAGS = 20
_TAGS_OF_EXAMPLES = pa.schema([EXAMPLES.field("example_id"), EXAMPLES.field("tags")])
_NO_HASHTAGS, _OUTSIDE = "no hashtags", "outside the vocabulary"


class VocabularyWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Count tags per training shard; choose; label every shard."""
        config = context.stage.section(HashtagsConfig, "hashtags")
        rules = context.share("rules.json", json.dumps(_checked_rules(context, config).body()).encode())
        shards = all_shards(context.input("dataset"))
        training = [(index, path) for index, path in enumerate(shards) if "split=train/" in path]
        counted = yield Phase("count", [Unit(f"{i:05d}", {"path": path, "rules": rules}) for i, path in training])
        counts = [done.scratch["counts"] for done in counted]
        (chosen,) = yield Phase("choose", [Unit("all", {"counts": counts, "rules": rules})])
        _check_choice(config, chosen.payload)
        shared = {"rules": rules, "tags": chosen.scratch["tags"], "of": len(shards)}
        units = [Unit(f"{index:05d}", {"path": path, "index": index, **shared}) for index, path in enumerate(shards)]
        labelled = yield Phase("label", units)
        left_out = {key: sum(done.payload[key] for done in labelled) for key in ("without_hashtags", "outside_vocabulary")}
        labelled_of = {
            split: sum(done.payload["labelled"] for path, done in zip(shards, labelled, strict=True) if f"split={split}/" in path)
            for split in SPLITS
        }
        if is_followed_by(context.stage, "evaluation"):
            check_test_labels(config, labelled_of)
        names = [f"labels/{_part(index, len(shards))}" for index in range(len(shards))]
        ranges = ranges_table(names, shards, [done.payload["range"] for done in labelled])
        return Finished({**chosen.payload["summary"], **left_out, "labelled": labelled_of}, {RANGES_FILE: ranges})

    def run(self, context: UnitContext) -> Json:
        """One shard's counts, the choice, or one shard's labels."""
        rules = TagRules.from_body(json.loads(context.storage.read_bytes(context.unit.arguments["rules"])))
        if context.phase == "choose":
            return _choose(context, rules)
        return _count(context, rules) if context.phase == "count" else _label(context, rules)


def all_shards(dataset: InputArtifact) -> list[str]:
    """Storage paths of all example shards, split by split, in the order in which label parts are numbered."""
    return [path for split in SPLITS for path in dataset.files(f"split={split}/")]


def _checked_rules(context: DriverContext, config: HashtagsConfig) -> TagRules:
    """The rules, from files that are still those that the run was planned for."""
    contents = {
        "aliases": None if config.aliases is None else read_aliases(config.aliases),
        "allow": None if config.allow is None else read_list(config.allow, "allow"),
        "deny": None if config.deny is None else read_list(config.deny, "deny"),
    }
    places = {"aliases": config.aliases, "allow": config.allow, "deny": config.deny}
    for name, content in contents.items():
        found = None if content is None else hashlib.sha256(content).hexdigest()
        if found != context.stage.config[name]["sha256"]:
            raise DataError(f"{places[name]} changed while the run was starting; run again")
    return parse_rules(contents, places)


def _check_choice(config: HashtagsConfig, payload: Json) -> None:
    """An empty vocabulary is a mistake in the recipe; said by the driver, so that it ends the run like any other."""
    if payload["summary"]["num_tags"]:
        return
    if not payload["num_counted"]:
        raise DataError("no training example has a hashtag; correct dataset.tags_column or dataset.split_column")
    if payload["commonest"] is None:
        raise DataError(
            f"hashtags.allow and hashtags.deny drop all {payload['num_counted']} hashtags of the training examples; "
            "correct the lists"
        )
    commonest, largest = payload["commonest"]
    raise DataError(
        f"no hashtag is on hashtags.min_count={config.min_count} examples: the commonest, {commonest!r}, is on {largest}; "
        f"set hashtags.min_count to {largest} or less, or add data"
    )


def _read_tags(context: UnitContext) -> pa.Table:
    dataset = context.input("dataset")
    return read_table(dataset.storage, context.unit.arguments["path"], _TAGS_OF_EXAMPLES)


def _count(context: UnitContext, rules: TagRules) -> Json:
    rows = _read_tags(context)
    counts = count_tags(rows.column("tags"), rules)
    write_buckets(context.scratch("counts"), counts, buckets_of(counts.column("tag")), BUCKETS)
    return {"examples": rows.num_rows}


def _choose(context: UnitContext, rules: TagRules) -> Json:
    config = context.stage.section(HashtagsConfig, "hashtags")
    choice = choose_tags(merge_counts(_counts(context)), rules, config.min_count, config.max_tags)
    write_table(context.output("tags.parquet"), choice.kept)
    write_table(context.output("dropped.parquet"), choice.dropped, row_group_size=1 << 20)
    with context.scratch("tags") as out:
        out.write(json.dumps(choice.kept.column("tag").to_pylist()).encode())
    return {
        "summary": _summary(choice),
        "num_counted": choice.kept.num_rows + choice.dropped.num_rows,
        "commonest": choice.commonest,
    }


def _counts(context: UnitContext) -> Iterator[pa.Table]:
    paths = context.unit.arguments["counts"]
    for bucket in range(BUCKETS if paths else 0):
        yield read_buckets(context.storage, paths, bucket, bucket + 1)
        context.progress(bucket + 1, BUCKETS)


def _summary(choice: Choice) -> Json:
    dropped = choice.num_dropped()
    top = choice.kept.slice(0, _TOP_TAGS).select(["tag", "count"]).to_pylist()
    return {
        "num_tags": choice.kept.num_rows,
        "num_below_min_count": dropped["fewer than min_count"],
        "num_beyond_max_tags": dropped["beyond max_tags"],
        "dropped": dropped,
        "top_tags": top,
    }


def _label(context: UnitContext, rules: TagRules) -> Json:
    arguments = context.unit.arguments
    names = json.loads(context.storage.read_bytes(arguments["tags"]))
    rows = _read_tags(context)
    found = encode_tags(rows.column("tags"), rules, {tag: index for index, tag in enumerate(names)})
    name = _part(arguments["index"], arguments["of"])
    columns = {"example_id": rows.column("example_id"), "tags": lists_of(found, rows.num_rows)}
    write_table(context.output(f"labels/{name}"), build_table(LABELS, columns))
    missing = np.flatnonzero(np.bincount(found.rows_L, minlength=rows.num_rows) == 0)
    any_N = pc.list_value_length(rows.column("tags")).fill_null(0).to_numpy() > 0
    if len(missing):
        reasons = np.where(any_N[missing], _OUTSIDE, _NO_HASHTAGS)
        columns = {"example_id": rows.column("example_id").take(pa.array(missing)), "reason": pa.array(reasons.tolist())}
        write_table(context.output(f"unlabelled/{name}"), build_table(UNLABELLED, columns))
    with_tags = int(any_N[missing].sum())
    counts = {"without_hashtags": len(missing) - with_tags, "outside_vocabulary": with_tags}
    ids_N16 = ids_to_array(rows.column("example_id"))
    return {**counts, "labelled": rows.num_rows - len(missing), "range": range_of(ids_N16)}


def _part(index: int, count: int) -> str:
    return f"part-{index:05d}-of-{count:05d}.parquet"
