"""Seeded hashes of names and example ids: the only source of chance in hardmoe.

A split, a sample, a shuffle or a bootstrap weight is a function of hash(seed, purpose, example_id), so it is the same
however the data are sharded and whoever computes it. Rejected: `numpy.random.Generator` streams per shard, which give
every example another number as soon as the sharding changes.

Shape letters: N examples.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for one purpose, such as `derive_seed(0, "expert", 7)`; independent of any other purpose's."""
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _mix(values_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection of 64-bit words that avalanches."""
    values_N = (values_N ^ (values_N >> np.uint64(30))) * _MIX_1
    values_N = (values_N ^ (values_N >> np.uint64(27))) * _MIX_2
    return values_N ^ (values_N >> np.uint64(31))


def number_ids(count: int) -> NDArray[np.uint8]:
    """Ids of things that have only a number, such as tags: it in 16 bytes, little end first; uint8 [N, 16]."""
    ids_N16 = np.zeros((count, 16), np.uint8)
    ids_N16.view("<u8")[:, 0] = np.arange(count)
    return ids_N16


def hash_ids(ids_N16: NDArray[np.uint8], seed: int, *names: str | int) -> NDArray[np.uint64]:
    """Hash example ids for one purpose.

    Args:
        ids_N16: the 16 bytes of every id, uint8 [N, 16].
        seed: the recipe's seed.
        names: the purpose, e.g. `"shuffle", epoch`.

    Returns:
        uint64 [N], uniform over all 64-bit words, the same for an id wherever it stands.
    """
    if ids_N16.ndim != 2 or ids_N16.shape[1] != 16 or ids_N16.dtype != np.uint8:
        raise ValueError(f"ids must be uint8 [N, 16], not {ids_N16.dtype} {list(ids_N16.shape)}")
    words_N2 = np.ascontiguousarray(ids_N16).view("<u8")
    with np.errstate(over="ignore"):
        key = np.uint64(derive_seed(seed, *names)) * _GOLDEN
        return _mix(_mix(words_N2[:, 0] ^ key) + words_N2[:, 1] + _GOLDEN)


def hash_fractions(ids_N16: NDArray[np.uint8], seed: int, *names: str | int) -> NDArray[np.float64]:
    """The same hash as a number in [0, 1), float64 [N]."""
    return (hash_ids(ids_N16, seed, *names) >> np.uint64(11)).astype(np.float64) * 2.0**-53
