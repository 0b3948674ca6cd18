"""Agreement of labellings against scikit-learn; the level of chance against what it should be where nothing is known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score, mutual_info_score

from hardmoe.data.agreement import Contingency, entropy, tag_information
from hardmoe.data.reading import Labels

labellings = st.integers(1, 60).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(0, most), min_size=n, max_size=n) for most in (4, 9)))
)


def random_ids(rows, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, 16), dtype=np.uint8)


def random_labels(rows, num_tags, generator, each=3):
    counts = generator.integers(0, 2 * each, rows)
    return Labels(generator.integers(0, num_tags, counts.sum()).astype(np.int32), np.concatenate([[0], np.cumsum(counts)]))


@given(labellings)
def test_rand_index_and_mutual_information_equal_scikit_learn_s(pair):
    first, second = map(np.array, pair)
    table = Contingency.of(first, second)
    assert table.adjusted_rand_index() == pytest.approx(adjusted_rand_score(first, second), abs=1e-12)
    assert table.mutual_information() == pytest.approx(mutual_info_score(first, second) / math.log(2), abs=1e-12)
    swapped = Contingency.of(second, first)
    assert (swapped.adjusted_rand_index(), swapped.mutual_information()) == (
        table.adjusted_rand_index(),
        table.mutual_information(),
    )


def test_large_labellings_agree_with_scikit_learn_and_do_not_depend_on_the_order_of_the_rows():
    generator = np.random.default_rng(1)
    first = generator.integers(0, 64, 300_000)
    second = np.where(generator.random(300_000) < 0.6, first * 7 % 64, generator.integers(0, 64, 300_000))
    table = Contingency.of(first, second)
    assert table.adjusted_rand_index() == pytest.approx(adjusted_rand_score(first, second), rel=1e-12)
    assert table.mutual_information() == pytest.approx(mutual_info_score(first, second) / math.log(2), rel=1e-12)
    order = generator.permutation(300_000)
    again = Contingency.of(first[order], second[order])
    assert again.mutual_information() == table.mutual_information()
    assert again.adjusted_rand_index() == table.adjusted_rand_index()


def test_renamed_parts_are_the_same_partition():
    first = np.array([0, 0, 1, 1, 2, 2, 2])
    table = Contingency.of(first, np.array([5, 5, 0, 0, 3, 3, 3]))
    assert table.adjusted_rand_index() == 1.0
    assert table.mutual_information() == pytest.approx(entropy(np.bincount(first)))


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [0], []])
def test_trivial_partitions_agree_with_themselves(labels):
    found = np.array(labels, np.int64)
    assert Contingency.of(found, found).adjusted_rand_index() == 1.0


def test_labellings_of_different_things_are_refused():
    with pytest.raises(ValueError, match=r"labellings of \[2\] and \[3\] things"):
        Contingency.of(np.zeros(2, int), np.zeros(3, int))


def test_entropy_of_equal_and_of_certain_labels():
    assert entropy(np.array([7, 7, 7, 7])) == pytest.approx(2.0)
    assert entropy(np.array([9, 0])) == 0.0
    assert entropy(np.array([], np.int64)) == 0.0


def test_parts_that_know_nothing_of_the_hashtags_say_nothing_once_chance_is_taken_off():
    """And the level of chance is Miller's (V - 1)(K - 1) / (2 L ln 2), which it must be where each example has its own lot."""
    generator = np.random.default_rng(2)
    labels = random_labels(30_000, 100, generator)
    part = generator.integers(0, 32, 30_000).astype(np.int32)
    found = tag_information(labels, part, random_ids(30_000), seed=0)
    assert found.chance_bits == pytest.approx(99 * 31 / (2 * len(labels.indices_L) * math.log(2)), rel=0.05)
    assert abs(found.net_bits) < 0.05 * found.bits
    assert found.entropy_bits == pytest.approx(math.log2(100), abs=0.01)


def test_parts_that_decide_the_hashtag_say_all_of_it():
    part = np.arange(4000, dtype=np.int32) % 4
    labels = Labels(part.copy(), np.arange(4001))
    found = tag_information(labels, part, random_ids(4000), seed=0)
    assert (found.bits, found.entropy_bits) == (pytest.approx(2.0), pytest.approx(2.0))
    assert found.share == pytest.approx(1.0, abs=0.01)


def test_chance_deals_out_parts_to_examples_and_not_to_single_hashtags():
    """Forty hashtags that always come together are one observation, whose parts are drawn once; the oracle shuffles so too."""
    rows, each, generator = 600, 40, np.random.default_rng(3)
    topic = generator.integers(0, 2, rows)
    indices = (topic[:, None] * each + np.arange(each)).reshape(-1).astype(np.int32)
    part = generator.integers(0, 64, rows).astype(np.int32)
    found = tag_information(Labels(indices, np.arange(rows + 1) * each), part, random_ids(rows), seed=0)
    whole = [mutual_info_score(indices, np.repeat(generator.permutation(part), each)) / math.log(2) for _ in range(200)]
    single = [mutual_info_score(indices, generator.permutation(np.repeat(part, each))) / math.log(2) for _ in range(20)]
    assert found.chance_bits == pytest.approx(np.mean(whole), abs=4 * np.std(whole) / 2)
    assert abs(np.mean(single) - np.mean(whole)) > 4 * np.std(whole)


def test_information_does_not_depend_on_the_order_of_the_examples():
    generator = np.random.default_rng(4)
    labels, part, ids = random_labels(500, 20, generator), generator.integers(0, 5, 500).astype(np.int32), random_ids(500)
    found = tag_information(labels, part, ids, seed=7)
    order = generator.permutation(500)
    counts = np.diff(labels.offsets)
    lists = [labels.indices_L[labels.offsets[row] : labels.offsets[row + 1]] for row in order]
    moved = Labels(np.concatenate(lists), np.concatenate([[0], np.cumsum(counts[order])]))
    assert tag_information(moved, part[order], ids[order], seed=7) == found
    assert tag_information(labels, part, ids, seed=8).chance_bits != found.chance_bits


def test_examples_without_any_hashtag_say_nothing():
    found = tag_information(Labels(np.zeros(0, np.int32), np.zeros(4, np.int64)), np.array([0, 1, 1], np.int32), random_ids(3), 0)
    assert (found.bits, found.chance_bits, found.entropy_bits, found.share) == (0.0, 0.0, 0.0, None)
