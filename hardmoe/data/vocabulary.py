"""The vocabulary: distinct hashtags counted, chosen, and found again in a shard's rows, all on columns.

A collection repeats its hashtags, so a shard's are made a dictionary first: each distinct raw hashtag is normalised once and
the rows are mapped by array lookups. Counts are Arrow tables of (tag, count), merged bucket by bucket of the tags' hashes.
Rejected: a function called per row, which takes twice as long; one dictionary of all counts, at two hundred bytes a tag; and
counting approximately (count-min), which cannot say what was dropped.

Shape letters: N examples, M raw hashtags, U distinct raw hashtags, T distinct canonical tags, L labels.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hardmoe.data.aliases import TagRules
from hardmoe.data.ragged import offsets_of
from hardmoe.data.schemas import DROPPED_TAGS, TAGS
from hardmoe.tables import build_table

COUNTS = pa.schema([("tag", pa.string()), ("count", pa.int64())])
"""Distinct canonical tags and on how many examples each is, in the order of the tags."""
REASONS = ("on the deny list", "not on the allow list", "fewer than min_count", "beyond max_tags")
"""Why a tag is not in the vocabulary; the first that holds."""

BUCKETS = 16
"""Counts are merged in so many pieces."""

_LARGE = pa.schema([("tag", pa.large_string()), ("count", pa.int64())])
_PIECE = 1 << 22


@dataclass(frozen=True)
class RowTags:
    """The hashtags of a shard's rows as numbers: every row's distinct canonical tags."""

    rows_L: NDArray[np.int64]
    """Ascending row numbers."""
    tags_L: NDArray[np.int64]
    """Index of the tag among those that were asked for, ascending within a row, each once."""


def count_tags(column: Any, rules: TagRules) -> Any:
    """On how many rows each canonical tag is: a table of the schema `COUNTS`.

    Args:
        column: list<string>, the raw hashtags of every row.
        rules: the aliases are applied, the lists are not.
    """
    codes_M, distinct = _dictionary(column)
    canonical = [rules.canonical(raw) for raw in distinct]
    names = sorted(set(canonical) - {""})
    found = _row_tags(column, codes_M, canonical, {tag: index for index, tag in enumerate(names)})
    return build_table(COUNTS, {"tag": names, "count": np.bincount(found.tags_L, minlength=len(names))})


def encode_tags(column: Any, rules: TagRules, index_of: Mapping[str, int]) -> RowTags:
    """Every row's tags of a vocabulary.

    Args:
        column: list<string>, the raw hashtags of every row.
        rules: the rules that the vocabulary was made by.
        index_of: canonical tag to its index; other tags are left out.
    """
    codes_M, distinct = _dictionary(column)
    return _row_tags(column, codes_M, [rules.canonical(raw) for raw in distinct], index_of)


def _dictionary(column: Any) -> tuple[NDArray[np.int64], list[str]]:
    """For every raw hashtag of all rows its number (int64 [M]) among the distinct ones (U)."""
    flat = _combined(column).flatten()
    encoded = flat.dictionary_encode() if len(flat) else pa.array([], pa.string()).dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def _combined(column: Any) -> Any:
    if not isinstance(column, pa.ChunkedArray):
        return column
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _row_tags(column: Any, codes_M: NDArray[np.int64], canonical: list[str], index_of: Mapping[str, int]) -> RowTags:
    index_U = np.array([index_of.get(tag, -1) for tag in canonical], np.int64)
    row_M = np.repeat(np.arange(len(column)), _lengths(column))
    tag_M = index_U[codes_M] if len(codes_M) else codes_M
    known = tag_M >= 0
    # One number for (row, tag): sorting it orders rows, orders tags within a row, and drops what a row says twice.
    both = np.unique(row_M[known] * len(index_of) + tag_M[known])
    rows_L, tags_L = np.divmod(both, max(1, len(index_of)))
    return RowTags(rows_L, tags_L)


def _lengths(column: Any) -> NDArray[np.int64]:
    lengths: NDArray[np.int64] = pc.list_value_length(_combined(column)).fill_null(0).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64)


def buckets_of(tags: Any) -> NDArray[np.int64]:
    """Which of the `BUCKETS` a tag's counts are merged in, int64 [T]; the same for a tag wherever it was counted."""
    return np.array([zlib.crc32(tag.encode()) % BUCKETS for tag in tags.to_pylist()], np.int64)


def merge_counts(buckets: Iterable[Any]) -> Any:
    """The sums of counts, in no particular order: large strings and int64.

    Args:
        buckets: tables of the schema `COUNTS`; a tag may be in one of them only, there as often as it was counted. They are
            taken one at a time, so that what is not merged yet is never there as a whole.
    """
    # Single-threaded: a unit has as many threads as it was given slots.
    merged = [t.cast(_LARGE).group_by("tag", use_threads=False).aggregate([("count", "sum")]) for t in buckets]
    sums = [table.select(["tag", "count_sum"]).rename_columns(_LARGE.names).cast(_LARGE) for table in merged]
    return pa.concat_tables([_LARGE.empty_table(), *sums])


@dataclass(frozen=True)
class Choice:
    """What becomes of all counted tags."""

    kept: Any
    """The vocabulary, of the schema `TAGS`: the commonest first, equally common ones in alphabetical order."""
    dropped: Any
    """All others, of the schema `DROPPED_TAGS`, in the same order."""
    commonest: tuple[str, int] | None
    """The commonest tag that no list drops, and its count."""

    def num_dropped(self) -> dict[str, int]:
        """How many distinct tags were dropped for every reason."""
        counted = {row["values"]: row["counts"] for row in self.dropped.column("reason").value_counts().to_pylist()}
        return {reason: counted.get(reason, 0) for reason in REASONS}


def choose_tags(counts: Any, rules: TagRules, min_count: int, max_tags: int) -> Choice:
    """Choose the vocabulary.

    Args:
        counts: distinct canonical tags with their counts, as `merge_counts` returns them.
        rules: whose lists are applied.
        min_count: rarer tags are dropped.
        max_tags: at most so many are kept.
    """
    order_T = pc.sort_indices(counts, [("count", "descending"), ("tag", "ascending")]).to_numpy()
    count_T = counts.column("count").to_numpy()[order_T]
    reason_T = np.full(len(count_T), -1, np.int8)
    for code, holds_T in enumerate(_lists_hold(counts.column("tag"), rules)):
        reason_T[(reason_T < 0) & holds_T[order_T]] = code
    first = next(iter(np.flatnonzero(reason_T < 0).tolist()), None)
    commonest = None if first is None else (counts.column("tag")[int(order_T[first])].as_py(), int(count_T[first]))
    reason_T[(reason_T < 0) & (count_T < min_count)] = 2
    reason_T[np.flatnonzero(reason_T < 0)[max_tags:]] = 3
    is_kept_T = reason_T < 0
    kept = _columns(counts, order_T[is_kept_T])
    index = np.arange(len(kept["tag"]), dtype=np.int32)
    reasons = pa.DictionaryArray.from_arrays(pa.array(reason_T[~is_kept_T]), pa.array(REASONS)).cast(pa.string())
    dropped = {**_columns(counts, order_T[~is_kept_T]), "reason": reasons}
    return Choice(build_table(TAGS, {"index": index, **kept}), build_table(DROPPED_TAGS, dropped), commonest)


def _columns(counts: Any, rows: NDArray[np.int64]) -> dict[str, Any]:
    """Some rows of a table of counts; the tags in pieces, since one array of plain strings ends at 2 GiB."""
    pieces = [counts.column("tag").take(pa.array(rows[at : at + _PIECE])).cast(pa.string()) for at in range(0, len(rows), _PIECE)]
    tags = pa.chunked_array([chunk for piece in pieces for chunk in piece.chunks], pa.string())
    return {"tag": tags, "count": counts.column("count").to_numpy()[rows]}


def _lists_hold(tags: Any, rules: TagRules) -> Iterable[NDArray[np.bool_]]:
    """For the deny and the allow list, which tags it drops; bool [T] each."""
    for names, drops_its_own in ((rules.deny, True), (rules.allow, False)):
        if names is None:
            yield np.zeros(len(tags), bool)
        else:
            values = pa.array(sorted(names), pa.large_string())
            yield pc.is_in(tags, value_set=values).to_numpy(zero_copy_only=False).astype(bool) == drops_its_own


def lists_of(found: RowTags, num_rows: int) -> Any:
    """A list<int32> column of every row's tags."""
    offsets = offsets_of(np.bincount(found.rows_L, minlength=num_rows))
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(found.tags_L.astype(np.int32)))
