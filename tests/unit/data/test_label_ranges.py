"""Labels found by id: the same as a dictionary finds, from no more tables than can hold them."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from numpy.typing import NDArray

from hardmoe.artifacts.record import Record
from hardmoe.artifacts.store import Artifact
from hardmoe.data.label_ranges import RANGES_FILE, range_of, ranges_table
from hardmoe.data.reading import labels_of
from hardmoe.data.schemas import LABELS
from hardmoe.errors import CorruptFileError
from hardmoe.stage import FileEntry
from hardmoe.storage import LocalStorage
from hardmoe.tables import build_table, ids_from_array, write_table

SPLITS = ("train", "validation", "test")
NUM_SHARDS, ROWS = 8, 30


class WatchedStorage(LocalStorage):
    """Notes which tables of labels are opened."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.opened: list[str] = []

    def open_input(self, path: str) -> BinaryIO:
        self.opened += [path] if "labels/" in path else []
        return super().open_input(path)


class Vocabulary:
    """Labels of `NUM_SHARDS` shards in each split; one shard of the test split has no rows, and so no table."""

    def __init__(self, directory: Path, *, by_range: bool) -> None:
        rng = np.random.default_rng(0)
        self.ids: dict[tuple[str, int], NDArray[np.uint8]] = {}
        for shard in range(NUM_SHARDS):
            for split in SPLITS:
                if (split, shard) != ("test", 2):
                    ids_N16 = rng.integers(0, 256, (ROWS, 16), np.uint8)
                    if by_range:
                        ids_N16[:, 0] = ids_N16[:, 0] // NUM_SHARDS + shard * (256 // NUM_SHARDS)
                    self.ids[split, shard] = ids_N16
        self.storage = WatchedStorage(directory)
        self.labels: dict[bytes, list[int]] = {}
        self.keys = sorted(self.ids, key=lambda key: (SPLITS.index(key[0]), key[1]))
        names = [f"labels/part-{index:05d}-of-{len(self.keys):05d}.parquet" for index in range(len(self.keys))]
        for name, key in zip(names, self.keys, strict=True):
            tags = [sorted(set(rng.integers(0, 50, rng.integers(0, 4)).tolist())) for _ in range(ROWS)]
            self.labels |= dict(zip(map(bytes, self.ids[key]), tags, strict=True))
            table = build_table(LABELS, {"example_id": ids_from_array(self.ids[key]), "tags": tags})
            write_table(self.storage.open_output(f"vocabulary/{name}"), table)
        shards = [f"dataset/split={split}/part-{shard:05d}-of-{NUM_SHARDS:05d}.parquet" for split, shard in self.keys]
        ranges = [range_of(self.ids[key]) for key in self.keys]
        self.storage.write_bytes(f"vocabulary/{RANGES_FILE}", ranges_table(names, shards, ranges))
        entries = [FileEntry(name, 0, "") for name in [*names, RANGES_FILE]]
        self.artifact = Artifact("vocabulary", Record("vocabulary", 1, "", {}, {}, entries), self.storage)
        self.of_table = {f"vocabulary/{name}": key for name, key in zip(names, self.keys, strict=True)}

    def opened(self) -> list[tuple[str, int]]:
        """The tables that were opened since the last time, by split and shard."""
        opened, self.storage.opened = [self.of_table[path] for path in self.storage.opened], []
        return opened

    def expected(self, ids_N16: NDArray[np.uint8]) -> list[list[int]]:
        return [self.labels[bytes(row)] for row in ids_N16]


def found(vocabulary: Vocabulary, ids_N16: NDArray[np.uint8], **hints: object) -> list[list[int]]:
    labels = labels_of(vocabulary.artifact, ids_N16, **hints)  # type: ignore[arg-type]
    pairs = zip(labels.offsets[:-1], labels.offsets[1:], strict=True)
    return [labels.indices_L[start:stop].tolist() for start, stop in pairs]


def some(vocabulary: Vocabulary, keys: Sequence[tuple[str, int]], count: int, seed: int) -> NDArray[np.uint8]:
    """Ids out of some tables, in no order."""
    all_ids = np.concatenate([vocabulary.ids[key] for key in keys])
    return all_ids[np.random.default_rng(seed).permutation(len(all_ids))[:count]]


@pytest.mark.parametrize("by_range", [True, False])
def test_labels_are_those_of_a_dictionary_with_any_hint_right_or_wrong(tmp_path: Path, by_range: bool) -> None:
    vocabulary = Vocabulary(tmp_path, by_range=by_range)
    for seed, count in enumerate((0, 1, 7, 100)):
        everywhere = some(vocabulary, vocabulary.keys, count, seed)
        assert found(vocabulary, everywhere) == vocabulary.expected(everywhere)
        for near in (None, (0, NUM_SHARDS), (3, NUM_SHARDS), (NUM_SHARDS - 1, NUM_SHARDS), (0, 1), (70, 99)):
            training = some(vocabulary, [key for key in vocabulary.keys if key[0] == "train"], count, seed)
            assert found(vocabulary, training, split="train", near=near) == vocabulary.expected(training)


def test_ids_of_one_shard_open_its_table_and_no_other(tmp_path: Path) -> None:
    """Every unit opened the tables of all shards: a thousand units and a thousand tables are a million requests."""
    ranged = Vocabulary(tmp_path / "a", by_range=True)
    for key in ranged.keys:
        assert found(ranged, ranged.ids[key], split=key[0]) == ranged.expected(ranged.ids[key])
        assert ranged.opened() == [key]
    named = Vocabulary(tmp_path / "b", by_range=False)
    tests = [key for key in named.keys if key[0] == "test"]
    for at, key in enumerate(tests):
        assert found(named, named.ids[key], split="test", near=(at, len(tests))) == named.expected(named.ids[key])
        assert named.opened() == [key], "the place among the split's shards says it where the ranges do not"


def test_a_split_opens_no_table_of_another_and_stops_when_all_are_found(tmp_path: Path) -> None:
    vocabulary = Vocabulary(tmp_path, by_range=False)
    keys = [key for key in vocabulary.keys if key[0] == "validation"]
    ids_N16 = np.concatenate([vocabulary.ids[key] for key in keys[:3]])
    assert found(vocabulary, ids_N16, split="validation") == vocabulary.expected(ids_N16)
    assert vocabulary.opened() == keys[:3]


def test_example_without_a_row_is_refused_whatever_the_ranges_say(tmp_path: Path) -> None:
    vocabulary = Vocabulary(tmp_path, by_range=True)
    ids_N16 = np.concatenate([vocabulary.ids["train", 0], np.full((1, 16), 255, np.uint8)])
    with pytest.raises(CorruptFileError, match=r"/vocabulary/labels has labels of 30 of 31 examples; delete the vocabulary"):
        labels_of(vocabulary.artifact, ids_N16)
