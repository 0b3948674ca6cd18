"""How the stages after the dataset read examples and labels: by split, by part, joined on the id.

Shape letters: N examples, L labels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardmoe.data.schemas import EXAMPLES, LABELS, TAGS
from hardmoe.errors import CorruptFileError
from hardmoe.stage import InputArtifact
from hardmoe.tables import ids_to_array, iterate_table, lists_to_csr, read_table


@dataclass(frozen=True)
class Labels:
    """Tag indices of examples in compressed sparse rows, in the order of the ids that were asked for."""

    indices_L: NDArray[np.int32]
    offsets: NDArray[np.int64]


def example_shards(examples: InputArtifact, split: str, expert: int | None) -> list[str]:
    """Storage paths of a split's shards in the dataset (expert None) or of one part of it in a partition."""
    part = "" if expert is None else f"expert={expert:04d}/"
    return examples.files(f"split={split}/{part}")


def read_examples(
    examples: InputArtifact, paths: Sequence[str], columns: Sequence[str] | None = None, rows: int = 1024
) -> Iterator[Any]:
    """Tables of at most `rows` rows with some or all of example_id, image and raw tags, shard after shard."""
    for path in paths:
        yield from iterate_table(examples.storage, path, EXAMPLES, columns or EXAMPLES.names, rows=rows)


def num_tags(vocabulary: InputArtifact) -> int:
    """Size of the vocabulary."""
    count: int = vocabulary.payload["num_tags"]
    return count


def tag_names(vocabulary: InputArtifact) -> list[str]:
    """The canonical tags, by index."""
    names: list[str] = read_table(vocabulary.storage, vocabulary.path("tags.parquet"), TAGS).column("tag").to_pylist()
    return names


def labels_of(vocabulary: InputArtifact, ids_N16: NDArray[np.uint8]) -> Labels:
    """The labels of these examples, found by id in the vocabulary's tables.

    Args:
        vocabulary: the vocabulary artifact.
        ids_N16: the ids, uint8 [N, 16], each once.

    Raises:
        CorruptFileError: an example has no row there.
    """
    keys_N = sortable(ids_N16)
    order_N = np.argsort(keys_N)
    sorted_N = keys_N[order_N]
    found: list[NDArray[np.int64]] = []
    values: list[NDArray[np.int32]] = []
    lengths: list[NDArray[np.int64]] = []
    for path in vocabulary.files("labels/"):
        table = read_table(vocabulary.storage, path, LABELS)
        at = np.searchsorted(sorted_N, keys := sortable(ids_to_array(table.column("example_id"))))
        here = np.flatnonzero(sorted_N[np.minimum(at, len(sorted_N) - 1)] == keys) if len(sorted_N) else np.zeros(0, np.int64)
        if not len(here):
            continue
        indices, offsets = lists_to_csr(table.column("tags").take(here))
        found.append(order_N[at[here]])
        values.append(indices)
        lengths.append(np.diff(offsets))
    count = sum(map(len, found))
    if count != len(ids_N16):
        raise CorruptFileError(
            f"{vocabulary.storage.where(vocabulary.path('labels'))} has labels of {count} of {len(ids_N16)} examples; "
            "delete the vocabulary and what stands on it, and run again"
        )
    return _in_order(found, values, lengths, len(ids_N16))


def _in_order(
    found: list[NDArray[np.int64]], values: list[NDArray[np.int32]], lengths: list[NDArray[np.int64]], count: int
) -> Labels:
    """Bring rows that were found in the tables' order into the order asked for."""
    if not count:
        return Labels(np.zeros(0, np.int32), np.zeros(1, np.int64))
    positions, flat, sizes = np.concatenate(found), np.concatenate(values), np.concatenate(lengths)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)[:-1]])
    order = np.argsort(positions)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[order], dtype=np.int64)])
    source = np.repeat(starts[order] - offsets[:-1], sizes[order]) + np.arange(offsets[-1])
    return Labels(flat[source], offsets)


def sortable(ids_N16: NDArray[np.uint8]) -> NDArray[np.void]:
    """Ids as one opaque 16-byte value each, which NumPy sorts, searches and compares byte by byte."""
    return np.ascontiguousarray(ids_N16).view(np.dtype((np.void, 16))).reshape(-1)
