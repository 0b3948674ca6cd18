"""Rows of different lengths and ids as two words, against lists and bytes."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardmoe.data.ids import ID_RANGE, id_order, is_within, order_of_distinct, range_bounds
from hardmoe.data.ragged import consecutive, offsets_of, take_rows

ROWS = st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=8)
IDS = st.lists(st.binary(min_size=16, max_size=16) | st.integers(0, 2).map(lambda n: bytes([n]) * 16), max_size=12)


def array_of(ids: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 16)


@given(ROWS, st.data())
def test_rows_that_are_taken_are_those_of_a_list(rows: list[list[int]], data: st.DataObject) -> None:
    taken = data.draw(st.lists(st.sampled_from(range(len(rows))), max_size=10)) if rows else []
    values = np.array([value for row in rows for value in row], np.int32)
    offsets = offsets_of(np.array([len(row) for row in rows], np.int64))
    found, bounds = take_rows(values, offsets, np.array(taken, np.int64))
    assert [found[a:b].tolist() for a, b in pairwise(bounds)] == [rows[row] for row in taken]
    assert found.dtype == np.int32 and bounds.dtype == np.int64 and bounds[0] == 0


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 5)), max_size=8))
def test_consecutive_numbers_are_those_of_ranges(ranges: list[tuple[int, int]]) -> None:
    starts, lengths = (np.array([pair[at] for pair in ranges], np.int64) for at in (0, 1))
    assert consecutive(starts, lengths).tolist() == [n for start, length in ranges for n in range(start, start + length)]


@given(IDS)
def test_ids_are_ordered_as_their_bytes_and_equal_ones_stay_in_order(ids: list[bytes]) -> None:
    assert id_order(array_of(ids)).tolist() == sorted(range(len(ids)), key=lambda at: ids[at])
    if len(set(ids)) == len(ids):
        assert order_of_distinct(array_of(ids)).tolist() == id_order(array_of(ids)).tolist()
    else:
        with pytest.raises(ValueError, match="an example id occurs twice in one set"):
            order_of_distinct(array_of(ids))


@given(IDS, st.integers(1, 7))
def test_every_id_is_within_one_range_that_its_leading_bits_say(ids: list[bytes], count: int) -> None:
    for identity in [*ids, bytes(16), b"\xff" * 16]:
        number = int.from_bytes(identity[:8], "big")
        within = [is_within(array_of([identity]), *range_bounds(index, count))[0] for index in range(count)]
        assert within == [low <= number < high for low, high in (range_bounds(index, count) for index in range(count))]
        assert sum(within) == 1
    assert range_bounds(0, count)[0] == 0 and range_bounds(count - 1, count)[1] == ID_RANGE
