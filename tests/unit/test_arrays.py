"""Arrays between phases: equal arrays give equal bytes, come back as they were, and damage is told."""

from pathlib import Path

import numpy as np
import pytest

from hardmoe.arrays import load_arrays, save_arrays
from hardmoe.errors import CorruptFileError
from hardmoe.storage import LocalStorage

ARRAYS = {
    "sums": np.arange(12, dtype=np.float64).reshape(3, 4),
    "counts": np.array([2**62, -1], np.int64),
    "empty": np.zeros((0, 16), np.uint8),
    "strided": np.arange(10, dtype=np.float32)[::2],
}


def test_arrays_come_back_with_their_types_and_shapes(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    save_arrays(storage.open_output("a"), ARRAYS)
    loaded = load_arrays(storage, "a")
    assert loaded.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_equal_arrays_give_equal_bytes_in_whatever_order_and_layout(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    save_arrays(storage.open_output("a"), ARRAYS)
    save_arrays(storage.open_output("b"), {name: np.copy(ARRAYS[name], order="F") for name in reversed(ARRAYS)})
    assert storage.read_bytes("a") == storage.read_bytes("b")


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-1], lambda data: data[:20], lambda data: b"x" * len(data)]
)
def test_damaged_arrays_are_named(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    storage = LocalStorage(tmp_path)
    save_arrays(storage.open_output("a"), ARRAYS)
    storage.write_bytes("a", damage(storage.read_bytes("a")))
    with pytest.raises(CorruptFileError, match=rf"{tmp_path}/a is damaged"):
        load_arrays(storage, "a")
