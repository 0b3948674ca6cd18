"""Cached embeddings as the fit reads them: in batches whose order is a hash, from memory or from wherever they fit.

What is served is a function of the examples and of (seed, epoch) alone, so nothing depends on how they lie: not on the order of
the tables, and not on whether they are held in memory (`EmbeddingSet`) or on disk (`streaming.SpilledEmbeddings`).

Shape letters: N examples, E features of an expert, L labels, V tags, B batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hardmoe.data.ids import order_of_distinct
from hardmoe.data.loader import SparseTargets
from hardmoe.data.ragged import consecutive, offsets_of, take_rows
from hardmoe.data.resampling import batch_slice, epoch_order, num_batches
from hardmoe.errors import DataError
from hardmoe.hashing import derive_seed, hash_ids, number_ids

_DIGEST_ROWS = 4096
_MASK_64 = (1 << 64) - 1


class ExampleSource(Protocol):
    """Labelled examples with finite embeddings."""

    def __len__(self) -> int:
        """N."""

    def tag_counts(self, num_tags: int) -> NDArray[np.int64]:
        """How many examples have each tag, int64 [V]."""

    def content(self) -> int:
        """64 bits that say which examples these are, in whatever order: a sum over them."""

    def batches(self, seed: int, epoch: int, batch_size: int, first: int = 0) -> Iterator["EmbeddingSet"]:
        """The batches of an epoch, from the `first` on, in the order of hash(seed, epoch, id)."""

    def usable(self, num_tags: int, num_experts: int | None) -> "ExampleSource":
        """The labelled examples, checked as `EmbeddingSet.usable` does."""


@dataclass(frozen=True)
class EmbeddingSet:
    """Cached embeddings with their labels in compressed sparse rows, in any order."""

    ids_N16: NDArray[np.uint8]
    embeddings_NE: NDArray[np.float16]
    experts_N: NDArray[np.int32]
    label_indices_L: NDArray[np.int32]
    label_offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids_N16)

    @property
    def num_features(self) -> int:
        """E, the experts' width."""
        return int(self.embeddings_NE.shape[1])

    @classmethod
    def from_rows(
        cls,
        ids_N16: NDArray[np.uint8],
        embeddings_NE: NDArray[np.float16],
        experts_N: NDArray[np.int32],
        label_indices_L: NDArray[np.int32],
        label_offsets: NDArray[np.int64],
    ) -> "EmbeddingSet":
        """Take rows as they are, without a copy.

        Args:
            ids_N16: uint8 [N, 16].
            embeddings_NE: float16 [N, E], each from the example's own expert.
            experts_N: int32 [N], which one that is.
            label_indices_L: int32 [L], canonical tag indices, each row's in its own order.
            label_offsets: int64 [N + 1], where every row's labels begin and end.

        Raises:
            ValueError: if lengths disagree or an id occurs twice.
        """
        lengths = {len(ids_N16), len(embeddings_NE), len(experts_N), len(label_offsets) - 1}
        if len(lengths) != 1 or label_offsets[-1] != len(label_indices_L):
            raise ValueError(f"ids, embeddings, experts and labels describe different numbers of examples: {sorted(lengths)}")
        order_of_distinct(ids_N16)
        return cls(ids_N16, embeddings_NE, experts_N, label_indices_L, label_offsets)

    @classmethod
    def empty(cls, num_features: int) -> "EmbeddingSet":
        """No examples."""
        ids_N16, vectors_NE, numbers = np.zeros((0, 16), np.uint8), np.zeros((0, num_features), np.float16), np.zeros(0, np.int32)
        return cls(ids_N16, vectors_NE, numbers, numbers, np.zeros(1, np.int64))

    @classmethod
    def joined(cls, sets: Sequence["EmbeddingSet"]) -> "EmbeddingSet":
        """The examples of several sets, at least one, one after another."""
        filled = [some for some in sets if len(some)]
        if len(filled) <= 1:
            return filled[0] if filled else sets[0]
        sets = filled
        return cls(
            np.concatenate([some.ids_N16 for some in sets]),
            np.concatenate([some.embeddings_NE for some in sets]),
            np.concatenate([some.experts_N for some in sets]),
            np.concatenate([some.label_indices_L for some in sets]),
            offsets_of(np.concatenate([np.diff(some.label_offsets) for some in sets])),
        )

    def take(self, positions: NDArray[np.int64]) -> "EmbeddingSet":
        """The examples at these positions, in this order."""
        labels, offsets = take_rows(self.label_indices_L, self.label_offsets, positions)
        return EmbeddingSet(self.ids_N16[positions], self.embeddings_NE[positions], self.experts_N[positions], labels, offsets)

    def labelled(self) -> "EmbeddingSet":
        """The examples with at least one label; the set itself where all have one."""
        is_labelled_N = np.diff(self.label_offsets) > 0
        return self if is_labelled_N.all() else self.take(np.flatnonzero(is_labelled_N))

    def usable(self, num_tags: int, num_experts: int | None) -> "EmbeddingSet":
        """The labelled examples, once their embeddings are known to be finite and their labels and experts a model's.

        Raises:
            DataError: if an embedding is not finite.
            ValueError: if an expert's number or a tag's index is outside the model.
        """
        labels_L, experts_N = self.label_indices_L, self.experts_N
        if len(labels_L) and not 0 <= labels_L.min() <= labels_L.max() < num_tags:
            raise ValueError(f"tag indices must be in [0, {num_tags}), found {labels_L.min()} to {labels_L.max()}")
        if num_experts is not None and len(experts_N) and not 0 <= experts_N.min() <= experts_N.max() < num_experts:
            raise ValueError(f"experts must be in [0, {num_experts}), found {experts_N.min()} to {experts_N.max()}")
        labelled = self.labelled()
        for start in range(0, len(labelled), _DIGEST_ROWS):  # a mask of all would take as much memory as half the embeddings
            finite_n = np.isfinite(labelled.embeddings_NE[start : start + _DIGEST_ROWS]).all(axis=1)
            if not finite_n.all():
                row = start + int(np.argmin(finite_n))
                raise DataError(
                    f"the embedding of example {labelled.ids_N16[row].tobytes().hex()} is not finite: expert "
                    f"{labelled.experts_N[row]} diverged; lower experts.learning_rate and train it again"
                )
        return labelled

    def tag_counts(self, num_tags: int) -> NDArray[np.int64]:
        """See `ExampleSource`."""
        return np.bincount(self.label_indices_L, minlength=num_tags)

    def content(self) -> int:
        """See `ExampleSource`: the sum over the examples of hash(id) times the odd hash of what is known of it."""
        total = 0
        for start in range(0, len(self), _DIGEST_ROWS):
            rows = slice(start, start + _DIGEST_ROWS)
            known_n2 = np.empty((len(self.ids_N16[rows]), 2), "<u8")
            with np.errstate(over="ignore"):
                known_n2[:, 0] = _weighted(self.embeddings_NE[rows].view(np.uint16)) + self.experts_N[rows].astype(np.uint64)
                known_n2[:, 1] = self._hashed_labels(start, rows)
                known_n = hash_ids(known_n2.view(np.uint8), 0, "content") | np.uint64(1)
                total += int((hash_ids(self.ids_N16[rows], 0, "content") * known_n).sum(dtype=np.uint64))
        return total & _MASK_64

    def batches(self, seed: int, epoch: int, batch_size: int, first: int = 0) -> Iterator["EmbeddingSet"]:
        """See `ExampleSource`."""
        order_N = epoch_order(self.ids_N16, seed, epoch)
        for index in range(first, num_batches(len(self), batch_size)):
            yield self.take(order_N[batch_slice(len(self), batch_size, index)])

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Embeddings float32 [N, E] and experts int64 [N] on the device."""
        embeddings_NE = torch.from_numpy(self.embeddings_NE).to(device).float()
        return embeddings_NE, torch.from_numpy(self.experts_N).to(device).long()

    def targets(self) -> SparseTargets:
        """1/k on each of an example's k tags."""
        return SparseTargets.from_rows(self.label_indices_L, self.label_offsets)

    def _hashed_labels(self, start: int, rows: slice) -> NDArray[np.uint64]:
        """Of every row, its labels with their places, uint64 [n]; a tag's place counts, as `one_tag` draws by it."""
        offsets = self.label_offsets[rows.start : rows.stop + 1]
        lengths_n = np.diff(offsets)
        named_l2 = np.empty((int(offsets[-1] - offsets[0]), 2), "<u8")
        named_l2[:, 0] = self.label_indices_L[offsets[0] : offsets[-1]]
        named_l2[:, 1] = consecutive(np.zeros(len(lengths_n), np.int64), lengths_n)
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hash_ids(named_l2.view(np.uint8), 0, "label"))])
        at = offsets - offsets[0]
        return np.asarray(sums[at[1:]] - sums[at[:-1]])


def _weighted(words_nE: NDArray[np.uint16]) -> NDArray[np.uint64]:
    """The sum of every row's words times seeded odd numbers, modulo 2^64; uint64 [n]."""
    factors_E = hash_ids(number_ids(words_nE.shape[1]), derive_seed(0, "words")) | np.uint64(1)
    return np.asarray((words_nE.astype(np.uint64) * factors_E).sum(axis=1, dtype=np.uint64))
