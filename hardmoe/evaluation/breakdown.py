"""Where a system is right: by how sure it is, and by how frequent a hashtag is. Exact, mergeable sums, like the ranking metrics.

Calibration: images are sorted into bins by the probability of their best tag; the expected calibration error is the mean over
the images of |share of right ones - mean probability| of their bin (Guo et al. 2017, arXiv 1706.04599, section 2).

Frequency: hashtags, the most frequent first, are cut into bands of a fifth of all training labels each, so the first holds a few
and the last most of the vocabulary; recall@10 is given for the labels of each.

Shape letters: N images, V tags, k best tags, L labels, F bands, C bins.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hardmoe.config import Json
from hardmoe.evaluation.metrics import Labels, top_tags

BINS, BANDS, RANK = 15, 5, 10
_UNIT = 1 << 24
"""Probabilities are summed in units of 2^-24, as integers."""
_DIGITS = 4
"""Decimals of probabilities that are told; beyond the sixth they depend on which images went through the decoder together."""


def frequency_bands(counts_V: NDArray[np.int64]) -> NDArray[np.int64]:
    """The band of every tag, int64 [V], 0 for the most frequent, by its training images."""
    order_V = np.argsort(-counts_V, kind="stable")
    before_V = np.cumsum(counts_V[order_V]) - counts_V[order_V]
    bands_V = np.empty(len(counts_V), np.int64)
    bands_V[order_V] = np.minimum(BANDS * before_V // max(1, int(counts_V.sum())), BANDS - 1)
    return bands_V


@dataclass(frozen=True)
class Breakdown:
    """The sums of some images; `a + b` are those of both."""

    bins_C3: NDArray[np.int64]
    """Images, right ones, probability of the best tag."""
    bands_F2: NDArray[np.int64]
    """Labels, and those among an image's ten best tags."""

    @classmethod
    def of(cls, scores_NV: NDArray[np.float32], labels: Labels, bands_V: NDArray[np.int64]) -> "Breakdown":
        """Of a batch; images without a label do not count.

        Args:
            scores_NV: log-probabilities, float32 [N, V].
            labels: the true tags.
            bands_V: from `frequency_bands`.
        """
        indices_L, offsets = labels
        lengths_N = np.diff(offsets)
        rows_L = np.repeat(np.arange(len(lengths_N)), lengths_N)
        best_Nk = top_tags(scores_NV, RANK)
        found_L = (best_Nk[rows_L] == indices_L[:, None]).any(axis=1)
        bands_F2 = np.zeros((BANDS, 2), np.int64)
        np.add.at(bands_F2, bands_V[indices_L], np.stack([np.ones_like(found_L), found_L], axis=1))
        right_N = np.bincount(rows_L, best_Nk[rows_L, 0] == indices_L, minlength=len(lengths_N)) > 0
        sure_N = np.exp(np.take_along_axis(scores_NV, best_Nk[:, :1], axis=1)[:, 0].astype(np.float64))
        units_N = np.rint(sure_N * _UNIT).astype(np.int64)
        labelled_N = lengths_N > 0
        bins_C3 = np.zeros((BINS, 3), np.int64)
        bins_N = np.minimum((sure_N * BINS).astype(np.int64), BINS - 1)
        sums_N3 = np.stack([np.ones_like(units_N), right_N.astype(np.int64), units_N], axis=1)
        np.add.at(bins_C3, bins_N[labelled_N], sums_N3[labelled_N])
        return cls(bins_C3, bands_F2)

    def __add__(self, other: "Breakdown") -> "Breakdown":
        return Breakdown(self.bins_C3 + other.bins_C3, self.bands_F2 + other.bands_F2)

    def results(self, bands_V: NDArray[np.int64]) -> dict[str, Json]:
        """As plain JSON; null where a bin or a band has nothing in it."""
        images_C, right_C, units_C = self.bins_C3.T.astype(np.float64)
        gaps_C = np.abs(right_C - units_C / _UNIT)
        bins = [
            None
            if not images
            else {"images": int(images), "right": right / images, "probability": round(units / _UNIT / images, _DIGITS)}
            for images, right, units in zip(images_C, right_C, units_C, strict=True)
        ]
        bands = [
            {"tags": int((bands_V == band).sum()), "labels": int(count), "recall@10": found / count if count else None}
            for band, (count, found) in enumerate(self.bands_F2.tolist())
        ]
        error = round(float(gaps_C.sum() / max(1.0, images_C.sum())), _DIGITS)
        return {"calibration_error": error, "bins": bins, "frequency_bands": bands}
