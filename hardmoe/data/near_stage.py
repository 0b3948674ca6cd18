"""Near-duplicates as phases of the dataset stage: search, decide.

    near-search   units of `neighbours.hamming`: candidates by hash, each confirmed on the thumbnails of both
    near-decide   one unit: the groups they form, which examples are to go, the table `dataset/duplicates`

Rows are numbered over all merged ranges, which is by ascending content id, so nothing here depends on how the source was cut.
A unit of the search reads all hashes (8 bytes a row) and the thumbnails of its candidates, by byte range; the decision holds
the confirmed pairs. Rejected: comparing within source shards, which finds no copy that lies in another one.

Shape letters: N rows, P pairs, T rows that are in a pair.
"""

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hardmoe.arrays import load_arrays, save_arrays
from hardmoe.config import Json
from hardmoe.data.byte_ranges import read_ranges
from hardmoe.data.config import DatasetConfig
from hardmoe.data.near_duplicates import Decision, decide, differences
from hardmoe.data.perceptual import NO_HASH, THUMBNAIL_PIXELS
from hardmoe.data.schemas import DUPLICATES, SPLITS
from hardmoe.neighbours.hamming import HammingSearch, HashBlock, pairs_of_unit, plan
from hardmoe.stage import Completion, DriverContext, Phase, Unit, UnitContext
from hardmoe.tables import build_table, ids_from_array, write_table

SEARCH, DECIDE = "near-search", "near-decide"
NEAR_PHASES = (SEARCH, DECIDE)
_DRAWINGS = ("icons", "iconify")
_TRAIN = SPLITS.index("train")
_ROWS_AT_ONCE = 1 << 15
"""Thumbnails held at a time: 32 MB."""


@dataclass(frozen=True)
class NearResult:
    """What was found, and where the list of those to go lies."""

    removed_path: str | None = None
    counts: Json = None

    def summary(self) -> Json:
        """What the record says; None where nothing was looked for."""
        return self.counts


def policy(config: DatasetConfig) -> str:
    """`none`, `held_out` or `all`."""
    if config.near_duplicates != "auto":
        return config.near_duplicates
    return "none" if config.source in _DRAWINGS else "held_out"


def looks_for_near_duplicates(config: DatasetConfig) -> bool:
    """Whether hashes and thumbnails are wanted."""
    return policy(config) != "none"


def near_phases(
    context: DriverContext, config: DatasetConfig, merged: Sequence[Completion]
) -> Generator[Phase, list[Completion], NearResult]:
    """Search, then decide."""
    places = [
        {"rows": done.payload["examples"], **{name: done.scratch[name] for name in ("hashes", "sizes", "names", "thumbnails")}}
        for done in merged
        if done.payload["examples"]
    ]
    shared = context.share("near.json", json.dumps(places).encode())
    search = plan(sum(place["rows"] for place in places), config.near_radius)
    units = [
        Unit(f"{i:05d}", {"places": shared, "search": asdict(search), "unit": i, "policy": policy(config)})
        for i in range(search.num_units)
    ]
    found = yield Phase(SEARCH, units)
    pairs = context.share("pairs.json", json.dumps([done.scratch["pairs"] for done in found]).encode())
    arguments = {"places": shared, "pairs": pairs, "policy": policy(config)}
    (decided,) = yield Phase(DECIDE, [Unit("all", arguments)])
    counts = {
        "candidates": sum(done.payload["candidates"] for done in found),
        "pairs": sum(done.payload["pairs"] for done in found),
        "pairs_left_out": sum(done.payload["left_out"] for done in found),
        "hashes_not_compared": sum(done.payload["unsearched"] for done in found),
        **decided.payload,
    }
    return NearResult(decided.scratch["removed"] if sum(decided.payload["removed"].values()) else None, counts)


def run_near_unit(context: UnitContext, config: DatasetConfig) -> Json:
    """A unit of either phase."""
    return _search(context, config) if context.phase == SEARCH else _decide(context)


@dataclass(frozen=True)
class _Rows:
    """The numbered rows of all merged ranges, and where what is known of them lies."""

    context: UnitContext
    places: Sequence[Json]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, context: UnitContext) -> "_Rows":
        places = json.loads(context.storage.read_bytes(context.unit.arguments["places"]))
        return cls(context, places, np.concatenate([[0], np.cumsum([place["rows"] for place in places])]).astype(np.int64))

    def blocks(self) -> Iterator[HashBlock]:
        for place in self.places:
            arrays = load_arrays(self.context.storage, place["hashes"])
            # Where a hash is too common to compare all its rows, those that are held out must not be the ones left out.
            yield HashBlock(arrays["hash"], arrays["split"] != _TRAIN)

    def splits(self) -> NDArray[np.int8]:
        return np.concatenate([load_arrays(self.context.storage, place["hashes"])["split"] for place in self.places])

    def ids(self, rows_T: NDArray[np.int64], kind: str) -> NDArray[np.uint8]:
        """`content_id` or `example_id` of rows in ascending order, uint8 [T, 16]."""
        found = [np.zeros((0, 16), np.uint8)]
        for place, within in self._divided(rows_T):
            found.append(load_arrays(self.context.storage, place["names"])[kind][within])
        return np.concatenate(found)

    def preference(self, rows_T: NDArray[np.int64]) -> NDArray[np.int64]:
        """The place of rows, in ascending order, in the order in which they are to be kept: the most pixels first, then the
        largest file, then the smallest id; int64 [T]."""
        pixels, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for place, within in self._divided(rows_T):
            arrays = load_arrays(self.context.storage, place["sizes"])
            pixels.append(arrays["pixels"][within])
            sizes.append(arrays["size"][within])
        order_T = np.lexsort((-np.concatenate(sizes), -np.concatenate(pixels)))  # stable: equal ones stay in the order of ids
        places_T = np.empty(len(rows_T), np.int64)
        places_T[order_T] = np.arange(len(rows_T))
        return places_T

    def thumbnails(self, rows_T: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 [T, 1024]; rows in ascending order."""
        data: list[bytes] = []
        for place, within in self._divided(rows_T):
            lengths = np.full(len(within), THUMBNAIL_PIXELS, np.int64)
            data += read_ranges(self.context.storage, place["thumbnails"], within * THUMBNAIL_PIXELS, lengths)
        return np.frombuffer(b"".join(data), np.uint8).reshape(-1, THUMBNAIL_PIXELS)

    def _divided(self, rows_T: NDArray[np.int64]) -> Iterator[tuple[Json, NDArray[np.int64]]]:
        bounds = np.searchsorted(rows_T, self.starts)
        for place, start, low, high in zip(self.places, self.starts, bounds[:-1], bounds[1:], strict=False):
            if high > low:
                yield place, rows_T[low:high] - start


def _search(context: UnitContext, config: DatasetConfig) -> Json:
    arguments = context.unit.arguments
    rows = _Rows.of(context)
    splits_N = rows.splits()
    candidates = left_out = unsearched = done = 0
    kept: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
    for block in pairs_of_unit(HammingSearch(**arguments["search"]), arguments["unit"], rows.blocks(), skip=NO_HASH):
        left_out += block.num_left_out
        unsearched += block.num_unsearched
        first_P, second_P = block.first_P, block.second_P
        if arguments["policy"] == "held_out":
            of_use_P = (splits_N[first_P] != _TRAIN) | (splits_N[second_P] != _TRAIN)
            first_P, second_P = first_P[of_use_P], second_P[of_use_P]
        candidates += len(first_P)
        for part in range(0, len(first_P), _ROWS_AT_ONCE // 2):
            chosen = slice(part, part + _ROWS_AT_ONCE // 2)
            kept.append(_confirmed(rows, first_P[chosen], second_P[chosen], config.near_difference))
            done += len(first_P[chosen])
            context.progress(0, 1, pairs=done)  # how many there are is known at the end only
    first, second, difference = (np.concatenate(c) for c in zip(*kept, strict=True)) if kept else _no_pairs()
    save_arrays(context.scratch("pairs"), {"first": first, "second": second, "difference": difference})
    return {"candidates": candidates, "pairs": len(first), "left_out": left_out, "unsearched": unsearched}


def _no_pairs() -> tuple[NDArray[Any], ...]:
    return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)


def _confirmed(
    rows: _Rows, first_P: NDArray[np.int64], second_P: NDArray[np.int64], limit: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The pairs whose thumbnails differ by no more than the limit, and by how much."""
    rows_T, at = np.unique(np.concatenate([first_P, second_P]), return_inverse=True)
    thumbnails_TP = rows.thumbnails(rows_T)
    difference_P = differences(thumbnails_TP[at[: len(first_P)]], thumbnails_TP[at[len(first_P) :]])
    same_P = difference_P <= limit
    return first_P[same_P], second_P[same_P], difference_P[same_P].astype(np.float32)


def _decide(context: UnitContext) -> Json:
    rows = _Rows.of(context)
    paths = json.loads(context.storage.read_bytes(context.unit.arguments["pairs"]))
    found = [load_arrays(context.storage, path) for path in paths]
    first_P, second_P, difference_P = (np.concatenate([f[n] for f in found]) for n in ("first", "second", "difference"))
    # The rows that are in a pair, by ascending content id; all others have nothing to do with it.
    rows_T, at = np.unique(np.concatenate([first_P, second_P]), return_inverse=True)
    first_P, second_P = at[: len(first_P)], at[len(first_P) :]
    splits_T = rows.splits()[rows_T]
    decision = decide(first_P, second_P, splits_T, rows.preference(rows_T), context.unit.arguments["policy"])
    save_arrays(context.scratch("removed"), {"content_id": rows.ids(rows_T, "content_id")[decision.removed_T]})
    if len(rows_T):
        _write_table(
            context, rows.ids(rows_T, "example_id"), splits_T, decision, _nearest(first_P, second_P, difference_P, len(rows_T))
        )
    removed = {split: int(decision.removed_T[splits_T == code].sum()) for code, split in enumerate(SPLITS)}
    return {"examples": len(rows_T), "groups": len(np.unique(decision.groups_T)), "removed": removed}


def _nearest(
    first_P: NDArray[np.int64], second_P: NDArray[np.int64], difference_P: NDArray[np.float32], count: int
) -> NDArray[np.float32]:
    """Every row's difference to the nearest of its pairs, float32 [T]."""
    nearest_T = np.full(count, np.inf, np.float32)
    np.minimum.at(nearest_T, first_P, difference_P)
    np.minimum.at(nearest_T, second_P, difference_P)
    return nearest_T


def _write_table(
    context: UnitContext,
    ids_T16: NDArray[np.uint8],
    splits_T: NDArray[np.int8],
    decision: Decision,
    nearest_T: NDArray[np.float32],
) -> None:
    columns = {
        "example_id": ids_from_array(ids_T16),
        "group": ids_from_array(ids_T16[decision.groups_T]),
        "split": pa.array([SPLITS[code] for code in splits_T]),
        "difference": nearest_T,
        "removed": decision.removed_T,
    }
    write_table(context.output("duplicates/part-00000-of-00001.parquet"), build_table(DUPLICATES, columns))
