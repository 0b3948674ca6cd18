"""The partition's files: parts larger than one shard, and larger than memory."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import run_here, write_recipe

from hardmoe.data.schemas import PART
from hardmoe.partitioning import regroup
from hardmoe.partitioning.regroup import _write_regrouped, cut
from hardmoe.stage import UnitContext
from hardmoe.storage import LocalStorage, OutputFile
from hardmoe.tables import ID_TYPE


def numbers(start: int, stop: int) -> pa.Table:
    return pa.table({"n": pa.array(range(start, stop), pa.int64())})


@pytest.mark.parametrize("bounds", [[0, 10], [0, 3, 10], [0, 1, 2, 9, 10], [0, 5, 5, 10]])
@pytest.mark.parametrize("sizes", [[10], [5, 5], [3, 3, 4], [1] * 10])
def test_cut_tables_hold_every_row_once_and_in_order_however_the_stream_came(bounds: list[int], sizes: list[int]) -> None:
    stream = [numbers(low, high) for low, high in pairwise(bounds)]
    found = list(cut(stream, sizes))
    assert [table.num_rows for table in found] == sizes
    assert pa.concat_tables(found).column("n").to_pylist() == list(range(10))


def test_cut_draws_a_table_only_when_it_is_needed() -> None:
    """A part was once read whole before its first shard was written, so its size was bounded by a worker's memory."""
    drawn = 0

    def stream() -> Iterator[pa.Table]:
        nonlocal drawn
        for start in range(0, 100, 10):
            drawn += 1
            yield numbers(start, start + 10)

    for index, table in enumerate(cut(stream(), [20] * 5)):
        assert table.num_rows == 20
        assert drawn == 2 * (index + 1)


def test_cut_of_a_stream_that_ends_early_gives_what_there_is() -> None:
    """The partition's count and checksum must see the loss; nothing here may hide it."""
    assert sum(table.num_rows for table in cut([numbers(0, 3)], [2, 2, 2])) == 3
    assert list(cut([], [2])) == []


def test_a_part_larger_than_a_shard_is_cut_and_its_experts_still_see_every_example(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regroup, "SHARD_BYTES", 4096)
    write_recipe(
        tmp_path, root="runs/cut", reuse=[str(finished / "runs" / "small")], dataset={"path": str(finished / "photos" / "*")}
    )
    # Another seed's partition: one of the same fingerprint would be taken over with its uncut parts.
    run_here(tmp_path, "partition", "--set", "partition.max_passes=4")
    root = tmp_path / "runs" / "cut"
    parts = [sorted((root / "partition" / "split=train" / f"expert={expert:04d}").iterdir()) for expert in range(3)]
    assert max(map(len, parts)) > 2
    examples = sorted(path for path in (finished / "runs" / "small" / "dataset" / "split=train").iterdir())
    expected = sorted(identity for path in examples for identity in pq.read_table(path).column("example_id").to_pylist())
    shards = [pq.read_table(path).column("example_id").to_pylist() for part in parts for path in part]
    assert sorted(identity for shard in shards for identity in shard) == expected
    assert all(shard == sorted(shard) for shard in shards)


class ScratchOnly:
    """As much of a unit's context as writing the regrouped file needs."""

    def __init__(self, folder: Path) -> None:
        self.storage = LocalStorage(folder)

    def scratch(self, name: str) -> AbstractContextManager[OutputFile]:
        return self.storage.open_output(name)


@pytest.mark.slow
def test_a_dataset_shard_of_more_than_two_gibibytes_of_images_is_regrouped(tmp_path: Path) -> None:
    """Arrow's `take` makes one array of a column first and refuses beyond 2 GiB, which is 8,192 photographs of 260 kB."""
    half = pa.array([bytes(1 << 20)] * 1100, pa.binary())
    count = 2 * len(half)
    ids = pa.array([number.to_bytes(16, "big") for number in range(count)], ID_TYPE)
    columns = [ids, pa.chunked_array([half, half]), pa.array([[]] * count, pa.list_(pa.string())), pa.array([0.0] * count)]
    experts_N = np.zeros(count, np.int32)
    experts_N[5] = 1
    sizes = _write_regrouped(cast(UnitContext, ScratchOnly(tmp_path)), pa.table(columns, names=PART.names), experts_N)
    assert sizes == {0: (count - 1) << 20, 1: 1 << 20}
    regrouped = pq.ParquetFile(tmp_path / "regrouped")
    assert [regrouped.read_row_group(group, ["example_id"]).num_rows for group in (0, 1)] == [count - 1, 1]
