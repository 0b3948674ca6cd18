"""Histograms, quantiles and borders of the page against NumPy."""

from itertools import pairwise

import numpy as np
import pytest

from hardmoe.report.distances import NUM_BINS, bordering_share, count_distances, count_part_distances


def test_parts_are_counted_in_the_bins_of_all_and_add_up_to_them():
    generator = np.random.default_rng(0)
    distance, part = generator.gamma(4.0, 0.2, 5000).astype(np.float32), generator.integers(0, 3, 5000)
    overall = count_distances(distance)
    assert (overall["low"], overall["high"]) == (distance.min(), distance.max())
    parts = [count_part_distances(distance[part == k], overall) for k in range(3)]
    assert np.sum([each["counts"] for each in parts], axis=0).tolist() == overall["counts"]
    assert sum(overall["counts"]) == 5000 and len(overall["counts"]) == NUM_BINS
    edges = np.linspace(overall["low"], overall["high"], NUM_BINS + 1)
    inside = [((distance >= low) & (distance < high)).sum() for low, high in pairwise(edges)]
    np.testing.assert_allclose(overall["counts"], inside, atol=1)
    assert overall["quantiles"]["50"] == pytest.approx(np.median(distance), rel=1e-3)
    assert overall["quantiles"]["99"] == np.sort(distance)[4949]


def test_equal_distances_fill_one_bin_and_none_are_none():
    overall = count_distances(np.full(7, 0.5, np.float32))
    assert overall["counts"] == [7]
    assert count_part_distances(np.full(3, 0.5, np.float32), overall)["counts"] == [3]
    assert count_distances(np.zeros(0, np.float32)) is None
    assert count_part_distances(np.zeros(0, np.float32), overall) is None


def test_border_is_a_second_centroid_at_most_a_tenth_farther_away():
    distance = np.array([1.0, 1.0, 1.0, 0.0], np.float32)
    assert bordering_share(distance, np.array([1.09, 1.11, 3.0, 0.0], np.float32)) == 0.5
    assert bordering_share(distance, np.full(4, np.nan, np.float32)) is None
    # Balanced parts: the second may be the nearer one.
    assert bordering_share(distance, np.array([0.95, 0.85, 3.0, 0.0], np.float32)) == 0.5
