"""Epochs and their steps: repeat factors against a count by hand, and orders that depend on ids alone."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hardmoe.data.resampling import (
    Schedule,
    batch_slice,
    epoch_order,
    num_batches,
    repeat_factors,
    repeats_in_epoch,
)


def random_ids(num: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (num, 16), dtype=np.uint8)


def to_csr(labels: list[list[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    return np.array([tag for tags in labels for tag in tags], np.int32), np.cumsum([0, *map(len, labels)], dtype=np.int64)


def schedule_of(ids: NDArray[np.uint8], labels: list[list[int]], threshold: float | None = None, epochs: int = 3) -> Schedule:
    return Schedule(ids, repeat_factors(*to_csr(labels), threshold), batch_size=7, epochs=epochs, seed=4)


@given(st.integers(1, 400), st.integers(1, 64))
def test_batches_of_an_epoch_cover_it_once_in_sizes_that_differ_by_one_at_most(num: int, batch_size: int) -> None:
    slices = [batch_slice(num, batch_size, index) for index in range(num_batches(num, batch_size))]
    sizes = [piece.stop - piece.start for piece in slices]
    assert [position for piece in slices for position in range(piece.start, piece.stop)] == list(range(num))
    assert len(slices) == int(np.ceil(num / batch_size))
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_epoch_order_is_a_permutation_of_ids_that_no_sharding_changes() -> None:
    ids = random_ids(200)
    order = epoch_order(ids, seed=3, epoch=1)
    assert sorted(order.tolist()) == list(range(200))
    shuffled = np.random.default_rng(0).permutation(200)
    assert np.array_equal(ids[shuffled][epoch_order(ids[shuffled], 3, 1)], ids[order])
    assert not np.array_equal(order, epoch_order(ids, 3, 2))
    assert not np.array_equal(order, epoch_order(ids, 4, 1))


def test_epoch_order_of_a_part_is_the_order_of_the_whole_restricted_to_it() -> None:
    ids = random_ids(60)
    whole = [row for row in epoch_order(ids, 0, 0).tolist() if row < 20]
    assert epoch_order(ids[:20], 0, 0).tolist() == whole


LABELS = st.lists(st.sets(st.integers(0, 7), max_size=4).map(sorted), min_size=1, max_size=30)


@given(LABELS, st.sampled_from([0.001, 0.1, 0.5, 1.0]))
def test_factors_are_those_of_the_formula_tag_by_tag(labels: list[list[int]], threshold: float) -> None:
    counts = Counter(tag for tags in labels for tag in tags)
    of_tag = {tag: max(1.0, math.sqrt(threshold / (count / len(labels)))) for tag, count in counts.items()}
    expected = [max((of_tag[tag] for tag in tags), default=1.0) for tags in labels]
    found = repeat_factors(*to_csr(labels), threshold)
    if not counts:
        assert found is None
        return
    assert found is not None
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_no_threshold_repeats_nothing() -> None:
    assert repeat_factors(*to_csr([[0], [1]]), None) is None


def test_mean_number_of_repeats_tends_to_the_factor() -> None:
    """500 epochs: the mean of so many lots is within five standard deviations of the factor, for each of 200 examples."""
    factors = 1 + 3 * np.random.default_rng(1).random(200)
    ids = random_ids(200)
    repeats = np.stack([repeats_in_epoch(factors, ids, 0, epoch) for epoch in range(500)])
    assert np.all((repeats == np.floor(factors)) | (repeats == np.floor(factors) + 1))
    share = factors - np.floor(factors)
    bound = 5 * np.sqrt(share * (1 - share) / 500)
    assert np.all(np.abs(repeats.mean(axis=0) - factors) <= bound)
    # The lots of two examples, and of two epochs, have nothing to do with one another.
    deviations = repeats - factors
    assert abs(np.corrcoef(deviations[:, :2].T)[0, 1]) < 0.25
    assert abs(np.corrcoef(deviations[:2])[0, 1]) < 0.4


def test_whole_factors_need_no_lot() -> None:
    assert repeats_in_epoch(np.array([1.0, 2.0, 3.0]), random_ids(3), 0, 0).tolist() == [1, 2, 3]


def test_repeats_are_of_the_id_and_not_of_the_position() -> None:
    ids, factors = random_ids(100), 1 + np.random.default_rng(2).random(100)
    shuffled = np.random.default_rng(3).permutation(100)
    assert np.array_equal(
        repeats_in_epoch(factors[shuffled], ids[shuffled], 5, 2), repeats_in_epoch(factors, ids, 5, 2)[shuffled]
    )


def test_order_with_repeats_shows_each_as_often_as_asked_and_is_of_the_ids_alone() -> None:
    ids = random_ids(50)
    repeats = np.random.default_rng(4).integers(1, 5, 50)
    order = epoch_order(ids, 0, 1, repeats)
    assert np.array_equal(np.bincount(order, minlength=50), repeats)
    shuffled = np.random.default_rng(5).permutation(50)
    assert np.array_equal(ids[shuffled][epoch_order(ids[shuffled], 0, 1, repeats[shuffled])], ids[order])


def test_repeats_of_one_example_lie_in_different_places() -> None:
    order = epoch_order(random_ids(200), 0, 0, np.full(200, 3))
    assert sum(first == second for first, second in pairwise(order.tolist())) < 30
    places = np.array([np.flatnonzero(order == position) for position in range(200)])
    assert np.median(places[:, 2] - places[:, 0]) > 150


def test_order_with_nothing_repeated_is_the_order_without_repeats() -> None:
    ids = random_ids(40)
    assert np.array_equal(epoch_order(ids, 3, 2, np.ones(40, np.int64)), epoch_order(ids, 3, 2))


def test_first_showings_keep_their_order_whatever_is_repeated() -> None:
    ids = random_ids(40)
    repeats = np.ones(40, np.int64)
    repeats[7] = 4
    order = [position for position in epoch_order(ids, 3, 2, repeats).tolist() if position != 7]
    assert order == [position for position in epoch_order(ids, 3, 2).tolist() if position != 7]


@pytest.mark.parametrize("threshold", [None, 0.2, 1.0])
def test_schedule_counts_steps_and_samples_as_its_batches_do(threshold: float | None) -> None:
    chance = np.random.default_rng(6)
    labels = [sorted(chance.choice(9, chance.integers(1, 3), replace=False).tolist()) for _ in range(53)]
    schedule = schedule_of(random_ids(53), labels, threshold)
    batches = list(schedule.batches(0))
    assert len(batches) == schedule.total_steps
    sizes = np.cumsum([0, *map(len, batches)])
    assert [schedule.samples_before(step) for step in range(len(batches) + 1)] == sizes.tolist()
    assert sizes[-1] == schedule.samples_E.sum()
    ends = [step for step in range(len(batches) + 1) if schedule.ends_epoch(step)]
    assert len(ends) == 3
    assert np.diff([0, *sizes[ends]]).tolist() == schedule.samples_E.tolist()
    places = [schedule.place(step) for step in range(len(batches))]
    assert places == [(epoch, index) for epoch, (low, high) in enumerate(pairwise([0, *ends])) for index in range(high - low)]
    if threshold is None:
        assert schedule.samples_E.tolist() == [53, 53, 53]
    else:
        assert len(set(schedule.samples_E.tolist())) > 1, "lots decide each epoch anew"
        assert schedule.samples_E.min() > 53


def test_schedule_of_nothing_has_no_steps() -> None:
    schedule = schedule_of(random_ids(0), [], 0.5)
    assert (schedule.total_steps, schedule.samples_before(0), list(schedule.batches(0))) == (0, 0, [])
    assert not schedule.ends_epoch(0)
