"""Which tables of labels can hold given ids: `vocabulary/ranges.parquet`, a row for each with its split and its ids' range.

Every unit joins its examples with their labels by id, and with S tables of labels S units would open all S of them: on an
object store that was most requests of a run. Where the dataset's shards are ranges of ids, the ranges leave one table of a
split. Where they are not (`dataset.id_column`, references) all ranges are as wide as the split; but who reads the rows of one
shard of the dataset knows which one, and begins with its table. Rejected: statistics in the tables' own footers, for which each
must be opened.

Shape letters: N ids, T tables.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from hardmoe.config import Json
from hardmoe.data.ids import sortable
from hardmoe.data.schemas import LABEL_RANGES, SPLITS
from hardmoe.data.source_files import parquet_bytes
from hardmoe.stage import InputArtifact
from hardmoe.tables import build_table, ids_to_array, read_table

RANGES_FILE = "ranges.parquet"


def range_of(ids_N16: NDArray[np.uint8]) -> list[str]:
    """The smallest and the largest id of a table as hexadecimal digits, for a completion's payload."""
    keys_N = np.sort(sortable(ids_N16))
    return [keys_N[at].tobytes().hex() for at in (0, -1)] if len(keys_N) else []


def ranges_table(names: Sequence[str], shards: Sequence[str], ranges: Sequence[Json]) -> bytes:
    """The content of `ranges.parquet`.

    Args:
        names: the tables of labels, by their paths within the vocabulary.
        shards: the dataset's shards that they are of, by their paths.
        ranges: what `range_of` said of each.
    """
    splits = [next(split for split in SPLITS if f"split={split}/" in path) for path in shards]
    of_each = zip(names, splits, ranges, strict=True)
    rows = [(name, split, *map(bytes.fromhex, ends)) for name, split, ends in of_each if ends]
    columns = {name: [row[index] for row in rows] for index, name in enumerate(LABEL_RANGES.names)}
    return parquet_bytes(build_table(LABEL_RANGES, columns))


def tables_that_may_hold(
    vocabulary: InputArtifact, sorted_N: NDArray[np.void], split: str | None, near: tuple[int, int] | None
) -> Iterator[str]:
    """Storage paths of the tables in which some of the ids may be, the likeliest first.

    Args:
        vocabulary: the vocabulary artifact.
        sorted_N: the ids, ascending, as `sortable` makes them.
        split: the split that they are all of, if that is known.
        near: that they are of the first number's table of the second number of tables of the split, where these are cut like the
            dataset's; a guess, which costs one table if it is wrong.
    """
    table = read_table(vocabulary.storage, vocabulary.path(RANGES_FILE), LABEL_RANGES)
    first_T, last_T = (sortable(ids_to_array(table.column(name))) for name in ("first", "last"))
    may_hold_T = np.searchsorted(sorted_N, first_T, "left") < np.searchsorted(sorted_N, last_T, "right")
    splits = table.column("split").to_pylist()
    of_split = [at for at, name in enumerate(splits) if split is None or name == split]
    wanted = [at for at in of_split if may_hold_T[at]]
    if near is not None and near[1] == len(of_split) and (likely := of_split[near[0]]) in wanted:
        wanted.remove(likely)
        wanted.insert(0, likely)
    names = table.column("file").to_pylist()
    for at in wanted:
        yield vocabulary.path(names[at])
