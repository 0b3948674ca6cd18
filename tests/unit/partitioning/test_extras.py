"""Which examples further experts train on, against a plain reading of the rules, row by row."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hardmoe.errors import DataError
from hardmoe.hashing import hash_fractions
from hardmoe.neighbours.assignment import Assignment
from hardmoe.partitioning.extras import ExtraCopies, chances_to_be_drawn, extra_copies, overlaps

EXPERTS = 4


class Shard:
    """Points and centroids in the plane, and what is known of them."""

    def __init__(self, num: int = 300, seed: int = 0) -> None:
        chance = np.random.default_rng(seed)
        self.ids = chance.integers(0, 256, (num, 16), dtype=np.uint8)
        points, centroids = chance.standard_normal((num, 2)), chance.standard_normal((EXPERTS, 2))
        self.squared_NK = ((points[:, None] - centroids) ** 2).sum(-1)
        order_NK = np.argsort(self.squared_NK, axis=1).astype(np.int32)
        rows = np.arange(num)
        first, second = np.ascontiguousarray(order_NK[:, 0]), np.ascontiguousarray(order_NK[:, 1])
        self.assignment = Assignment(first, second, self.squared_NK[rows, first])
        self.second_squared = self.squared_NK[rows, second]

    def overlaps(self, ratio: float | None) -> NDArray[np.bool_]:
        return overlaps(self.assignment, self.second_squared, ratio)

    def rows(self, rows: slice) -> "Shard":
        part = object.__new__(Shard)
        part.ids, part.second_squared = self.ids[rows], self.second_squared[rows]
        known = self.assignment
        part.assignment = Assignment(known.primary_N[rows], known.second_N[rows], known.squared_distance_N[rows])
        return part


def pairs(copies: ExtraCopies, first_row: int = 0) -> list[tuple[int, int, bool]]:
    rows = (copies.rows_P + first_row).tolist()
    return list(zip(rows, copies.experts_P.tolist(), copies.overlaps_P.tolist(), strict=True))


@pytest.mark.parametrize("ratio", [1.0, 1.1, 1.5, 3.0, 1e6])
def test_overlapping_rows_are_those_about_as_near_to_a_second_centroid(ratio: float) -> None:
    shard = Shard()
    near_NK = np.sort(np.sqrt(shard.squared_NK), axis=1)
    expected = [bool(second <= ratio * first) for first, second in near_NK[:, :2]]
    assert shard.overlaps(ratio).tolist() == expected
    assert 0 < sum(expected) < len(expected) or ratio in (1.0, 1e6)


def test_no_row_overlaps_where_nothing_is_asked_or_no_second_part_is_there() -> None:
    shard = Shard()
    assert not shard.overlaps(None).any()
    alone = Assignment(shard.assignment.primary_N, np.full(300, -1, np.int32), shard.assignment.squared_distance_N)
    assert not overlaps(alone, np.full(300, np.nan), 1e6).any()


def test_row_on_its_own_centroid_overlaps_only_with_one_at_the_same_place() -> None:
    assignment = Assignment(np.zeros(2, np.int32), np.ones(2, np.int32), np.zeros(2))
    assert overlaps(assignment, np.array([0.0, 1e-300]), 1.1).tolist() == [True, False]


@pytest.mark.parametrize("ratio", [None, 1.3])
@pytest.mark.parametrize("chances", [[], [0.0, 0.1, 0.5, 1.0]])
def test_copies_are_the_overlapping_rows_and_those_whose_hash_is_below_the_chance(
    ratio: float | None, chances: list[float]
) -> None:
    shard = Shard()
    lots = [hash_fractions(shard.ids, 5, "out-of-part", expert) for expert in range(EXPERTS)]
    expected = []
    for row in range(300):
        own = int(shard.assignment.primary_N[row])
        border = {int(shard.assignment.second_N[row])} if shard.overlaps(ratio)[row] else set()
        for expert in range(EXPERTS):
            drawn = bool(chances) and lots[expert][row] < chances[expert]
            if expert in border or (drawn and expert != own):
                expected.append((row, expert, expert in border))
    found = pairs(extra_copies(shard.ids, shard.assignment, shard.overlaps(ratio), chances, seed=5))
    assert found == expected
    assert len({(row, expert) for row, expert, _ in found}) == len(found)
    assert bool(expected) == (ratio is not None or bool(chances))


@given(st.integers(0, 300))
def test_copies_do_not_depend_on_how_the_examples_are_cut_into_shards(cut: int) -> None:
    shard, chances = Shard(), [0.1, 0.2, 0.3, 0.4]
    whole = pairs(extra_copies(shard.ids, shard.assignment, shard.overlaps(1.3), chances, 1))
    cuts = [(0, shard.rows(slice(0, cut))), (cut, shard.rows(slice(cut, 300)))]
    assert whole == [
        pair for at, part in cuts for pair in pairs(extra_copies(part.ids, part.assignment, part.overlaps(1.3), chances, 1), at)
    ]


def test_each_expert_and_each_seed_draws_by_itself() -> None:
    shard = Shard(2000)
    nobody = np.zeros(2000, bool)
    draws = [extra_copies(shard.ids, shard.assignment, nobody, [0.3] * EXPERTS, seed) for seed in (0, 1)]
    assert pairs(draws[0]) != pairs(draws[1])
    chosen = [set(draws[0].rows_P[draws[0].experts_P == expert].tolist()) for expert in range(EXPERTS)]
    others = [set(np.flatnonzero(shard.assignment.primary_N != expert).tolist()) for expert in range(EXPERTS)]
    common = others[0] & others[1]
    both = len(chosen[0] & chosen[1] & common) / len(common)
    assert abs(both - 0.09) < 4 * math.sqrt(0.09 * 0.91 / len(common))


@pytest.mark.parametrize("fraction", [0.02, 0.3])
def test_the_wanted_share_of_an_experts_examples_comes_from_outside(fraction: float) -> None:
    shard = Shard(20_000)
    border = shard.overlaps(1.05)
    members = [
        int((shard.assignment.primary_N == expert).sum() + (border & (shard.assignment.second_N == expert)).sum())
        for expert in range(EXPERTS)
    ]
    chances = chances_to_be_drawn(fraction, members, 20_000)
    copies = extra_copies(shard.ids, shard.assignment, border, chances, seed=0)
    for expert in range(EXPERTS):
        drawn = int(((copies.experts_P == expert) & ~copies.overlaps_P).sum())
        outside = 20_000 - members[expert]
        wanted = fraction * (members[expert] + drawn)
        spread = math.sqrt(outside * chances[expert] * (1 - chances[expert]))
        assert abs(drawn - wanted) < 4 * spread, (expert, drawn, wanted)


def test_expert_without_examples_of_its_own_is_given_none() -> None:
    assert chances_to_be_drawn(0.5, [0, 10, 10], 20)[0] == 0.0
    assert chances_to_be_drawn(0.5, [10, 10], 20) == [1.0, 1.0]


def test_share_that_the_others_cannot_make_up_is_refused_with_one_that_they_can() -> None:
    with pytest.raises(DataError) as caught:
        chances_to_be_drawn(0.3, [80, 20], 100)
    assert str(caught.value) == (
        "expert 0 has 80 of the 100 training examples, so partition.out_of_part_fraction 0.3 asks for 34 of the other 20; "
        "lower it to 0.2 or less, or make the parts more even"
    )
    assert chances_to_be_drawn(0.2, [80, 20], 100) == pytest.approx([1.0, 0.0625])
    with pytest.raises(DataError, match=r"lower it to 0\.0012 or less"):
        chances_to_be_drawn(0.02, [99_871, 129], 100_000)
    assert max(chances_to_be_drawn(0.0012, [99_871, 129], 100_000)) <= 1.0
    with pytest.raises(DataError, match="lower it to 0 or less"):
        chances_to_be_drawn(0.02, [100, 0], 100)
