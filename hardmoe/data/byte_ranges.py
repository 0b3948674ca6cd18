"""Many byte ranges of one file, read in few requests.

Ranges that lie close together are read at once: on a disk that saves seeks, on an object store requests, which cost some
20 ms each whatever they bring. Rejected: one read per range.

Shape letters: N ranges.
"""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from hardmoe.errors import CorruptFileError
from hardmoe.storage import Storage

_GAP_BYTES = 64 * 2**10
_MOST_BYTES = 8 * 2**20


def read_ranges(storage: Storage, path: str, offsets_N: NDArray[np.int64], lengths_N: NDArray[np.int64]) -> list[bytes]:
    """The bytes of every range, in the order given.

    Args:
        storage: where the file is.
        path: the file.
        offsets_N: int64 [N], the first byte of each.
        lengths_N: int64 [N], how many bytes each has.

    Raises:
        CorruptFileError: the file ends before a range does.
    """
    found: list[bytes] = [b""] * len(offsets_N)
    order_N = np.argsort(offsets_N, kind="stable")
    with closing(storage.open_input(path)) as source:
        for rows in _runs(offsets_N[order_N], lengths_N[order_N]):
            chosen = order_N[rows]
            start = int(offsets_N[chosen[0]])
            end = int((offsets_N[chosen] + lengths_N[chosen]).max())
            source.seek(start)
            data = source.read(end - start)
            if len(data) < end - start:
                raise CorruptFileError(f"{storage.where(path)} ends at byte {start + len(data)}, before byte {end}")
            for row in chosen.tolist():
                first = int(offsets_N[row]) - start
                found[row] = data[first : first + int(lengths_N[row])]
    return found


def _runs(offsets_N: NDArray[np.int64], lengths_N: NDArray[np.int64]) -> Iterator[slice]:
    """Consecutive ranges to be read at once, from ranges in ascending order."""
    first, end = 0, 0
    for row, (offset, length) in enumerate(zip(offsets_N.tolist(), lengths_N.tolist(), strict=True)):
        if row > first and (offset > end + _GAP_BYTES or offset + length - offsets_N[first] > _MOST_BYTES):
            yield slice(first, row)
            first = row
        end = max(end, offset + length) if row > first else offset + length
    if len(offsets_N):
        yield slice(first, len(offsets_N))
