"""The partition stage: every example to its part, and every part to files of its own.

Two durable steps. `assign` routes one feature shard, writes its assignments and one file of the shard's examples sorted by
expert, a row group each. `merge` reads one part's row groups from all these files, so that an expert later streams only its
own shards; it holds one shard at a time, however large the part is. The parts hold the images themselves even where the
dataset only refers to them: an expert that read its share through references would read the whole source for it. That every
example arrives, exactly once, is checked by count and by an order-free checksum of the ids. Rejected: one small file per
(shard, expert), which is thousands of files where there are many of both, and leaving the examples where they are, which
makes every expert read everything. Where the training parts are to be balanced, `balance_phases` finds out beforehand who goes
where.

Shape letters: N examples, K experts.
"""

from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hardmoe.config import Json
from hardmoe.data.reading import open_examples, read_examples
from hardmoe.data.schemas import ASSIGNMENTS, PART, SPLITS
from hardmoe.errors import CorruptFileError
from hardmoe.hashing import hash_ids
from hardmoe.neighbours.assignment import Assignment, sum_of_squares
from hardmoe.partitioning.balance_phases import balance_phases, run_balance
from hardmoe.partitioning.balance_placement import Balanced, place_shard, summarise
from hardmoe.partitioning.fit import read_features
from hardmoe.partitioning.router import CENTROIDS_FILE, DESCRIPTION_FILE, TRANSFORM_FILE, Router
from hardmoe.stage import Completion, DriverContext, Finished, InputArtifact, Phase, Unit, UnitContext
from hardmoe.tables import build_table, ids_from_array, ids_to_array, write_table

SHARD_BYTES = 128 * 2**20
"""A part's shards hold about so many bytes of images."""
_PIECE_BYTES = 256 * 2**20
"""So many bytes of images are sorted by expert at a time."""


class PartitionWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Assign every shard, then merge every part."""
        experts: int = context.stage.config["partition"]["experts"]
        balanced: Balanced | None = None
        features = context.input("features")
        shards = [(split, path) for split in SPLITS for path in features.files(f"split={split}/")]
        prefix = features.path("")
        units = [
            Unit(f"{i:05d}", {"path": path.removeprefix(prefix).lstrip("/"), "split": split, "index": i, "of": len(shards)})
            for i, (split, path) in enumerate(shards)
        ]
        if context.stage.config["partition"]["method"] == "balanced":
            training = [unit for unit in units if unit.arguments["split"] == "train"]
            balanced = yield from balance_phases(context, load_router(context.input("router")), training)
            units = [Unit(unit.name, {**unit.arguments, "plan": balanced.path}) for unit in units]
        assigned = yield Phase("assign", units)
        merges = [_merge_unit(split, expert, units, assigned) for split in SPLITS for expert in range(experts)]
        merged = yield Phase("merge", [unit for unit in merges if unit.arguments["rows"]])
        _check_complete(context.storage.where(context.stage.name), assigned, merged)
        summary = _summary(experts, units, assigned)
        if balanced is not None:
            tallies = [done.payload["balance"] for done in assigned if "balance" in done.payload]
            summary["balance"] = summarise(balanced, tallies, summary["sizes"]["train"])
        return Finished(summary)

    def run(self, context: UnitContext) -> Json:
        """One feature shard, or one part of one split."""
        if context.phase.startswith("balance"):
            return run_balance(context, load_router(context.input("router")))
        return _assign(context) if context.phase == "assign" else _merge(context)


def load_router(router: InputArtifact) -> Router:
    """The fitted router."""
    names = (CENTROIDS_FILE, TRANSFORM_FILE, DESCRIPTION_FILE)
    return Router.from_files({name: router.storage.read_bytes(router.path(name)) for name in names})


def _merge_unit(split: str, expert: int, units: Sequence[Unit], assigned: Sequence[Completion]) -> Unit:
    """What to merge for one part: the row group of every regrouped file that holds rows of it."""
    sources = []
    rows = size = 0
    for unit, done in zip(units, assigned, strict=True):
        if unit.arguments["split"] == split and (count := done.payload["counts"][expert]):
            sources.append({"path": done.scratch["regrouped"], "groups": done.payload["groups"][expert]})
            rows += count
            size += done.payload["bytes"][expert]
    arguments = {"split": split, "expert": expert, "sources": sources, "rows": rows, "shards": max(1, -(-size // SHARD_BYTES))}
    return Unit(f"{split}-{expert:04d}", arguments, cost=rows)


def _summary(experts: int, units: Sequence[Unit], assigned: Sequence[Completion]) -> Json:
    sizes = {split: [0] * experts for split in SPLITS}
    distances = [0] * experts
    for unit, done in zip(units, assigned, strict=True):
        for expert in range(experts):
            sizes[unit.arguments["split"]][expert] += done.payload["counts"][expert]
            if unit.arguments["split"] == "train":
                distances[expert] += done.payload["distance_units"][expert]
    means = [units / _DISTANCE_UNIT / count if count else None for units, count in zip(distances, sizes["train"], strict=True)]
    return {"experts": experts, "sizes": sizes, "mean_distance": means}


def _check_complete(where: str, assigned: Sequence[Completion], merged: Sequence[Completion]) -> None:
    """Every example that was assigned must be in exactly one part."""
    for name in ("rows", "checksum"):
        before = sum(done.payload[name] for done in assigned) % _WORD
        after = sum(done.payload[name] for done in merged) % _WORD
        if before != after:
            raise CorruptFileError(
                f"{where} lost or doubled examples ({name}: {before} assigned, {after} merged); delete it and run again"
            )


_WORD = 1 << 64
_DISTANCE_UNIT = 1 << 20


def _checksum(ids_N16: NDArray[np.uint8]) -> int:
    """A sum over the ids that does not depend on their order."""
    return int(hash_ids(ids_N16, 0, "checksum").sum(dtype=np.uint64))


def _assign(context: UnitContext) -> Json:
    arguments = context.unit.arguments
    features = context.input("features")
    pieces = list(read_features(features, features.path(arguments["path"])))
    ids_N16 = np.concatenate([ids for ids, _ in pieces])
    assignment, second_distance_N, told = _route(context, ids_N16, pieces)
    distance_N = np.sqrt(assignment.squared_distance_N).astype(np.float32)
    columns = {
        "example_id": ids_from_array(ids_N16),
        "split": pa.array([arguments["split"]] * len(ids_N16)),
        "expert": assignment.primary_N.astype(np.int32),
        "distance": distance_N,
        "second": assignment.second_N.astype(np.int32),
        "second_distance": second_distance_N,
        "primary": np.ones(len(ids_N16), bool),
    }
    name = f"assignments/part-{arguments['index']:05d}-of-{arguments['of']:05d}.parquet"
    write_table(context.output(name), build_table(ASSIGNMENTS, columns))
    experts: int = context.stage.config["partition"]["experts"]
    counts = np.bincount(assignment.primary_N, minlength=experts)
    dataset = open_examples(context, "dataset")
    rows = read_examples(dataset, [dataset.path(arguments["path"])])
    groups, sizes = _write_regrouped(context, rows, ids_N16, distance_N, assignment.primary_N)
    fixed_N = np.rint(distance_N.astype(np.float64) * _DISTANCE_UNIT).astype(np.int64)
    totals = [int(fixed_N[assignment.primary_N == expert].sum()) for expert in range(experts)]
    return {
        "rows": len(ids_N16),
        "counts": counts.tolist(),
        "groups": [groups.get(expert, []) for expert in range(experts)],
        "bytes": [sizes.get(expert, 0) for expert in range(experts)],
        "distance_units": totals,
        "checksum": _checksum(ids_N16),
        **told,
    }


def _route(
    context: UnitContext, ids_N16: NDArray[np.uint8], pieces: Sequence[tuple[NDArray[np.uint8], NDArray[np.float32]]]
) -> tuple[Assignment, NDArray[np.float32], dict[str, Json]]:
    """The assignment of a shard, every example's distance to the second centroid, float32 [N], and what the payload adds."""
    settings = context.stage.config["partition"]
    if settings["method"] == "random":
        hashed_N = hash_ids(ids_N16, context.stage.config["seed"], "random-partition")
        primary_N = (hashed_N % np.uint64(settings["experts"])).astype(np.int32)
        nowhere_N = np.full(len(ids_N16), np.nan, np.float32)
        return Assignment(primary_N, np.full(len(ids_N16), -1, np.int32), np.zeros(len(ids_N16))), nowhere_N, {}
    router = load_router(context.input("router"))
    found = [router.route(features_ND) for _, features_ND in pieces]
    assignment = Assignment(
        np.concatenate([a.primary_N for a in found]),
        np.concatenate([a.second_N for a in found]),
        np.concatenate([a.squared_distance_N for a in found]),
    )
    told: dict[str, Json] = {}
    if settings["method"] == "balanced" and context.unit.arguments["split"] == "train":
        assignment, told["balance"] = place_shard(context, router, pieces, assignment)
    features_ND = np.concatenate([features for _, features in pieces])
    return assignment, _distances_to(router, features_ND, assignment.second_N), told


def _distances_to(router: Router, features_ND: NDArray[np.float32], experts_N: NDArray[np.int32]) -> NDArray[np.float32]:
    """Distance of every feature to one expert's centroid each, float32 [N]; NaN for expert -1."""
    if router.num_experts == 1:
        return np.full(len(features_ND), np.nan, np.float32)
    differences_ND = router.transform(features_ND).astype(np.float64) - router.centroids_KD[experts_N]
    return np.sqrt(sum_of_squares(differences_ND)).astype(np.float32)


def _write_regrouped(
    context: UnitContext,
    rows: Iterable[Any],
    ids_N16: NDArray[np.uint8],
    distance_N: NDArray[np.float32],
    primary_N: NDArray[np.int32],
) -> tuple[dict[int, list[int]], dict[int, int]]:
    """The shard's examples sorted by expert: row groups of one expert each, by expert, and the bytes of its images.

    A shard whose images exceed `_PIECE_BYTES` is sorted piece by piece, with row groups of its own for each piece.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    sizes: Counter[int] = Counter()
    start = written = 0
    with context.scratch("regrouped") as out, pq.ParquetWriter(out, PART, compression="zstd") as writer:
        for piece in _pieces(rows):
            stop = start + piece.num_rows
            _check_same(context, ids_to_array(piece.column("example_id")), ids_N16[start:stop])
            piece = piece.append_column("distance", pa.array(distance_N[start:stop]))
            for expert in np.unique(primary_N[start:stop]).tolist():
                # Not `take`, which first makes one array of the images and refuses to where they exceed 2 GiB.
                chosen = piece.filter(pa.array(primary_N[start:stop] == expert)).cast(PART)
                writer.write_table(chosen, row_group_size=max(1, chosen.num_rows))
                groups[expert].append(written)
                written += 1
                sizes[expert] += pc.sum(pc.binary_length(chosen.column("image"))).as_py()
            start = stop
    if start != len(ids_N16):
        _check_same(context, ids_N16[:0], ids_N16)
    return groups, sizes


def _pieces(tables: Iterable[Any]) -> Iterator[Any]:
    """Consecutive tables joined until their images fill a piece."""
    waiting: list[Any] = []
    size = 0
    for table in tables:
        waiting.append(table)
        size += table.column("image").nbytes
        if size >= _PIECE_BYTES:
            yield pa.concat_tables(waiting)
            waiting, size = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def _check_same(context: UnitContext, found_N16: NDArray[np.uint8], expected_N16: NDArray[np.uint8]) -> None:
    if not np.array_equal(found_N16, expected_N16):
        path = context.unit.arguments["path"]
        raise CorruptFileError(f"the features of {path} are of other examples than the dataset's; rebuild the features")


def _merge(context: UnitContext) -> Json:
    arguments = context.unit.arguments
    rows, count = arguments["rows"], arguments["shards"]
    bounds = [index * rows // count for index in range(count + 1)]
    prefix = f"split={arguments['split']}/expert={arguments['expert']:04d}"
    merged = checksum = 0
    for index, table in enumerate(cut(_row_groups(context, arguments["sources"]), np.diff(bounds).tolist())):
        # Not sorted over all shards of the part, which would have to be in memory at once: readers sort what they hold.
        shard = table.sort_by("example_id")
        write_table(context.output(f"{prefix}/part-{index:05d}-of-{count:05d}.parquet"), shard)
        merged += shard.num_rows
        checksum += _checksum(ids_to_array(shard.column("example_id")))
        context.progress(merged, rows)
    return {"rows": merged, "checksum": checksum % _WORD}


def _row_groups(context: UnitContext, sources: Sequence[Json]) -> Iterator[Any]:
    for source in sources:
        with context.storage.open_input(source["path"]) as file:
            parquet = pq.ParquetFile(file)
            for group in source["groups"]:
                yield parquet.read_row_group(group)


def cut(tables: Iterable[Any], sizes: Sequence[int]) -> Iterator[Any]:
    """Regroup a stream of tables into tables of these numbers of rows; draws the next one only when it is needed.

    Where the stream ends early the last tables are shorter, or missing.
    """
    stream, waiting, held = iter(tables), [], 0
    for size in sizes:
        while held < size and (table := next(stream, None)) is not None:
            waiting.append(table)
            held += table.num_rows
        if not waiting:
            return
        together = pa.concat_tables(waiting)
        yield together.slice(0, size)
        waiting, held = [together.slice(size)], max(0, held - size)
