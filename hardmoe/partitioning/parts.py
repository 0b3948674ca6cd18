"""The files of the parts: a shard's examples sorted by expert, and one expert's examples gathered from all shards.

What is written of a shard is a `Membership`: which of its examples go to which expert. The primary one names every example
once, the extra one those that train in further parts too; each has a file of its own, so that whoever must see every example
once has nothing to filter.

Shape letters: N examples of a shard, P pairs of an example and an expert.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hardmoe.config import Json
from hardmoe.data.schemas import PART
from hardmoe.errors import CorruptFileError
from hardmoe.hashing import hash_ids
from hardmoe.stage import Completion, Unit, UnitContext
from hardmoe.tables import ids_to_array, write_table

SHARD_BYTES = 128 * 2**20
"""A part's shards hold about so many bytes of images."""
_PIECE_BYTES = 256 * 2**20
"""So many bytes of images are sorted by expert at a time."""
_WORD = 1 << 64


@dataclass(frozen=True)
class Membership:
    """Which examples of a shard go to which experts.

    Attributes:
        rows_P: rows of the shard, ascending, int64 [P].
        experts_P: where each goes, int32 [P]; no pair twice.
        distance_P: distance to that expert's centroid, float32 [P].
    """

    rows_P: NDArray[np.int64]
    experts_P: NDArray[np.int32]
    distance_P: NDArray[np.float32]

    def between(self, start: int, stop: int) -> "Membership":
        """The pairs of the rows from `start` up to and excluding `stop`, counted from there."""
        low, high = np.searchsorted(self.rows_P, [start, stop])
        return Membership(self.rows_P[low:high] - start, self.experts_P[low:high], self.distance_P[low:high])

    def of(self, expert: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows and distances of one expert's examples."""
        here_P = self.experts_P == expert
        return self.rows_P[here_P], self.distance_P[here_P]


def write_regrouped(
    context: UnitContext, tables: Iterable[Any], ids_N16: NDArray[np.uint8], memberships: Mapping[str, Membership], experts: int
) -> dict[str, Json]:
    """Write a shard's examples by expert, a scratch file for each membership: row groups of one expert each.

    A shard whose images exceed `_PIECE_BYTES` is sorted piece by piece, with row groups of its own for each piece.

    Args:
        context: of the unit.
        tables: the shard's examples, in pieces.
        ids_N16: their ids, uint8 [N, 16].
        memberships: by the name of the file.
        experts: K.

    Returns:
        By the same names, what `merge_unit` and `check_complete` want to know; lists are by expert.

    Raises:
        CorruptFileError: the tables' ids are others.
    """
    groups: dict[str, dict[int, list[int]]] = {name: defaultdict(list) for name in memberships}
    sizes: dict[str, Counter[int]] = {name: Counter() for name in memberships}
    written: Counter[str] = Counter()
    start = 0
    with ExitStack() as stack:
        outputs = {name: stack.enter_context(context.scratch(name)) for name in memberships}
        writers = {name: stack.enter_context(pq.ParquetWriter(out, PART, compression="zstd")) for name, out in outputs.items()}
        for piece in _pieces(tables):
            stop = start + piece.num_rows
            _check_same(context, ids_to_array(piece.column("example_id")), ids_N16[start:stop])
            for name, membership in memberships.items():
                for expert, chosen in _by_expert(piece, membership.between(start, stop)):
                    writers[name].write_table(chosen, row_group_size=max(1, chosen.num_rows))
                    groups[name][expert].append(written[name])
                    written[name] += 1
                    sizes[name][expert] += pc.sum(pc.binary_length(chosen.column("image"))).as_py()
            start = stop
    if start != len(ids_N16):
        _check_same(context, ids_N16[:0], ids_N16)
    return {
        name: {
            "rows": len(membership.rows_P),
            "counts": np.bincount(membership.experts_P, minlength=experts).tolist(),
            "groups": [groups[name].get(expert, []) for expert in range(experts)],
            "bytes": [sizes[name].get(expert, 0) for expert in range(experts)],
            "checksum": _checksum(ids_N16[membership.rows_P]),
        }
        for name, membership in memberships.items()
    }


def merge_unit(name: str, folder: str, expert: int, regrouped: Sequence[tuple[str, Json]]) -> Unit:
    """What to merge for one expert: the row groups of every regrouped file that hold rows of it.

    Args:
        name: of the unit.
        folder: where the part's files go, within the artifact.
        expert: whose row groups.
        regrouped: path of every regrouped file, and what `write_regrouped` said of it.
    """
    holding = [(path, told) for path, told in regrouped if told["counts"][expert]]
    rows, size = (sum(told[key][expert] for _, told in holding) for key in ("counts", "bytes"))
    sources = [{"path": path, "groups": told["groups"][expert]} for path, told in holding]
    arguments = {"folder": folder, "sources": sources, "rows": rows, "shards": max(1, -(-size // SHARD_BYTES))}
    return Unit(name, arguments, cost=rows)


def merge(context: UnitContext) -> Json:
    """Gather one expert's examples into shards of about `SHARD_BYTES`."""
    arguments = context.unit.arguments
    rows, count = arguments["rows"], arguments["shards"]
    bounds = [index * rows // count for index in range(count + 1)]
    merged = checksum = 0
    for index, table in enumerate(cut(_row_groups(context, arguments["sources"]), np.diff(bounds).tolist())):
        # Not sorted over all shards of the part, which would have to be in memory at once: readers sort what they hold.
        shard = table.sort_by("example_id")
        write_table(context.output(f"{arguments['folder']}/part-{index:05d}-of-{count:05d}.parquet"), shard)
        merged += shard.num_rows
        checksum += _checksum(ids_to_array(shard.column("example_id")))
        context.progress(merged, rows)
    return {"rows": merged, "checksum": checksum % _WORD}


def check_complete(where: str, regrouped: Sequence[Json], merged: Sequence[Completion]) -> None:
    """Every example that was assigned must be in exactly one of the merged files for each of its parts.

    Raises:
        CorruptFileError: one is not.
    """
    for name in ("rows", "checksum"):
        before = sum(told[name] for told in regrouped) % _WORD
        after = sum(done.payload[name] for done in merged) % _WORD
        if before != after:
            raise CorruptFileError(
                f"{where} lost or doubled examples ({name}: {before} assigned, {after} merged); delete it and run again"
            )


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


def _by_expert(piece: Any, membership: Membership) -> Iterator[tuple[int, Any]]:
    """The piece's examples of every expert that has some, with their distances."""
    for expert in np.unique(membership.experts_P).tolist():
        rows_n, distance_n = membership.of(expert)
        chosen_N = np.zeros(piece.num_rows, bool)
        chosen_N[rows_n] = True
        # Not `take`, which first makes one array of the images and refuses to where they exceed 2 GiB.
        chosen = piece.filter(pa.array(chosen_N))
        yield expert, chosen.append_column("distance", pa.array(distance_n)).cast(PART)


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


def _row_groups(context: UnitContext, sources: Sequence[Json]) -> Iterator[Any]:
    for source in sources:
        with context.storage.open_input(source["path"]) as file:
            parquet = pq.ParquetFile(file)
            for group in source["groups"]:
                yield parquet.read_row_group(group, use_threads=False)


def _checksum(ids_N16: NDArray[np.uint8]) -> int:
    """A sum over the ids that does not depend on their order."""
    return int(hash_ids(ids_N16, 0, "checksum").sum(dtype=np.uint64))
