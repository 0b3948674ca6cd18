"""Rows of different lengths one after another in one array, with the offsets at which they begin and end: taken without a loop.

Shape letters: N rows, M values.
"""

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

ScalarT = TypeVar("ScalarT", bound=np.generic)


def consecutive(starts_N: NDArray[np.integer[Any]], lengths_N: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """The numbers of many ranges, range after range, each from its start on, int64 [the sum of the lengths]."""
    ends_N = np.cumsum(lengths_N, dtype=np.int64)
    return np.repeat(starts_N - (ends_N - lengths_N), lengths_N) + np.arange(ends_N[-1] if len(ends_N) else 0)


def offsets_of(lengths_N: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Where rows of these lengths begin and end, int64 [N + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths_N, dtype=np.int64)])


def take_rows(
    values_M: NDArray[ScalarT], offsets: NDArray[np.int64], rows: NDArray[np.integer[Any]]
) -> tuple[NDArray[ScalarT], NDArray[np.int64]]:
    """The values of some rows, in the order given, and their offsets."""
    lengths = offsets[rows + 1] - offsets[rows]
    return values_M[consecutive(offsets[rows], lengths)], offsets_of(lengths)
