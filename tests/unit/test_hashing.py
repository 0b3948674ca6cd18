"""Seeded hashes: the same wherever an id stands, independent between purposes, uniform, and the same for ever."""

import hashlib

import numpy as np
import pytest
from scipy import stats

from hardmoe.hashing import derive_seed, hash_fractions, hash_ids

_MASK = 2**64 - 1


def ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16), dtype=np.uint8)


def reference(example_id: bytes, seed: int, *names: str | int) -> int:
    """The same hash in plain integers, from the published finaliser of SplitMix64."""

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    text = "\x1f".join(map(str, (seed, *names))).encode()
    golden = 0x9E3779B97F4A7C15
    key = (int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1) * golden & _MASK
    low, high = (int.from_bytes(part, "little") for part in (example_id[:8], example_id[8:]))
    return mix((mix(low ^ key) + high + golden) & _MASK)


def test_hash_equals_a_scalar_reference() -> None:
    some = ids(50)
    hashes = hash_ids(some, 7, "shuffle", 3)
    assert [int(value) for value in hashes] == [reference(row.tobytes(), 7, "shuffle", 3) for row in some]


def test_hash_of_an_id_does_not_depend_on_its_neighbours_or_its_memory() -> None:
    some = ids(1000)
    hashes = hash_ids(some, 1, "split")
    order = np.random.default_rng(1).permutation(1000)
    np.testing.assert_array_equal(hash_ids(some[order], 1, "split"), hashes[order])
    np.testing.assert_array_equal(np.concatenate([hash_ids(part, 1, "split") for part in np.array_split(some, 7)]), hashes)
    np.testing.assert_array_equal(hash_ids(np.asfortranarray(some)[::3], 1, "split"), hashes[::3])
    assert hash_ids(some[:0], 1, "split").shape == (0,)


@pytest.mark.parametrize("other", [(2, "split"), (1, "splits"), (1, "split", 0), (1,)])
def test_other_seeds_and_purposes_are_uncorrelated(other: tuple[int, ...]) -> None:
    some = ids(20_000)
    a, b = hash_fractions(some, 1, "split"), hash_fractions(some, *other)
    assert abs(stats.spearmanr(a, b).statistic) < 0.03


def test_ids_that_differ_in_one_bit_hash_as_if_unrelated() -> None:
    """Counters as ids are the worst case: every bit of the hash flips half of the time."""
    counters = np.zeros((4096, 16), np.uint8)
    counters[:, 8:10] = np.arange(4096, dtype="<u2").reshape(-1, 1).view(np.uint8)
    assert stats.kstest(hash_fractions(counters, 0, "x"), "uniform").pvalue > 1e-4
    bits = np.unpackbits(hash_ids(counters, 0, "x").view(np.uint8).reshape(-1, 8), axis=1).mean(axis=0)
    assert np.all(np.abs(bits - 0.5) < 0.05)


def test_fractions_are_uniform_below_one() -> None:
    fractions = hash_fractions(ids(50_000), 0, "bootstrap")
    assert fractions.dtype == np.float64
    assert fractions.min() >= 0.0
    assert fractions.max() < 1.0
    assert stats.kstest(fractions, "uniform").pvalue > 1e-4


def test_names_cannot_run_together() -> None:
    assert derive_seed(1, "ab", "c") != derive_seed(1, "a", "bc")
    assert derive_seed(1, 2) != derive_seed(12)
    assert derive_seed(0, "expert", 7) == derive_seed(0, "expert", "7")
    assert all(0 <= derive_seed(seed, "x") < 2**63 for seed in range(100))


def test_hashes_stay_what_they_were_when_data_were_split_by_them() -> None:
    """Another value here would move examples between train and test of every existing run."""
    assert derive_seed(0, "expert", 7) == 1750919972273223071
    assert int(hash_ids(np.arange(16, dtype=np.uint8).reshape(1, 16), 0, "split")[0]) == 5985035641310970864


@pytest.mark.parametrize("bad", [np.zeros((3, 8), np.uint8), np.zeros(16, np.uint8), np.zeros((3, 16), np.int64)])
def test_arrays_that_are_not_ids_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"ids must be uint8 \[N, 16\]"):
        hash_ids(bad, 0)
