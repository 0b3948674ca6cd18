"""The solver of the transportation problem against SciPy's general assignment, with every part repeated by its room."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from hardmoe.partitioning import transport
from hardmoe.partitioning.transport import COST_BITS, solve_transport


def optimum(costs, room):
    repeated = costs[:, np.repeat(np.arange(len(room)), room)]
    return int(repeated[linear_sum_assignment(repeated)].sum())


def check(costs, room, start=None):
    found = solve_transport(costs, room, start)
    assert (np.bincount(found.parts_M, minlength=len(room)) <= room).all()
    best = optimum(costs, room)
    assert int(costs[np.arange(len(costs)), found.parts_M].sum()) == best
    # The prices prove it: their bound is the optimum itself, and every row is where it is cheapest.
    priced = costs + found.prices_K
    assert found.prices_K.min() == 0
    assert int(priced.min(axis=1).sum()) - int((found.prices_K * room).sum()) == best
    np.testing.assert_array_equal(priced[np.arange(len(costs)), found.parts_M], priced.min(axis=1))
    return found


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    parts=st.integers(1, 9),
    rows=st.integers(0, 70),
    spread=st.sampled_from([1, 2, 5, 1000, 2**40]),
    warm=st.booleans(),
)
def test_solution_is_optimal_and_proved_so_whatever_ties(seed, parts, rows, spread, warm):
    rng = np.random.default_rng(seed)
    costs = rng.integers(-spread, spread, (rows, parts))
    room = rng.multinomial(rows + rng.integers(0, 12), rng.dirichlet(np.ones(parts)))
    check(costs, room, rng.integers(0, 2 * spread, parts) if warm else None)


@pytest.mark.parametrize("sorted_rows", [1, 3, 64])
def test_solution_does_not_depend_on_how_many_rows_are_kept_sorted(monkeypatch, sorted_rows):
    """Rows that left and came back, and rows that came after a queue was made, are not in it."""
    rng = np.random.default_rng(4)
    costs = rng.integers(0, 10**6, (600, 6))
    costs[:, 0] -= 10**6  # every row wants the first part
    expected = check(costs, np.full(6, 100))
    monkeypatch.setattr(transport, "_SORTED", sorted_rows)
    found = check(costs, np.full(6, 100))
    np.testing.assert_array_equal(found.parts_M, expected.parts_M)


def test_largest_costs_that_are_allowed_do_not_overflow():
    largest = 2**COST_BITS - 1
    costs = np.where(np.random.default_rng(0).random((40, 5)) < 0.5, largest, -largest)
    check(costs, np.full(5, 8))


def test_unused_room_moves_at_once_and_not_one_by_one():
    """All rows want one part of three, and a billion rows would fit."""
    costs = np.array([[0, 10, 20]] * 5)
    found = solve_transport(costs, np.array([2, 10**9, 10**9]))
    assert np.bincount(found.parts_M, minlength=3).tolist() == [2, 3, 0]
    assert found.prices_K.tolist() == [10, 0, 0]


@pytest.mark.parametrize("room", [[1, 1], [4, -1]])
def test_rows_that_cannot_fit_are_refused(room):
    with pytest.raises(ValueError, match="3 rows do not fit"):
        solve_transport(np.zeros((3, 2), np.int64), np.array(room))
