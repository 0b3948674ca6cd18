"""What networks read of a partition: their own part, the copies beside it, and how often each example is trained on."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hardmoe.artifacts.record import Record
from hardmoe.artifacts.store import Artifact
from hardmoe.data.reading import example_shards, num_trained_on, training_shards
from hardmoe.data.schemas import PART
from hardmoe.stage import FileEntry
from hardmoe.storage import LocalStorage
from hardmoe.tables import build_table, ids_from_array, write_table


def ids_of(*numbers: int) -> NDArray[np.uint8]:
    return np.repeat(np.array(numbers, np.uint8)[:, None], 16, axis=1)


FILES = {
    "split=train/expert=0000/part-00000-of-00001.parquet": (1, 2, 3),
    "split=train/expert=0001/part-00000-of-00002.parquet": (4,),
    "split=train/expert=0001/part-00001-of-00002.parquet": (5, 6),
    "split=test/expert=0001/part-00000-of-00001.parquet": (9,),
    "extra/expert=0001/part-00000-of-00001.parquet": (1, 3),
    "extra/expert=0002/part-00000-of-00001.parquet": (1, 6),
}


@pytest.fixture
def partition(tmp_path: Path) -> Artifact:
    storage = LocalStorage(tmp_path)
    for name, numbers in FILES.items():
        count = len(numbers)
        columns = {"image": [b"x"] * count, "tags": [["a"]] * count, "distance": np.zeros(count, np.float32)}
        table = build_table(PART, {"example_id": ids_from_array(ids_of(*numbers)), **columns})
        write_table(storage.open_output(f"partition/{name}"), table)
    return Artifact("partition", Record("partition", 1, "", {}, {}, [FileEntry(name, 0, "") for name in FILES]), storage)


def test_an_expert_trains_on_its_part_and_its_copies_and_everything_else_reads_the_part(partition: Artifact) -> None:
    part = ["split=train/expert=0001/part-00000-of-00002.parquet", "split=train/expert=0001/part-00001-of-00002.parquet"]
    assert example_shards(partition, "train", 1) == [f"partition/{name}" for name in part]
    copies = "partition/extra/expert=0001/part-00000-of-00001.parquet"
    assert training_shards(partition, 1) == [*example_shards(partition, "train", 1), copies]
    assert training_shards(partition, 0) == example_shards(partition, "train", 0)
    assert len(example_shards(partition, "test", 1)) == 1


def test_examples_are_counted_once_for_each_expert_that_trains_on_them(partition: Artifact) -> None:
    assert num_trained_on(partition, ids_of(1, 2, 3, 4, 5, 6)).tolist() == [3, 1, 2, 1, 1, 2]


def test_copies_of_examples_that_are_not_asked_for_do_not_count(partition: Artifact) -> None:
    """Those without a label are in the parts, and no network trains on them."""
    assert num_trained_on(partition, ids_of(2, 3)).tolist() == [1, 2]
    assert num_trained_on(partition, ids_of(0, 2)).tolist() == [1, 1]
    assert num_trained_on(partition, ids_of()).tolist() == []
