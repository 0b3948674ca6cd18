"""Example ids: sixteen bytes, made from the user's own name of an example or from its content, and arrays of them.

Shape letters: N ids.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

ID_RANGE = 1 << 64
"""How many numbers the leading 64 bits of an id can be."""


def key_id(key: str) -> bytes:
    """The id of an example that the user names: the head of a SHA-256 of the name."""
    return hashlib.sha256(f"key:{key}".encode()).digest()[:16]


def content_id(data: bytes) -> bytes:
    """The id that names an example by its content: the head of the SHA-256 of the encoded image."""
    return hashlib.sha256(data).digest()[:16]


def sortable(ids_N16: NDArray[np.uint8]) -> NDArray[np.void]:
    """Ids as one opaque 16-byte value each, which NumPy sorts, searches and compares byte by byte."""
    return np.ascontiguousarray(ids_N16).view(np.dtype((np.void, 16))).reshape(-1)


def id_words(ids_N16: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The high and low half of every id as numbers, uint64 [N] each, so that (high, low) sorts like the bytes."""
    words_N2 = np.ascontiguousarray(ids_N16).view(">u8").astype(np.uint64)
    return words_N2[:, 0], words_N2[:, 1]


def id_order(ids_N16: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The positions of ids in ascending order, int64 [N]; equal ones stay in the order they are in."""
    high_N, low_N = id_words(ids_N16)
    return np.lexsort((low_N, high_N))


def order_of_distinct(ids_N16: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The same of ids that are those of one set.

    Raises:
        ValueError: an id is there twice.
    """
    order_N = id_order(ids_N16)
    keys_N = sortable(ids_N16)[order_N]
    if np.any(keys_N[1:] == keys_N[:-1]):
        raise ValueError("an example id occurs twice in one set")
    return order_N


def range_bounds(index: int, count: int) -> tuple[int, int]:
    """One of `count` equal ranges of ids, by their leading 64 bits, the end excluded."""
    return index * ID_RANGE // count, (index + 1) * ID_RANGE // count


def is_within(ids_N16: NDArray[np.uint8], low: int, high: int) -> NDArray[np.bool_]:
    """Which ids are in a range as `range_bounds` gives it, bool [N]."""
    high_N, _ = id_words(ids_N16)
    return (high_N >= np.uint64(low)) & (high_N <= np.uint64(high - 1))


def is_among(ids_N16: NDArray[np.uint8], known_M16: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which ids are among others, which must be in ascending order; bool [N]."""
    if not len(known_M16):
        return np.zeros(len(ids_N16), bool)
    known_M, keys_N = sortable(known_M16), sortable(ids_N16)
    at_N = np.minimum(np.searchsorted(known_M, keys_N), len(known_M) - 1)
    return np.asarray(known_M[at_N] == keys_N)
