"""The search for near hashes against brute force, and what bounds it when hashes are too common."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from hardmoe.neighbours.hamming import HammingSearch, HashBlock, pairs_of_unit, plan


def _clustered(count: int, flips: int, seed: int = 0) -> NDArray[np.uint64]:
    """Hashes around a tenth as many centres, up to `flips` bits away; many are equal."""
    rng = np.random.default_rng(seed)
    hashes_N = rng.integers(0, 2**64, max(1, count // 10), dtype=np.uint64)[rng.integers(0, max(1, count // 10), count)]
    for _ in range(flips):
        hashes_N ^= (np.uint64(1) << rng.integers(0, 64, count, dtype=np.uint64)) * (rng.random(count) < 0.6).astype(np.uint64)
    return hashes_N


def _brute_force(hashes_N: NDArray[np.uint64], radius: int) -> list[tuple[int, int]]:
    near_NN = np.bitwise_count(hashes_N[:, None] ^ hashes_N[None, :]) <= radius
    return [(int(i), int(j)) for i, j in np.argwhere(np.triu(near_NN, 1))]


def _search(
    search: HammingSearch,
    hashes_N: NDArray[np.uint64],
    preferred_N: NDArray[np.bool_] | None = None,
    cuts: Sequence[int] = (),
    skip: int | None = None,
) -> tuple[list[tuple[int, int]], int, int]:
    """All pairs of all units, sorted, and the counts of what was left out and not searched."""
    preferred_N = np.zeros(len(hashes_N), bool) if preferred_N is None else preferred_N
    blocks = [HashBlock(*block) for block in zip(np.split(hashes_N, cuts), np.split(preferred_N, cuts), strict=True)]
    found, left_out, unsearched = [], 0, 0
    for unit in range(search.num_units):
        for part in pairs_of_unit(search, unit, blocks, skip):
            found += list(zip(part.first_P.tolist(), part.second_P.tolist(), strict=True))
            left_out += part.num_left_out
            unsearched += part.num_unsearched
    return sorted(found), left_out, unsearched


@pytest.mark.parametrize(
    ("radius", "num_bands"), [(0, 1), (0, 3), (1, 2), (2, 5), (4, 5), (4, 6), (4, 7), (6, 8), (9, 10), (16, 17)]
)
def test_search_of_clustered_hashes_finds_every_pair_of_brute_force_once(radius: int, num_bands: int) -> None:
    hashes_N = _clustered(1200, radius + 2)
    expected = _brute_force(hashes_N, radius)
    assert len(expected) > 20
    assert _search(HammingSearch(radius, num_bands, 1), hashes_N) == (expected, 0, 0)


def test_search_by_plan_of_random_hashes_with_planted_neighbours_finds_them() -> None:
    rng = np.random.default_rng(1)
    hashes_N = rng.integers(0, 2**64, 20_000, dtype=np.uint64)
    for row in range(0, 400, 2):
        bits = rng.choice(64, int(rng.integers(1, 5)), replace=False).tolist()
        hashes_N[row + 1] = hashes_N[row] ^ np.uint64(sum(1 << bit for bit in bits))
    found, left_out, unsearched = _search(plan(len(hashes_N), 4), hashes_N)
    assert found == [(row, row + 1) for row in range(0, 400, 2)]
    assert left_out == unsearched == 0


def test_search_does_not_depend_on_parts_or_blocks() -> None:
    hashes_N = _clustered(1000, 5)
    expected = _brute_force(hashes_N, 4)
    assert _search(HammingSearch(4, 6, 7), hashes_N, cuts=(0, 1, 500, 999)) == (expected, 0, 0)
    assert _search(HammingSearch(4, 7, 1), hashes_N, cuts=(333,)) == (expected, 0, 0)


def test_search_parts_share_the_rows_about_evenly_although_hashes_start_alike() -> None:
    """A range of the keys instead of a hash of them would put all of these into one part."""
    hashes_N = np.arange(4000, dtype=np.uint64) << np.uint64(20)
    search = HammingSearch(0, 1, 4)
    doubled = [HashBlock(np.concatenate([hashes_N, hashes_N]), np.zeros(8000, bool))]
    sizes = [sum(len(part.first_P) for part in pairs_of_unit(search, unit, doubled)) for unit in range(4)]
    assert sum(sizes) == 4000 and min(sizes) > 800


def test_search_leaves_rows_without_a_hash_alone() -> None:
    hashes_N = np.array([0, 0, 1, 5, 0, 5], np.uint64)
    assert _search(plan(6, 4), hashes_N, skip=0)[0] == [(2, 3), (2, 5), (3, 5)]


@pytest.mark.parametrize("count", [0, 1])
def test_search_of_too_few_hashes_finds_nothing(count: int) -> None:
    assert _search(plan(count, 4), np.ones(count, np.uint64)) == ([], 0, 0)


def test_search_with_one_very_common_hash_pairs_every_row_with_preferred_ones_and_counts_the_rest() -> None:
    count = 3000
    preferred_N = np.zeros(count, bool)
    preferred_N[[1500, 2999]] = True
    found, left_out, unsearched = _search(plan(count, 4), np.full(count, 7, np.uint64), preferred_N)
    assert len(set(found)) == len(found) == count * (count - 1) // 2 - left_out
    assert len(found) < 70 * count and unsearched == 0
    for leader in (1500, 2999):
        assert sum(leader in pair for pair in found) == count - 1


def test_search_with_two_very_common_near_hashes_pairs_every_row_with_leaders_of_the_other() -> None:
    hashes_N = np.repeat(np.array([8, 9], np.uint64), 1000)
    found, left_out, _ = _search(plan(len(hashes_N), 4), hashes_N)
    between = [(i, j) for i, j in found if i < 1000 <= j]
    assert {i for i, _ in between} == set(range(1000)) and {j for _, j in between} == set(range(1000, 2000))
    assert len(set(found)) == len(found) == 2000 * 1999 // 2 - left_out
    assert len(found) < 140 * len(hashes_N)


def test_search_of_an_overfull_bucket_is_linear_and_counts_what_it_did_not_compare() -> None:
    """6,000 hashes that share 48 bits: all pairs would be 18 million in every table that looks at those."""
    hashes_N = np.random.default_rng(0).permutation(2**16)[:6000].astype(np.uint64)
    search = HammingSearch(1, 4, 1)  # of the four tables, one has a key of the common 48 bits
    found, left_out, unsearched = _search(search, hashes_N)
    assert set(found) <= set(_brute_force(hashes_N, 1)) and len(set(found)) == len(found)
    assert left_out == 0
    assert unsearched > 6000 * 5999 // 2 - 6000 * 300


def test_plan_for_more_hashes_has_longer_keys_and_bounded_units() -> None:
    plans = [plan(count, 4) for count in (10**4, 10**6, 10**8)]
    assert [p.num_bands for p in plans] == sorted({p.num_bands for p in plans})
    assert [p.num_parts for p in plans] == [1, 1, 24]
    assert all(p.num_tables <= 70 for p in plans)


def test_plan_for_equal_hashes_needs_one_table() -> None:
    assert plan(10**6, 0).num_tables == 1


@pytest.mark.parametrize("radius", [-1, 33])
def test_plan_refuses_a_senseless_radius(radius: int) -> None:
    with pytest.raises(ValueError, match="radius"):
        plan(10, radius)
