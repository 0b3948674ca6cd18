"""Which tags a step of `classes: sampled` computes, and how much each of them counts for.

Every tag of the batch is taken; any other one with a probability pi_v of its own, by hash of (seed, step, v), independently of
all others (Poisson sampling), and then counts 1 / pi_v times (Horvitz and Thompson 1952). In the softmax that is log pi_v taken
from its logit, so that an example's normaliser

    Z' = sum over the batch's tags of exp(o_v) + sum over the drawn ones of exp(o_v) / pi_v

has the expectation Z = sum over all tags of exp(o_v), and the gradient of Z' that of Z: *this* is what is unbiased. The loss has
log Z', whose expectation is at most log Z (Jensen's inequality), and by about var(Z') / (2 Z^2) less. The sum of binary
cross-entropies is itself unbiased, with its gradient. Where every pi_v is 1 both are the full loss.

pi_v is in proportion to a tag's training examples plus one, cut at 1: as far as a model knows the tags' frequencies, exp(o_v) is
larger for the frequent ones, and in proportion to it Z' has no variance. Rejected: a fixed number of draws with replacement
(the usual log(S q_v) then corrects for an expected count, and a tag of the batch may be drawn once more as a negative), and
draws from a generator, which is a state to be kept.

Shape letters: V tags, T chosen tags, L labels of the batch.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hardmoe.hashing import hash_fractions, number_ids


@dataclass(frozen=True)
class ChosenTags:
    """What one step computes."""

    tags_T: NDArray[np.int64]
    """Ascending."""
    probabilities_T: NDArray[np.float64]
    """How likely each was chosen; 1 for the batch's own."""


class TagSampler:
    """Chooses tags.

    Args:
        counts_V: training examples of every tag, int64 [V].
        sampled_tags: how many are drawn in the mean.
        seed: of the fit.
    """

    def __init__(self, counts_V: NDArray[np.int64], sampled_tags: int, seed: int) -> None:
        self.probabilities_V = inclusion_probabilities(counts_V, sampled_tags)
        self._seed = seed
        self._ids_V16 = number_ids(len(counts_V))

    def choose(self, labels_L: NDArray[np.integer], step: int) -> ChosenTags:
        """The tags of one step, given the labels of its batch."""
        is_chosen_V = hash_fractions(self._ids_V16, self._seed, "tags", step) < self.probabilities_V
        is_chosen_V[labels_L] = True
        tags_T = np.flatnonzero(is_chosen_V)
        probabilities_T = self.probabilities_V[tags_T]
        probabilities_T[np.searchsorted(tags_T, labels_L)] = 1.0
        return ChosenTags(tags_T, probabilities_T)


def inclusion_probabilities(counts_V: NDArray[np.int64], sampled_tags: int) -> NDArray[np.float64]:
    """In proportion to count + 1, cut at 1, with the sum `sampled_tags` (or V, if that is less); float64 [V]."""
    if sampled_tags >= len(counts_V):
        return np.ones(len(counts_V))
    sizes_V = np.sort(counts_V.astype(np.float64) + 1)[::-1]
    # With the c largest cut, the others share what is left; the smallest c for which none of them exceeds 1 is the one.
    rest_V = np.cumsum(sizes_V[::-1])[::-1]
    factors_V = (sampled_tags - np.arange(len(sizes_V))) / rest_V
    num_cut = int(np.argmax(factors_V * sizes_V <= 1))
    return np.asarray(np.minimum(1.0, (counts_V + 1) * factors_V[num_cut]))
