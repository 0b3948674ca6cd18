"""All pairs of 64-bit hashes that differ in few bits: exact, in independent units of bounded memory, each pair once.

A hash is cut into `num_bands` runs of bits. Two hashes that differ in at most `radius` bits differ in at most so many bands,
so they agree in all of some `num_bands - radius` bands, and there is one table for every such choice of bands. A table sorts
the hashes by their bits in its bands and compares those that agree there. The more bands, the longer the common key and the
fewer comparisons, but the more tables; `plan` weighs them. A pair is reported by the first table in which it agrees, which
it can tell from the pair alone, so nothing is remembered between tables. A unit is one table and one part of its keys; it
reads every hash and keeps the rows of its part.

Rejected, for 1 M hashes of transformed drawings and photographs, radius 4, one core (faiss extrapolated from 500 to 5,000
queries, in wall time on a busy machine, so by up to twice too much):

    this module                                                      7.7 s
    faiss.IndexBinaryMultiHash, 3 keys of 21 bits, one bit flipped   281 s
    the same, 5 keys of 12 bits                                    4,448 s
    faiss.IndexBinaryFlat, all pairs                               1,350 s

And an index of faiss holds all hashes in memory, where ours is cut into units. 5 M hashes take 86 s in 70 units
(extrapolated from 12 of them), 440 MB each.

What real collections do to such a search is many rows with one hash, or nearly one. Identical hashes are sorted next to each
other and compared once; what their rows would cost is bounded: every row is paired with at most `_LEADERS` preferred rows of
a common hash and the next `_NEIGHBOURS` rows of its own, and a hash in an overfull bucket with the next `_WINDOW` hashes in
sorted order. The time is then linear in the rows whatever the hashes are, and every pair left out is counted.

Shape letters: N all rows, B rows of a block, S rows of a unit, D its distinct hashes, P pairs, R ranges, I their items.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, islice
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_BITS = 64
_BLOCK = 2**19
"""Pairs looked at in one go: some 40 MB."""
_ALL_ROWS = 256
"""Up to so many rows of one hash are all paired with each other."""
_ALL_ROWS_OF_TWO = 4096
"""Two hashes with at most so many pairs of rows between them have all of them paired."""
_LEADERS, _NEIGHBOURS = 32, 32
_FULL_BUCKET, _WINDOW = 4096, 256
"""Of a bucket of more hashes than the first, each is compared with the next ones up to the second. With 2048 and 128, 1 M
hashes of transformed pictures had overfull buckets and lost three tenths of their pairs; with these they had none."""
_MIX = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: multiplied by it, keys that differ anywhere differ in the upper bits."""

_ROW_SECONDS, _PAIR_SECONDS = 4e-7, 4e-8
"""What a table costs per row (reading, sorting) and per comparison, measured on one core."""
_ENTROPY = 0.7
"""Bits of information per bit of a key: real hashes crowd. Only the speed depends on it."""


class HashBlock(NamedTuple):
    """Hashes of consecutive rows, uint64 [B], and which rows lead if a hash is too common, bool [B]."""

    hashes_B: NDArray[np.uint64]
    preferred_B: NDArray[np.bool_]


class Candidates(NamedTuple):
    """Pairs of rows within the radius, and what was left out on the way to them.

    Attributes:
        first_P: the smaller row of each pair, int64 [P].
        second_P: the larger one, int64 [P].
        num_left_out: pairs of rows within the radius that are not listed, since their hashes are too common.
        num_unsearched: pairs of distinct hashes in overfull buckets that were not compared; a pair counts once per table.
    """

    first_P: NDArray[np.int64]
    second_P: NDArray[np.int64]
    num_left_out: int
    num_unsearched: int


@dataclass(frozen=True)
class HammingSearch:
    """How a search is cut up; `plan` chooses it.

    Attributes:
        radius: hashes that differ in at most so many bits are paired.
        num_bands: runs of bits that a hash is cut into, more than `radius`.
        num_parts: parts that a table's keys are cut into, to bound the memory of a unit.
    """

    radius: int
    num_bands: int
    num_parts: int

    @property
    def num_tables(self) -> int:
        """Choices of `num_bands - radius` bands."""
        return comb(self.num_bands, self.radius)

    @property
    def num_units(self) -> int:
        """Units 0, 1, ... of `pairs_of_unit`."""
        return self.num_tables * self.num_parts


def plan(num_hashes: int, radius: int, rows_per_unit: int = 2**22) -> HammingSearch:
    """Cut up a search so that it costs the least.

    Args:
        num_hashes: rows, roughly.
        radius: hashes that differ in at most so many bits are paired, 0 to 32.
        rows_per_unit: rows that a unit keeps, on average; it needs 60 bytes for each, and 100 MB besides.

    Returns:
        The plan; it depends on nothing but the arguments.
    """
    if not 0 <= radius <= _BITS // 2:
        raise ValueError(f"radius {radius} is not between 0 and {_BITS // 2}")

    def seconds(num_bands: int) -> float:
        key_bits = (num_bands - radius) * _BITS / num_bands
        pairs = num_hashes**2 / 2 ** (1 + _ENTROPY * key_bits)
        return comb(num_bands, radius) * (num_hashes * _ROW_SECONDS + pairs * _PAIR_SECONDS)

    bands = range(radius + 1, 2) if radius == 0 else range(radius + 1, min(2 * radius + 4, _BITS) + 1)
    return HammingSearch(radius, min(bands, key=seconds), max(1, -(-num_hashes // rows_per_unit)))


def pairs_of_unit(search: HammingSearch, unit: int, blocks: Iterable[HashBlock], skip: int | None = None) -> Iterator[Candidates]:
    """The pairs that one unit finds; all units together list every pair within the radius once.

    Args:
        search: the plan, the same for all units.
        unit: 0 to `search.num_units - 1`.
        blocks: all hashes, in blocks of any length; rows count from 0 in this order.
        skip: rows with this hash are in no pair.

    Yields:
        Blocks of some 100,000 pairs, each sorted by rows; their counts add up.
    """
    table = _Table.of(search, unit // search.num_parts)
    rows_S, keys_S, preferred_S = _select(table, search.num_parts, unit % search.num_parts, blocks, skip)
    if len(rows_S) == 0:
        return
    order_S = np.concatenate([np.flatnonzero(preferred_S), np.flatnonzero(~preferred_S)])
    order_S = order_S[np.argsort(keys_S[order_S], kind="stable")]
    yield from _gathered(_pairs(table, search.radius, rows_S[order_S], keys_S[order_S]))


def _pairs(table: "_Table", radius: int, rows_S: NDArray[np.int64], hashes_S: NDArray[np.uint64]) -> Iterator[Candidates]:
    """The pairs among a unit's rows, which are sorted by their rearranged hashes."""
    starts_D = np.flatnonzero(np.concatenate([[True], hashes_S[1:] != hashes_S[:-1]]))
    sizes_D = np.diff(starts_D, append=len(hashes_S))
    if table.index == 0:
        yield from _pairs_of_one_hash(rows_S, starts_D, sizes_D)
    yield from _pairs_of_two_hashes(table, radius, rows_S, hashes_S[starts_D], starts_D, sizes_D)


def _gathered(parts: Iterable[Candidates]) -> Iterator[Candidates]:
    """The same in blocks of a size worth working on, each sorted by rows."""
    waiting: list[Candidates] = []
    count = 0
    for part in parts:
        waiting.append(part)
        count += len(part.first_P)
        if count >= _BLOCK // 4:
            yield _joined(waiting)
            waiting, count = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(parts: Sequence[Candidates]) -> Candidates:
    first_P, second_P = (np.concatenate(column) for column in zip(*((p.first_P, p.second_P) for p in parts), strict=True))
    order_P = np.lexsort((second_P, first_P))
    left_out, unsearched = sum(p.num_left_out for p in parts), sum(p.num_unsearched for p in parts)
    return Candidates(first_P[order_P], second_P[order_P], left_out, unsearched)


@dataclass(frozen=True)
class _Table:
    """Rearranged hashes: the bands of the key first."""

    index: int
    moves: tuple[tuple[int, int, int], ...]
    """Of each band: bits to shift right, mask, bits to shift left."""
    key_bits: int
    later_masks: tuple[int, ...]
    """In the rearranged hash, the bands outside the key that come before the key's last one."""

    @classmethod
    def of(cls, search: HammingSearch, index: int) -> "_Table":
        bands = range(search.num_bands)
        key = next(islice(combinations(bands, search.num_bands - search.radius), index, None))
        edges = [_BITS * band // search.num_bands for band in range(search.num_bands + 1)]
        moves, masks, top, key_bits = [], {}, _BITS, 0
        for band in (*key, *(band for band in bands if band not in key)):
            width = edges[band + 1] - edges[band]
            top -= width
            moves.append((edges[band], 2**width - 1, top))
            masks[band] = (2**width - 1) << top
            key_bits += width if band in key else 0
        later = tuple(masks[band] for band in bands if band < key[-1] and band not in key)
        return cls(index, tuple(moves), key_bits, later)

    @cached_property
    def key_shift(self) -> np.uint64:
        return np.uint64(_BITS - self.key_bits)

    def rearrange(self, hashes_B: NDArray[np.uint64]) -> NDArray[np.uint64]:
        result_B = np.zeros_like(hashes_B)
        for right, mask, left in self.moves:
            result_B |= ((hashes_B >> np.uint64(right)) & np.uint64(mask)) << np.uint64(left)
        return result_B

    def is_first_for(self, differences_P: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether pairs with these differing bits, all outside the key, agree in no earlier table, bool [P]."""
        first_P = np.ones(len(differences_P), bool)
        for mask in self.later_masks:
            first_P &= (differences_P & np.uint64(mask)) != 0
        return first_P


def _select(
    table: _Table, num_parts: int, part: int, blocks: Iterable[HashBlock], skip: int | None
) -> tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.bool_]]:
    """Rows, rearranged hashes and preference of a table's part of the keys."""
    found: list[tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.bool_]]] = []
    start = 0
    for block in blocks:
        for offset in range(0, len(block.hashes_B), _BLOCK):
            hashes_B = np.asarray(block.hashes_B[offset : offset + _BLOCK])
            keys_B = table.rearrange(hashes_B)
            # The upper 32 bits, times the number of parts, fit into 64 bits.
            mixed_B = ((keys_B >> table.key_shift) * _MIX) >> np.uint64(32)
            keep_B = (mixed_B * np.uint64(num_parts)) >> np.uint64(32) == part
            if skip is not None:
                keep_B &= hashes_B != skip
            kept_S = np.flatnonzero(keep_B)
            preferred_B = block.preferred_B[offset : offset + _BLOCK]
            found.append((kept_S + (start + offset), keys_B[kept_S], preferred_B[kept_S]))
        start += len(block.hashes_B)
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, bool)
    rows, keys, preferred = zip(*found, strict=True)
    return np.concatenate(rows), np.concatenate(keys), np.concatenate(preferred)


def _expand(starts_R: NDArray[np.int64], counts_R: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Which range, and which item, of all items of the ranges `start, ..., start + count - 1`, int64 [I] each, in blocks.

    A block has `_BLOCK` items, or one whole range if that is longer.
    """
    ends_R = np.cumsum(counts_R)
    low = 0
    while low < len(counts_R):
        done = int(ends_R[low - 1]) if low else 0
        high = max(low + 1, int(np.searchsorted(ends_R, done + _BLOCK, side="right")))
        ranges_I = np.repeat(np.arange(low, high), counts_R[low:high])
        before_R = ends_R[low:high] - counts_R[low:high]
        items_I = np.arange(done, ends_R[high - 1]) + np.repeat(starts_R[low:high] - before_R, counts_R[low:high])
        if len(items_I):
            yield ranges_I, items_I
        low = high


def _ordered(first_P: NDArray[np.int64], second_P: NDArray[np.int64]) -> Candidates:
    return Candidates(np.minimum(first_P, second_P), np.maximum(first_P, second_P), 0, 0)


def _nothing(num_left_out: int, num_unsearched: int) -> Candidates:
    return Candidates(np.empty(0, np.int64), np.empty(0, np.int64), num_left_out, num_unsearched)


def _pairs_of_one_hash(
    rows_S: NDArray[np.int64], starts_D: NDArray[np.int64], sizes_D: NDArray[np.int64]
) -> Iterator[Candidates]:
    """Pairs of rows with the same hash: all, or a common hash's leaders with every row and neighbours with each other."""
    common_D = np.flatnonzero(sizes_D > 1)
    for groups_I, places_I in _expand(starts_D[common_D], sizes_D[common_D]):
        sizes_I = sizes_D[common_D][groups_I]
        ends_I = starts_D[common_D][groups_I] + sizes_I
        rest_I = ends_I - places_I - 1
        is_leader_I = places_I - (ends_I - sizes_I) < _LEADERS
        counts_I = np.where((sizes_I <= _ALL_ROWS) | is_leader_I, rest_I, np.minimum(rest_I, _NEIGHBOURS))
        yield _nothing(int((rest_I - counts_I).sum()), 0)
        for indices_P, others_P in _expand(places_I + 1, counts_I):
            yield _ordered(rows_S[places_I[indices_P]], rows_S[others_P])


def _pairs_of_two_hashes(
    table: _Table,
    radius: int,
    rows_S: NDArray[np.int64],
    hashes_D: NDArray[np.uint64],
    starts_D: NDArray[np.int64],
    sizes_D: NDArray[np.int64],
) -> Iterator[Candidates]:
    """Pairs of rows whose hashes differ, agree in the table's key and in no earlier table's."""
    rest_D, window_D = _bucket_rests(hashes_D >> table.key_shift)
    yield _nothing(0, int((rest_D - window_D).sum()))
    for a_P, b_P in _expand(np.arange(1, len(hashes_D) + 1), window_D):
        differences_P = hashes_D[a_P] ^ hashes_D[b_P]
        near_P = np.bitwise_count(differences_P) <= radius
        a_P, b_P, differences_P = a_P[near_P], b_P[near_P], differences_P[near_P]
        first_P = table.is_first_for(differences_P)
        yield from _rows_of_pairs(rows_S, starts_D, sizes_D, a_P[first_P], b_P[first_P])


def _bucket_rests(keys_D: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many hashes follow each one in its bucket, and how many of them it is compared with, int64 [D] each."""
    num_hashes = len(keys_D)
    starts = np.flatnonzero(np.concatenate([[True], keys_D[1:] != keys_D[:-1]]))
    sizes = np.diff(starts, append=num_hashes)
    rest_D = np.repeat(starts + sizes, sizes) - np.arange(num_hashes) - 1
    window_D = np.where(np.repeat(sizes, sizes) <= _FULL_BUCKET, rest_D, np.minimum(rest_D, _WINDOW))
    return rest_D, window_D


def _rows_of_pairs(
    rows_S: NDArray[np.int64],
    starts_D: NDArray[np.int64],
    sizes_D: NDArray[np.int64],
    a_P: NDArray[np.int64],
    b_P: NDArray[np.int64],
) -> Iterator[Candidates]:
    """The rows of pairs of distinct hashes: all with all, or for common hashes each one's leaders with all of the other."""
    if len(a_P) == 0:
        return
    area_P = sizes_D[a_P] * sizes_D[b_P]
    all_P = area_P <= _ALL_ROWS_OF_TWO
    leaders_P = np.where(all_P, sizes_D[a_P], np.minimum(sizes_D[a_P], _LEADERS))
    others_P = np.where(all_P, 0, np.minimum(sizes_D[b_P], _LEADERS))
    listed_P = leaders_P * sizes_D[b_P] + (sizes_D[a_P] - leaders_P) * others_P
    yield _nothing(int((area_P - listed_P).sum()), 0)
    for pairs_I, places_I in _expand(starts_D[a_P], sizes_D[a_P]):
        is_leader_I = places_I - starts_D[a_P][pairs_I] < leaders_P[pairs_I]
        counts_I = np.where(is_leader_I, sizes_D[b_P][pairs_I], others_P[pairs_I])
        for indices, others in _expand(starts_D[b_P][pairs_I], counts_I):
            yield _ordered(rows_S[places_I[indices]], rows_S[others])
