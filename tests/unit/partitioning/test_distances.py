"""Tables of distances: order statistics against NumPy, and the same table however the examples are cut up."""

import numpy as np
import pytest

from hardmoe.partitioning.distances import DistanceTable


def drawn(rows=6000, parts=5, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, parts - 1, rows).astype(np.int32), generator.gamma(4.0, 0.2, rows).astype(np.float32)


def same(one, other):
    left, right = one.to_arrays(), other.to_arrays()
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


def test_means_and_sizes_are_those_of_the_distances():
    part, distance = drawn()
    table = DistanceTable.of(part, distance, 5)
    assert table.sizes_K.tolist() == np.bincount(part, minlength=5).tolist()
    assert table.num_examples == 6000
    means = table.means()
    assert means[4] is None
    np.testing.assert_allclose(means[:4], [distance[part == k].mean(dtype=np.float64) for k in range(4)], rtol=1e-5)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99, 1.0])
def test_as_many_examples_lie_beyond_a_limit_as_numpy_counts_to_a_tenth_of_a_per_cent_of_the_distance(share):
    part, distance = drawn()
    new_part, new_distance = drawn(seed=1)
    limits = DistanceTable.of(part, distance, 5).limits(share)
    assert limits[4] == -1
    found = DistanceTable.of(new_part, new_distance, 5).beyond(limits)
    for k in range(4):
        quantile = np.quantile(distance[part == k], share, method="inverted_cdf")
        mine = new_distance[new_part == k]
        assert (mine > quantile * 1.002).sum() <= found[k] <= (mine > quantile).sum()


def test_no_more_than_a_hundredth_of_the_training_examples_is_beyond_their_own_limit():
    part, distance = drawn()
    table = DistanceTable.of(part, distance, 5)
    beyond = table.beyond(table.limits(0.99))
    assert (beyond <= 0.01 * table.sizes_K).all()
    assert beyond.sum() > 0.005 * 6000


def test_examples_of_a_part_without_a_limit_are_not_counted():
    table = DistanceTable.of(np.array([0, 1, 1], np.int32), np.array([1.0, 2.0, 3.0], np.float32), 2)
    limits = DistanceTable.of(np.array([0], np.int32), np.array([0.5], np.float32), 2).limits(0.99)
    assert table.beyond(limits).tolist() == [1, 0]


def test_any_cut_and_order_joins_to_the_same_table_and_survives_a_file():
    part, distance = drawn()
    whole = DistanceTable.of(part, distance, 5)
    order = np.random.default_rng(3).permutation(6000)
    pieces = [DistanceTable.of(part[rows], distance[rows], 5) for rows in np.array_split(order, 7)]
    pieces = [DistanceTable.from_arrays(piece.to_arrays()) for piece in pieces]
    assert same(DistanceTable.joined([DistanceTable.empty(5), *pieces]), whole)
    assert same(DistanceTable.joined([DistanceTable.joined(pieces[3:]), *pieces[:3]]), whole)


def test_sums_of_enormous_distances_do_not_overflow():
    part, distance = np.zeros(200_000, np.int32), np.full(200_000, 2.0**25, np.float32)
    table = DistanceTable.of(part, distance, 1)
    many = DistanceTable.joined([table] * 50)
    assert DistanceTable.from_arrays(many.to_arrays()).means() == [2.0**25]


def test_zero_of_either_sign_is_the_smallest_distance():
    table = DistanceTable.of(np.zeros(2, np.int32), np.array([-0.0, 0.0], np.float32), 1)
    assert table.counts_C.tolist() == [2]
    assert table.beyond(table.limits(0.5)).tolist() == [0]
