"""How much two labellings of the same things agree: adjusted Rand index, mutual information, what parts say about hashtags.

Everything comes from a contingency table of whole numbers. The Rand index is one quotient of Python integers, rounded once;
entropies are sums over the distinct counts of a table, added exactly (`math.fsum`), so no result depends on the order of
the rows. Rejected: scikit-learn, which is no dependency of the library and adds floats in the table's order.

A mutual information measured on few examples is too large: parts drawn by lot seem to know something of the hashtags, the
more the more parts there are (300 hashtags, 64 parts and 50,000 hashtag occurrences: 0.30 bits of nothing). So
`tag_information` measures that as well, by dealing out the same parts, of the same sizes, to the examples by a hash.

Shape letters: N things or examples, L occurrences of tags, C cells of a table that are not empty.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hardmoe.data.reading import Labels
from hardmoe.hashing import hash_ids

_DEALS = 4
"""The level of chance is the mean over so many deals."""


@dataclass(frozen=True)
class Contingency:
    """How often the labels of two labellings meet."""

    first_C: NDArray[np.int64]
    """The first label of every cell that is not empty, in ascending order."""
    second_C: NDArray[np.int64]
    """Its second label."""
    counts_C: NDArray[np.int64]
    """How often they meet."""

    @classmethod
    def of(cls, first_N: NDArray[np.integer], second_N: NDArray[np.integer]) -> "Contingency":
        """Count two labellings, integers not below zero, of the same N things."""
        if first_N.shape != second_N.shape or first_N.ndim != 1:
            raise ValueError(f"labellings of {list(first_N.shape)} and {list(second_N.shape)} things cannot be compared")
        width = int(second_N.max(initial=0)) + 1
        cells, counts = np.unique(first_N.astype(np.int64) * width + second_N, return_counts=True)
        return cls(cells // width, cells % width, counts.astype(np.int64))

    @property
    def num_things(self) -> int:
        """N."""
        return int(self.counts_C.sum())

    def first_counts(self) -> NDArray[np.int64]:
        """How often each first label occurs, by label."""
        return _weighted_counts(self.first_C, self.counts_C)

    def second_counts(self) -> NDArray[np.int64]:
        """How often each second label occurs, by label."""
        return _weighted_counts(self.second_C, self.counts_C)

    def adjusted_rand_index(self) -> float:
        """Hubert and Arabie's adjusted Rand index (Journal of Classification 2, 1985).

        1 for the same partition, whatever its parts are called; 0 on average for two that know nothing of each other.
        """
        together, first, second = map(_pairs, (self.counts_C, self.first_counts(), self.second_counts()))
        all_pairs = self.num_things * (self.num_things - 1) // 2
        numerator = 2 * (together * all_pairs - first * second)
        denominator = (first + second) * all_pairs - 2 * first * second
        return numerator / denominator if denominator else 1.0

    def mutual_information(self) -> float:
        """What one label says about the other, in bits per thing."""
        first, second, joint = (_weighed(counts) for counts in (self.first_counts(), self.second_counts(), self.counts_C))
        return max(0.0, _bits_each((*joint, *_negated(first), *_negated(second)), self.num_things))


@dataclass(frozen=True)
class TagInformation:
    """What the part of an example says about one of its hashtags, in bits per occurrence of a hashtag."""

    bits: float
    """Mutual information of hashtag and part."""
    chance_bits: float
    """The same where parts of these sizes were dealt out to the examples by lot."""
    entropy_bits: float
    """Entropy of the hashtag: what there would be to know."""

    @property
    def net_bits(self) -> float:
        """What is left after the level of chance was taken off."""
        return self.bits - self.chance_bits

    @property
    def share(self) -> float | None:
        """`net_bits` as a share of the entropy; None where there is nothing to know."""
        return self.net_bits / self.entropy_bits if self.entropy_bits else None


def tag_information(labels: Labels, part_N: NDArray[np.integer], ids_N16: NDArray[np.uint8], seed: int) -> TagInformation:
    """Measure what parts say about hashtags.

    Args:
        labels: the tags of N examples.
        part_N: their parts, integers [N].
        ids_N16: their ids, uint8 [N, 16]; with the seed they decide how parts are dealt out by lot.
        seed: the recipe's seed.
    """
    found = tag_contingency(labels, part_N)
    dealt = [tag_contingency(labels, _dealt(part_N, hash_ids(ids_N16, seed, "deal", deal))) for deal in range(_DEALS)]
    chance = math.fsum(table.mutual_information() for table in dealt) / _DEALS
    return TagInformation(found.mutual_information(), chance, entropy(found.first_counts()))


def tag_contingency(labels: Labels, part_N: NDArray[np.integer]) -> Contingency:
    """How often every tag occurs in every part."""
    return Contingency.of(labels.indices_L, np.repeat(part_N, np.diff(labels.offsets)))


def entropy(counts: NDArray[np.int64]) -> float:
    """Entropy of a label that occurs so often, in bits."""
    return max(0.0, _bits_each(_negated(_weighed(counts)), int(counts.sum())))


def _dealt(part_N: NDArray[np.integer], hash_N: NDArray[np.uint64]) -> NDArray[np.integer]:
    """As many examples in each part as before, but chosen by the hash alone."""
    dealt_N = np.empty_like(part_N)
    dealt_N[np.argsort(hash_N, kind="stable")] = np.sort(part_N)
    return dealt_N


def _weighted_counts(labels_C: NDArray[np.int64], counts_C: NDArray[np.int64]) -> NDArray[np.int64]:
    totals = np.zeros(int(labels_C.max(initial=-1)) + 1, np.int64)
    np.add.at(totals, labels_C, counts_C)
    return totals


def _pairs(counts: NDArray[np.int64]) -> int:
    """Pairs of things with the same label."""
    sizes, times = np.unique(counts, return_counts=True)
    return sum(n * (n - 1) // 2 * t for n, t in zip(sizes.tolist(), times.tolist(), strict=True))


def _weighed(counts: NDArray[np.int64]) -> list[float]:
    """Terms of the sum of n log2 n over some counts, one for every distinct count."""
    sizes, times = np.unique(counts[counts > 0], return_counts=True)
    return [t * n * math.log2(n) for n, t in zip(sizes.tolist(), times.tolist(), strict=True)]


def _negated(terms: Iterable[float]) -> list[float]:
    return [-term for term in terms]


def _bits_each(terms: Iterable[float], count: int) -> float:
    """(sum of the terms + N log2 N) / N; 0 for nothing at all."""
    return math.fsum((*terms, count * math.log2(count))) / count if count else 0.0
