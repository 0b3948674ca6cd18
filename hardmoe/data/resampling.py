"""Which example is seen how often, and at which step: the epochs of a training, with or without repeated examples.

Repeat-factor sampling (Gupta, Dollár, Girshick, "LVIS", CVPR 2019, section 3.3; after Mahajan et al. 2018): a tag on the
share f of the examples has the factor max(1, sqrt(t / f)), an example the largest factor of its tags, and an epoch shows an
example that many times, the fraction decided by lot. The lot is a hash of (seed, epoch, id) and a repeat's place in the order
a hash of (seed, epoch, id, number of the repeat), so neither depends on positions, and a step says all there is to say of
where a training stands. Rejected: drawing examples with replacement by weight, which leaves a third of them out of an epoch.

Shape letters: N examples, L labels, V tags, E epochs, P samples of an epoch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hardmoe.data.ids import id_words
from hardmoe.hashing import hash_fractions, hash_ids


def repeat_factors(
    label_indices_L: NDArray[np.int32], label_offsets: NDArray[np.int64], threshold: float | None
) -> NDArray[np.float64] | None:
    """How often each example is to be seen in an epoch, float64 [N], at least 1; None if all are seen once.

    Args:
        label_indices_L: tags of the examples in compressed sparse rows, each once in a row.
        label_offsets: int64 [N + 1].
        threshold: t, the share of the examples below which a tag counts as rare; None repeats nothing.
    """
    lengths_N = np.diff(label_offsets)
    if threshold is None or not len(label_indices_L):
        return None
    share_V = np.bincount(label_indices_L) / len(lengths_N)
    with np.errstate(divide="ignore"):
        factor_V = np.maximum(1.0, np.sqrt(threshold / share_V))
    factors_N = np.ones(len(lengths_N))
    rows = np.flatnonzero(lengths_N)
    factors_N[rows] = np.maximum.reduceat(factor_V[label_indices_L], label_offsets[:-1][rows])
    return factors_N


def repeats_in_epoch(factors_N: NDArray[np.float64], ids_N16: NDArray[np.uint8], seed: int, epoch: int) -> NDArray[np.int64]:
    """The factors of one epoch, rounded up or down by lot, int64 [N]; their mean over the epochs tends to the factor."""
    whole_N = np.floor(factors_N)
    return (whole_N + (hash_fractions(ids_N16, seed, epoch, "repeat") < factors_N - whole_N)).astype(np.int64)


def num_batches(num_samples: int, batch_size: int) -> int:
    """Batches of one epoch, the last not smaller than the others by more than one sample."""
    return -(-num_samples // batch_size)


def batch_slice(num_samples: int, batch_size: int, index: int) -> slice:
    """Where a batch lies in the epoch's order; sizes differ by at most one, and together the batches cover it once."""
    batches = num_batches(num_samples, batch_size)
    return slice(index * num_samples // batches, (index + 1) * num_samples // batches)


def epoch_order(
    ids_N16: NDArray[np.uint8], seed: int, epoch: int, repeats_N: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """The positions of the examples in one epoch's order, by hash of (seed, epoch, id), ties by id.

    Args:
        ids_N16: the ids.
        seed: the training's.
        epoch: 0 for the first.
        repeats_N: how often each example is seen; a repeat has a place of its own, by hash of its number besides. None
            shows every example once, and a repeat changes no other's relative order.

    Returns:
        int64 [P]; P is N where nothing is repeated.
    """
    high_N, low_N = id_words(ids_N16)
    if repeats_N is None:
        return np.lexsort((low_N, high_N, hash_ids(ids_N16, seed, "shuffle", epoch)))
    positions, keys, numbers = [], [], []
    left, number = np.flatnonzero(repeats_N > 0), 0
    while len(left):
        purpose = ("shuffle", epoch) if number == 0 else ("shuffle", epoch, number)
        positions.append(left)
        keys.append(hash_ids(ids_N16[left], seed, *purpose))
        numbers.append(np.full(len(left), number, np.int32))
        number += 1
        left = left[repeats_N[left] > number]
    if not positions:
        return np.zeros(0, np.int64)
    position_P = np.concatenate(positions)
    order_P = np.lexsort((np.concatenate(numbers), low_N[position_P], high_N[position_P], np.concatenate(keys)))
    return position_P[order_P]


@dataclass(frozen=True)
class Schedule:
    """All steps of a training, a pure function of the examples' ids and labels, the seed and these numbers."""

    ids_N16: NDArray[np.uint8]
    factors_N: NDArray[np.float64] | None
    """As `repeat_factors` returns them."""
    batch_size: int
    epochs: int
    seed: int
    last_samples: int | None = None
    """Samples of the last epoch, the first of its order; None for all."""

    @cached_property
    def samples_E(self) -> NDArray[np.int64]:
        """Samples of every epoch, int64 [E]: the examples with their repeats."""
        if self.factors_N is None:
            counts_E = np.full(self.epochs, len(self.ids_N16), np.int64)
        else:
            repeats = (repeats_in_epoch(self.factors_N, self.ids_N16, self.seed, epoch) for epoch in range(self.epochs))
            counts_E = np.array([repeats_N.sum() for repeats_N in repeats], np.int64)
        if self.last_samples is not None:
            counts_E[-1] = min(counts_E[-1], self.last_samples)
        return counts_E

    @property
    def total_steps(self) -> int:
        """Steps of all epochs."""
        return int(self._first_steps[-1])

    def samples_before(self, step: int) -> int:
        """Samples in the batches of the first `step` steps."""
        if step >= self.total_steps:
            return int(self.samples_E.sum())
        epoch, index = self.place(step)
        within = batch_slice(int(self.samples_E[epoch]), self.batch_size, index).start
        return int(self.samples_E[:epoch].sum()) + int(within)

    def place(self, step: int) -> tuple[int, int]:
        """The epoch that a step is in, and its number there."""
        epoch = int(np.searchsorted(self._first_steps, step, "right")) - 1
        return epoch, step - int(self._first_steps[epoch])

    def ends_epoch(self, steps_done: int) -> bool:
        """Whether an epoch is complete after so many steps."""
        return steps_done > 0 and steps_done in self._first_steps

    def batches(self, start_step: int) -> Iterator[NDArray[np.int64]]:
        """The positions of the samples of every batch from a step on, int64 [B] each; the same step always gives the same."""
        if start_step >= self.total_steps:
            return
        first_epoch, first_index = self.place(start_step)
        for epoch in range(first_epoch, self.epochs):
            order_P = epoch_order(self.ids_N16, self.seed, epoch, self._repeats(epoch))[: self.samples_E[epoch]]
            for index in range(first_index if epoch == first_epoch else 0, num_batches(len(order_P), self.batch_size)):
                yield order_P[batch_slice(len(order_P), self.batch_size, index)]

    @cached_property
    def _first_steps(self) -> NDArray[np.int64]:
        """The first step of every epoch, and the number of all steps, int64 [E + 1]."""
        steps = [num_batches(samples, self.batch_size) for samples in self.samples_E.tolist()]
        return np.cumsum([0, *steps], dtype=np.int64)

    def _repeats(self, epoch: int) -> NDArray[np.int64] | None:
        return None if self.factors_N is None else repeats_in_epoch(self.factors_N, self.ids_N16, self.seed, epoch)
