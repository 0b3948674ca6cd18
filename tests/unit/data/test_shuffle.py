"""Rows regrouped through files, and byte ranges read in few requests."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hardmoe.data.byte_ranges import read_ranges
from hardmoe.data.shuffle import read_buckets, write_buckets
from hardmoe.errors import CorruptFileError
from hardmoe.storage import LocalStorage


def write_files(storage: LocalStorage, num_buckets: int) -> list[tuple[int, int, list[str]]]:
    """Three files of rows (bucket, number, tags), the last of them empty; returns the rows in order of writing."""
    rng = np.random.default_rng(0)
    rows = []
    for file, count in enumerate((50, 3, 0)):
        buckets = rng.integers(0, num_buckets, count)
        numbers = np.arange(count) + 1000 * file
        tags = [[f"tag{n}"] * (n % 3) for n in numbers]
        table = pa.table({"number": numbers, "tags": pa.array(tags, pa.list_(pa.string()))})
        write_buckets(storage.open_output(f"{file}.arrow"), table, buckets, num_buckets)
        rows += list(zip(buckets.tolist(), numbers.tolist(), tags, strict=True))
    return rows


FILES = ["0.arrow", "1.arrow", "2.arrow"]


@pytest.mark.parametrize("num_buckets", [1, 7, 64])
def test_every_row_is_in_its_bucket_once_and_in_order(tmp_path: Path, num_buckets: int) -> None:
    storage = LocalStorage(tmp_path)
    rows = write_files(storage, num_buckets)
    for bucket in range(num_buckets):
        found = read_buckets(storage, FILES, bucket, bucket + 1)
        expected = [(number, tags) for into, number, tags in rows if into == bucket]
        assert list(zip(found["number"].to_pylist(), found["tags"].to_pylist(), strict=True)) == expected


def test_consecutive_buckets_and_some_columns_are_read_together(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    rows = write_files(storage, 8)
    found = read_buckets(storage, FILES, 2, 6, columns=["number"])
    assert found.column_names == ["number"]
    assert sorted(found["number"].to_pylist()) == sorted(number for into, number, _ in rows if 2 <= into < 6)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    write_files(storage, 8)
    (tmp_path / "0.arrow").write_bytes((tmp_path / "0.arrow").read_bytes()[:-30])
    with pytest.raises(CorruptFileError, match=r"0\.arrow is damaged"):
        read_buckets(storage, FILES, 0, 1)


class Watched(LocalStorage):
    """Counts what is asked of the file."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.reads: list[int] = []

    def open_input(self, path):  # type: ignore[no-untyped-def]
        source = super().open_input(path)
        reads = self.reads

        class Counting:
            def seek(self, offset: int) -> None:
                source.seek(offset)

            def read(self, count: int) -> bytes:
                reads.append(count)
                return source.read(count)

            def close(self) -> None:
                source.close()

        return Counting()


def test_ranges_come_back_in_the_order_asked_for_and_neighbours_in_one_read(tmp_path: Path) -> None:
    data = np.random.default_rng(1).integers(0, 256, 1_000_000).astype(np.uint8).tobytes()
    (tmp_path / "blob").write_bytes(data)
    storage = Watched(tmp_path)
    offsets = np.array([900_000, 10, 110, 500_000, 60, 500_000, 0])
    lengths = np.array([7, 100, 50, 0, 100, 33, 10])
    found = read_ranges(storage, "blob", offsets, lengths)
    assert found == [data[o : o + n] for o, n in zip(offsets.tolist(), lengths.tolist(), strict=True)]
    assert storage.reads == [160, 33, 7], "overlapping and close ranges at once, far ones apart"


def test_no_ranges_are_no_read(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"abc")
    assert read_ranges(LocalStorage(tmp_path), "blob", np.zeros(0, np.int64), np.zeros(0, np.int64)) == []


def test_range_beyond_the_end_is_told(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"abc")
    with pytest.raises(CorruptFileError, match="ends at byte 3, before byte 5"):
        read_ranges(LocalStorage(tmp_path), "blob", np.array([0, 1]), np.array([1, 4]))
