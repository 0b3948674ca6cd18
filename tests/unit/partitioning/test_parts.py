"""The partition's files: parts larger than one shard, and larger than memory; copies beside; nothing lost on the way."""

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
from hardmoe.errors import CorruptFileError
from hardmoe.partitioning import parts
from hardmoe.partitioning.parts import Membership, check_complete, cut, merge_unit, write_regrouped
from hardmoe.stage import Completion, Unit, UnitContext
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
    monkeypatch.setattr(parts, "SHARD_BYTES", 4096)
    write_recipe(
        tmp_path, root="runs/cut", reuse=[str(finished / "runs" / "small")], dataset={"path": str(finished / "photos" / "*")}
    )
    # Another seed's partition: one of the same fingerprint would be taken over with its uncut parts.
    run_here(tmp_path, "partition", "--set", "partition.max_passes=4")
    root = tmp_path / "runs" / "cut"
    found = [sorted((root / "partition" / "split=train" / f"expert={expert:04d}").iterdir()) for expert in range(3)]
    assert max(map(len, found)) > 2
    examples = sorted(path for path in (finished / "runs" / "small" / "dataset" / "split=train").iterdir())
    expected = sorted(identity for path in examples for identity in pq.read_table(path).column("example_id").to_pylist())
    shards = [pq.read_table(path).column("example_id").to_pylist() for part in found for path in part]
    assert sorted(identity for shard in shards for identity in shard) == expected
    assert all(shard == sorted(shard) for shard in shards)


class ScratchOnly:
    """As much of a unit's context as writing the regrouped file needs."""

    def __init__(self, folder: Path) -> None:
        self.storage = LocalStorage(folder)
        self.unit = Unit("0", {"path": "split=train/part-0.parquet"})

    def scratch(self, name: str) -> AbstractContextManager[OutputFile]:
        return self.storage.open_output(name)


def examples(count: int) -> pa.Table:
    """Rows whose image and hashtag say which row they are."""
    ids = pa.array([bytes([number]) * 16 for number in range(count)], ID_TYPE)
    images = pa.array([b"i" * (number + 1) for number in range(count)], pa.binary())
    return pa.table({"example_id": ids, "image": images, "tags": [[str(number)] for number in range(count)]})


def membership(*pairs: tuple[int, int]) -> Membership:
    """Pairs of a row and an expert; the distance is ten times the row, and the expert."""
    rows, experts = np.array(pairs, np.int64).reshape(-1, 2).T
    return Membership(rows, experts.astype(np.int32), (10 * rows + experts).astype(np.float32))


def ids_of(count: int) -> np.ndarray:
    return np.repeat(np.arange(count, dtype=np.uint8)[:, None], 16, axis=1)


OWN = membership((0, 1), (1, 0), (2, 1), (3, 2), (4, 1))
COPIES = membership((1, 1), (1, 2), (4, 0), (4, 2))


@pytest.mark.parametrize("piece_bytes", [1, 5, 1 << 20])
@pytest.mark.parametrize("bounds", [[0, 5], [0, 2, 5], [0, 1, 2, 3, 4, 5]])
def test_every_row_group_holds_one_experts_examples_with_their_distances(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bounds: list[int], piece_bytes: int
) -> None:
    """One row may go to several experts; whether the shard is sorted in one piece or several must not show."""
    monkeypatch.setattr(parts, "_PIECE_BYTES", piece_bytes)
    tables = [examples(5).slice(low, high - low) for low, high in pairwise(bounds)]
    context = cast(UnitContext, ScratchOnly(tmp_path))
    told = write_regrouped(context, tables, ids_of(5), {"own": OWN, "copies": COPIES}, experts=4)
    for name, wanted in (("own", OWN), ("copies", COPIES)):
        file = pq.ParquetFile(tmp_path / name)
        assert file.schema_arrow.equals(PART)
        for expert in range(4):
            groups = [file.read_row_group(group) for group in told[name]["groups"][expert]]
            rows = [row for group in groups for row in group.to_pylist()]
            expected = [int(row) for row, of in zip(wanted.rows_P, wanted.experts_P, strict=True) if of == expert]
            assert [row["tags"] for row in rows] == [[str(row)] for row in expected]
            assert [row["distance"] for row in rows] == [10.0 * row + expert for row in expected]
            assert told[name]["bytes"][expert] == sum(row + 1 for row in expected)
            assert told[name]["counts"][expert] == len(expected)
        assert sum(len(groups) for groups in told[name]["groups"]) == file.num_row_groups
        assert told[name]["rows"] == len(wanted.rows_P)


def test_checksum_knows_which_examples_and_how_often_but_not_in_which_order(tmp_path: Path) -> None:
    def checksum(copies: Membership) -> int:
        context = cast(UnitContext, ScratchOnly(tmp_path))
        found: int = write_regrouped(context, [examples(5)], ids_of(5), {"copies": copies}, experts=4)["copies"]["checksum"]
        return found

    assert checksum(membership((1, 1), (1, 2), (4, 0))) == checksum(membership((1, 0), (1, 3), (4, 1)))
    assert checksum(membership((1, 1), (1, 2))) != checksum(membership((1, 1)))
    assert checksum(membership((1, 1))) != checksum(membership((2, 1)))


def test_features_of_other_examples_are_refused(tmp_path: Path) -> None:
    context = cast(UnitContext, ScratchOnly(tmp_path))
    with pytest.raises(CorruptFileError, match=r"the features of split=train/part-0\.parquet are of other examples"):
        write_regrouped(context, [examples(5)], ids_of(5)[::-1], {"own": OWN}, experts=4)
    with pytest.raises(CorruptFileError, match="are of other examples"):
        write_regrouped(context, [examples(4)], ids_of(5), {"own": OWN}, experts=4)


def test_part_without_examples_has_nothing_to_merge() -> None:
    told = {"counts": [0, 2], "bytes": [0, 9], "groups": [[], [0]]}
    none, some = (merge_unit("u", "f", expert, [("path", told), ("other", told)]) for expert in (0, 1))
    assert (none.arguments["rows"], none.arguments["sources"]) == (0, [])
    assert (some.arguments["rows"], some.cost) == (4, 4)
    assert some.arguments["sources"] == [{"path": "path", "groups": [0]}, {"path": "other", "groups": [0]}]


@pytest.mark.parametrize(("rows", "checksum", "complete"), [(3, 9, True), (2, 9, False), (3, 8, False), (3, 9 + (1 << 64), True)])
def test_what_was_lost_or_doubled_between_the_steps_is_found_out(rows: int, checksum: int, complete: bool) -> None:
    merged = [Completion("a", {"rows": 1, "checksum": 4}, [], {}), Completion("b", {"rows": 2, "checksum": 5}, [], {})]
    if complete:
        check_complete("partition", [{"rows": rows, "checksum": checksum}], merged)
    else:
        with pytest.raises(CorruptFileError, match=r"partition lost or doubled examples \((rows|checksum): . assigned, . merged"):
            check_complete("partition", [{"rows": rows, "checksum": checksum}], merged)


@pytest.mark.slow
def test_a_dataset_shard_of_more_than_two_gibibytes_of_images_is_regrouped(tmp_path: Path) -> None:
    """Arrow's `take` makes one array of a column first and refuses beyond 2 GiB, which is 8,192 photographs of 260 kB."""
    half = pa.array([bytes(1 << 20)] * 1100, pa.binary())
    count = 2 * len(half)
    ids_N16 = np.zeros((count, 16), np.uint8)
    ids_N16[:, 14:] = np.arange(count, dtype=">u2").view(np.uint8).reshape(-1, 2)
    ids = pa.array([row.tobytes() for row in ids_N16], ID_TYPE)
    columns = [ids, pa.chunked_array([half, half]), pa.array([[]] * count, pa.list_(pa.string()))]
    experts_N = np.zeros(count, np.int32)
    experts_N[5] = 1
    own = Membership(np.arange(count), experts_N, np.zeros(count, np.float32))
    context = cast(UnitContext, ScratchOnly(tmp_path))
    told = write_regrouped(context, [pa.table(columns, names=PART.names[:3])], ids_N16, {"regrouped": own}, experts=2)
    assert told["regrouped"]["bytes"] == [(count - 1) << 20, 1 << 20]
    regrouped = pq.ParquetFile(tmp_path / "regrouped")
    assert [regrouped.read_row_group(group, ["example_id"]).num_rows for group in (0, 1)] == [count - 1, 1]
