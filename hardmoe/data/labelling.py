"""The vocabulary stage: canonical tags, counted on training examples; every example's tags as indices, beside the images.

The labels are tables of their own, so a new alias rewrites a few bytes per example and never an image. Rejected: indices in
the dataset's shards, which would make every change of the vocabulary a change of everything.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Generator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hardmoe.config import Json
from hardmoe.data.config import HashtagsConfig
from hardmoe.data.hashtags import Vocabulary, canonical_tags, load_aliases
from hardmoe.data.schemas import EXAMPLES, LABELS, SPLITS, TAGS, UNLABELLED
from hardmoe.errors import DataError
from hardmoe.stage import Completion, DriverContext, Finished, InputArtifact, Phase, Unit, UnitContext
from hardmoe.tables import build_table, read_table, write_table

_TOP_TAGS = 20


class VocabularyWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Count tags per training shard; choose; label every shard."""
        config = context.stage.section(HashtagsConfig, "hashtags")
        aliases = _checked_aliases(config, context.stage.config["aliases"]["sha256"])
        shared = context.share("aliases.json", json.dumps(aliases).encode())
        shards = all_shards(context.input("dataset"))
        training = [(index, path) for index, path in enumerate(shards) if "split=train/" in path]
        counted = yield Phase("count", [Unit(f"{i:05d}", {"path": path, "aliases": shared}) for i, path in training])
        counts: Counter[str] = Counter()
        for done in counted:
            counts.update(json.loads(context.storage.read_bytes(done.scratch["counts"])))
        vocabulary = Vocabulary.from_counts(counts, config.min_count, config.max_tags, aliases)
        shared = context.share("vocabulary.json", json.dumps({"tags": vocabulary.tags, "aliases": aliases}).encode())
        units = [Unit(f"{i:05d}", {"path": p, "index": i, "of": len(shards), "vocabulary": shared}) for i, p in enumerate(shards)]
        labelled = yield Phase("label", units)
        return Finished(_summary(vocabulary, labelled), {"tags.parquet": _tags_table(vocabulary)})

    def run(self, context: UnitContext) -> Json:
        """One shard: its tags' counts, or its labels."""
        dataset = context.input("dataset")
        rows = read_table(dataset.storage, context.unit.arguments["path"], EXAMPLES, ["example_id", "tags"])
        return _count(context, rows) if context.phase == "count" else _label(context, rows)


def all_shards(dataset: InputArtifact) -> list[str]:
    """Storage paths of all example shards, split by split, in the order in which label parts are numbered."""
    return [path for split in SPLITS for path in dataset.files(f"split={split}/")]


def _checked_aliases(config: HashtagsConfig, sha256: str | None) -> Mapping[str, str]:
    if config.aliases is None:
        return {}
    found = hashlib.sha256(Path(config.aliases).read_bytes()).hexdigest()
    if found != sha256:
        raise DataError(f"{config.aliases} changed while the run was starting; run again")
    return load_aliases(Path(config.aliases))


def _summary(vocabulary: Vocabulary, labelled: list[Completion]) -> Json:
    top = zip(vocabulary.tags[:_TOP_TAGS], vocabulary.counts, strict=False)
    return {
        "num_tags": len(vocabulary),
        "num_below_min_count": vocabulary.num_below_min_count,
        "num_beyond_max_tags": vocabulary.num_beyond_max_tags,
        "without_hashtags": sum(done.payload["without_hashtags"] for done in labelled),
        "outside_vocabulary": sum(done.payload["outside_vocabulary"] for done in labelled),
        "top_tags": [{"tag": tag, "count": count} for tag, count in top],
    }


def _tags_table(vocabulary: Vocabulary) -> bytes:
    columns = {"index": list(range(len(vocabulary))), "tag": list(vocabulary.tags), "count": list(vocabulary.counts)}
    sink = pa.BufferOutputStream()
    pq.write_table(build_table(TAGS, columns), sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _count(context: UnitContext, rows: pa.Table) -> Json:
    aliases = json.loads(context.storage.read_bytes(context.unit.arguments["aliases"]))
    counts: Counter[str] = Counter()
    for tags in rows.column("tags").to_pylist():
        counts.update(canonical_tags(tags, aliases))
    with context.scratch("counts") as out:
        out.write(json.dumps(dict(sorted(counts.items()))).encode())
    return {"examples": rows.num_rows}


def _label(context: UnitContext, rows: pa.Table) -> Json:
    body = json.loads(context.storage.read_bytes(context.unit.arguments["vocabulary"]))
    vocabulary = Vocabulary(tags=tuple(body["tags"]), counts=(), aliases=body["aliases"])
    raw = rows.column("tags").to_pylist()
    ids = rows.column("example_id").to_pylist()
    labels = [vocabulary.encode(tags) for tags in raw]
    name = f"part-{context.unit.arguments['index']:05d}-of-{context.unit.arguments['of']:05d}.parquet"
    write_table(context.output(f"labels/{name}"), build_table(LABELS, {"example_id": ids, "tags": labels}))
    missing = [
        (identity, "outside the vocabulary" if tags else "no hashtags")
        for identity, tags, indices in zip(ids, raw, labels, strict=True)
        if not indices
    ]
    if missing:
        columns = {"example_id": [identity for identity, _ in missing], "reason": [reason for _, reason in missing]}
        write_table(context.output(f"unlabelled/{name}"), build_table(UNLABELLED, columns))
    reasons = Counter(reason for _, reason in missing)
    return {"without_hashtags": reasons["no hashtags"], "outside_vocabulary": reasons["outside the vocabulary"]}
