"""Cached embeddings that do not fit in memory: on local disk, in the order of an epoch's hashes, a bucket in memory at a time.

The examples are written to an unlinked scratch file, which vanishes with the process, in buckets of equal ranges of hash(seed,
epoch, id). An epoch reads bucket after bucket and sorts each in memory, which gives the order of the whole; the next one first
moves every example to its next bucket. So an epoch costs two sequential reads and one write, memory does not grow with the
number of examples, and batches are those that `EmbeddingSet` serves from memory, to the bit. Rejected: a memory map read in the
order of the hashes, a random access of a kilobyte per example: 10,000 to 20,000 examples/s from an SSD, far less from a network
disk; and a shuffle within a window, which is another order.

Shape letters: N examples, E features of an expert, L labels, V tags, n examples of one piece.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from hardmoe.data.ids import id_words, sortable
from hardmoe.data.ragged import offsets_of
from hardmoe.data.resampling import batch_slice, num_batches
from hardmoe.decoder.embeddings import EmbeddingSet
from hardmoe.errors import StorageError
from hardmoe.hashing import hash_ids

ScalarT = TypeVar("ScalarT", bound=np.generic)

_ID_AND_EXPERT_BYTES, _LABEL_BYTES = 24, 32
_BUCKETS_IN_MEMORY = 6
"""Copies of a bucket that are in memory at the most: read, sorted, what is left of the one before, and its pieces in writing."""


def example_bytes(num_features: int) -> int:
    """What an example takes in memory, about: its float16 embedding, its id, expert and place, and some labels."""
    return 2 * num_features + _ID_AND_EXPERT_BYTES + _LABEL_BYTES


@dataclass
class _Block:
    """Where some examples of one bucket are in the file."""

    offset: int
    num_examples: int
    num_labels: int


@dataclass
class _Buckets:
    """One scratch file with every example in its bucket."""

    file: IO[bytes]
    num_features: int
    blocks: list[list[_Block]] = field(default_factory=list)
    """By bucket."""

    def append(self, bucket: int, examples: EmbeddingSet) -> None:
        """Add some examples of one bucket."""
        offset = self.file.seek(0, 2)
        for array in _arrays(examples):
            self.file.write(np.ascontiguousarray(array).data)
        self.blocks[bucket].append(_Block(offset, len(examples), len(examples.label_indices_L)))

    def read(self, bucket: int) -> EmbeddingSet:
        """All examples of a bucket, in no particular order."""
        sets = [self._read_block(block) for block in self.blocks[bucket]]
        return EmbeddingSet.joined(sets) if sets else EmbeddingSet.empty(self.num_features)

    def _read_block(self, block: _Block) -> EmbeddingSet:
        self.file.seek(block.offset)
        count, width = block.num_examples, self.num_features
        ids_n16 = self._read_into(np.empty((count, 16), np.uint8))
        embeddings_nE = self._read_into(np.empty((count, width), np.float16))
        experts_n, lengths_n = self._read_into(np.empty(count, np.int32)), self._read_into(np.empty(count, np.int32))
        labels = self._read_into(np.empty(block.num_labels, np.int32))
        return EmbeddingSet(ids_n16, embeddings_nE, experts_n, labels, offsets_of(lengths_n))

    def _read_into(self, array: NDArray[ScalarT]) -> NDArray[ScalarT]:
        if self.file.readinto(array.data) != array.nbytes:  # type: ignore[attr-defined]
            raise StorageError("a scratch file of the decoder's embeddings became shorter while it was read; run again")
        return array


class SpilledEmbeddings:
    """Labelled examples on disk; see `embeddings.ExampleSource` for what they can be asked.

    Args:
        pieces: the examples, each piece of which fits in memory, checked and labelled by `EmbeddingSet.usable`.
        num_features: E.
        num_buckets: into how many equal ranges of hashes they are divided.
        folder: an existing one on a local disk.
        seed: of the first epoch that will be asked for, which then needs no sorting into other buckets.

    Raises:
        StorageError: the disk is full or not writable.
    """

    def __init__(self, pieces: Iterable[EmbeddingSet], num_features: int, num_buckets: int, folder: Path, seed: int) -> None:
        self.num_features = num_features
        self._num_buckets, self._folder = num_buckets, folder
        self._order = (seed, 0)
        self._counts_V = np.zeros(0, np.int64)
        self._content, self._len = 0, 0
        self._buckets = self._written(self._counted(pieces), self._order)

    def __len__(self) -> int:
        return self._len

    def close(self) -> None:
        """Give the disk's space back."""
        self._buckets.file.close()

    def tag_counts(self, num_tags: int) -> NDArray[np.int64]:
        """See `ExampleSource`."""
        return np.concatenate([self._counts_V, np.zeros(num_tags - len(self._counts_V), np.int64)])

    def content(self) -> int:
        """See `ExampleSource`."""
        return self._content

    def usable(self, num_tags: int, num_experts: int | None) -> "SpilledEmbeddings":
        """The examples themselves: they were checked before they were written."""
        return self

    def batches(self, seed: int, epoch: int, batch_size: int, first: int = 0) -> Iterator[EmbeddingSet]:
        """See `ExampleSource`.

        Raises:
            StorageError: the disk is full.
            ValueError: an id occurs twice.
        """
        if self._order != (seed, epoch):
            with closing(self._buckets.file):
                self._buckets = self._written(map(self._buckets.read, range(self._num_buckets)), (seed, epoch))
            self._order = (seed, epoch)
        return self._batches(batch_size, first)

    def _batches(self, batch_size: int, first: int) -> Iterator[EmbeddingSet]:
        begin, index = 0, first  # `begin`: the place, in the order of the epoch, of the first example in memory
        held = EmbeddingSet.empty(self.num_features)
        for bucket in range(self._num_buckets):
            wanted = batch_slice(self._len, batch_size, index).start if index < num_batches(self._len, batch_size) else self._len
            count = sum(block.num_examples for block in self._buckets.blocks[bucket])
            if begin + len(held) + count <= wanted:
                begin, held = begin + len(held) + count, EmbeddingSet.empty(self.num_features)
                continue
            held = EmbeddingSet.joined([held, self._sorted(bucket)])
            used = 0
            while index < num_batches(self._len, batch_size):
                rows = batch_slice(self._len, batch_size, index)
                if rows.stop > begin + len(held):
                    break
                yield held.take(np.arange(rows.start - begin, rows.stop - begin))
                used, index = rows.stop - begin, index + 1
            begin, held = begin + used, held.take(np.arange(used, len(held)))

    def _sorted(self, bucket: int) -> EmbeddingSet:
        examples = self._buckets.read(bucket)
        high_n, low_n = id_words(examples.ids_N16)
        order_n = np.lexsort((low_n, high_n, _hashes(examples, self._order)))
        keys_n = sortable(examples.ids_N16)[order_n]
        if np.any(keys_n[1:] == keys_n[:-1]):
            raise ValueError("an example id occurs twice in one set")
        return examples.take(order_n)

    def _counted(self, pieces: Iterable[EmbeddingSet]) -> Iterator[EmbeddingSet]:
        """The pieces, while what is known of all of them together is being added up."""
        for piece in pieces:
            self._len += len(piece)
            self._content = (self._content + piece.content()) % (1 << 64)
            counts_V = piece.tag_counts(len(self._counts_V))
            counts_V[: len(self._counts_V)] += self._counts_V
            self._counts_V = counts_V
            yield piece

    def _written(self, pieces: Iterable[EmbeddingSet], order: tuple[int, int]) -> _Buckets:
        with ExitStack() as stack:
            try:
                file = stack.enter_context(cast(IO[bytes], TemporaryFile(dir=self._folder)))  # noqa: SIM115
                self._write(pieces, buckets := _Buckets(file, self.num_features, [[] for _ in range(self._num_buckets)]), order)
            except OSError as error:
                raise StorageError(
                    f"cannot write the embeddings to the scratch folder {self._folder}: {error.strerror or error}; free space "
                    "there, set TMPDIR to a larger disk, or raise decoder.memory_gib"
                ) from error
            stack.pop_all()
        return buckets

    def _write(self, pieces: Iterable[EmbeddingSet], buckets: _Buckets, order: tuple[int, int]) -> None:
        for piece in pieces:
            # The upper half of the hash is enough for a range, and its product with their number stays below 2^64.
            bucket_n = (_hashes(piece, order) >> np.uint64(32)) * np.uint64(self._num_buckets) >> np.uint64(32)
            order_n = np.argsort(bucket_n, kind="stable")
            ends = np.searchsorted(bucket_n[order_n], np.arange(self._num_buckets + 1))
            for bucket in np.flatnonzero(np.diff(ends)).tolist():
                buckets.append(bucket, piece.take(order_n[ends[bucket] : ends[bucket + 1]]))
        buckets.file.flush()


def num_buckets_for(num_bytes: int, memory_bytes: int) -> int:
    """How many buckets examples of so many bytes are divided into, so that the work on one stays within the memory."""
    return max(1, -(-num_bytes * _BUCKETS_IN_MEMORY // memory_bytes))


def _hashes(examples: EmbeddingSet, order: tuple[int, int]) -> NDArray[np.uint64]:
    """What `data.resampling.epoch_order` sorts by."""
    seed, epoch = order
    return hash_ids(examples.ids_N16, seed, "shuffle", epoch)


def _arrays(examples: EmbeddingSet) -> tuple[NDArray[np.generic], ...]:
    lengths_N = np.diff(examples.label_offsets).astype(np.int32)
    return examples.ids_N16, examples.embeddings_NE, examples.experts_N, lengths_N, examples.label_indices_L
