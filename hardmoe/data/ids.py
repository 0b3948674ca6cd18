"""Example ids: sixteen bytes, made from the user's own name of an example or from its content, and arrays of them.

Shape letters: N ids.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray


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


def is_among(ids_N16: NDArray[np.uint8], known_M16: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which ids are among others, which must be in ascending order; bool [N]."""
    if not len(known_M16):
        return np.zeros(len(ids_N16), bool)
    known_M, keys_N = sortable(known_M16), sortable(ids_N16)
    at_N = np.minimum(np.searchsorted(known_M, keys_N), len(known_M) - 1)
    return np.asarray(known_M[at_N] == keys_N)
