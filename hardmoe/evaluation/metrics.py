"""precision@k, recall@k and hit@k as exact, mergeable sums.

Definitions are ClassyVision's: precision@k is the hits in the top k over k·N, recall@k the hits in the top k over all
positives (micro: not the mean over images), hit@k the share of images with any hit in the top k. Examples without a tag
are left out and counted. A metric whose k exceeds the number of tags is null with a reason: dividing by min(k, V) would
give the same name to another quantity.

Every sum is an integer, per replicate too, so sums of shards add up to the same bits in any order. Equal scores rank by
lower tag index. Rejected: `torch.topk`, which breaks ties as its kernel likes; we select on (score, index) packed into
one 64-bit key.

Shape letters: N examples, V tags, M labels, B replicates, R = 1 + B rows (the point estimate first), C columns of sums.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hardmoe.config import Json
from hardmoe.evaluation.bootstrap import interval_result, null_result, paired_result, poisson_weights

RANKS = (1, 5, 10)
METRICS = ("precision@1", "precision@5", "precision@10", "recall@10", "hit@1", "hit@5")
_COLUMNS = ("examples", "positives", *(f"hits@{k}" for k in RANKS), *(f"any@{k}" for k in RANKS))
_CHUNK_SCORES = 4_000_000
_CHUNK_WEIGHTS = 2_000_000

Labels = tuple[NDArray[np.integer], NDArray[np.integer]]
"""The tags of N examples as compressed rows: (indices [M], offsets [N + 1]); a row holds every tag at most once."""


def ordered_keys(scores: NDArray[np.floating]) -> NDArray[np.unsignedinteger]:
    """Map floats to unsigned integers of the same width and order, by their bits; -0.0 equals 0.0.

    Raises:
        ValueError: if a score is NaN, which has no rank.
    """
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN, which has no rank")
    unsigned = np.dtype(f"u{scores.dtype.itemsize}")
    bits = (scores + scores.dtype.type(0)).view(unsigned)  # adding zero turns -0.0 into 0.0
    sign = unsigned.type(1 << (8 * scores.dtype.itemsize - 1))
    keys: NDArray[np.unsignedinteger] = np.where(bits & sign, ~bits, bits | sign)
    return keys


def top_tags(scores_NV: NDArray[np.float32], num_tags: int) -> NDArray[np.int64]:
    """The best tags of every example in order, equal scores by lower index.

    Args:
        scores_NV: float32 [N, V], higher is better.
        num_tags: how many, at most V of them.

    Returns:
        int64 [N, min(num_tags, V)].
    """
    tags = scores_NV.shape[1]
    count = min(num_tags, tags)
    reversed_V = np.arange(tags - 1, -1, -1, dtype=np.uint64)
    keys_NV = (ordered_keys(scores_NV).astype(np.uint64) << np.uint64(32)) | reversed_V
    best_Nk = np.partition(keys_NV, tags - count, axis=1)[:, tags - count :]
    best_Nk = np.sort(best_Nk, axis=1)[:, ::-1]
    top_Nk: NDArray[np.int64] = tags - 1 - (best_Nk & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return top_Nk


def check_labels(labels: Labels, num_examples: int, num_tags: int) -> None:
    """Refuse labels that are not compressed rows for `num_examples` examples and `num_tags` tags."""
    indices_M, offsets = labels
    if len(offsets) != num_examples + 1 or offsets[0] != 0 or offsets[-1] != len(indices_M) or (np.diff(offsets) < 0).any():
        raise ValueError(f"label offsets do not describe {num_examples} rows of {len(indices_M)} labels")
    if len(indices_M) and not 0 <= indices_M.min() <= indices_M.max() < num_tags:
        raise ValueError(f"label indices must be in [0, {num_tags}), found {indices_M.min()} to {indices_M.max()}")


def _example_counts(
    scores_NV: NDArray[np.float32], indices_M: NDArray[np.integer], sizes_N: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Every example's contribution to every sum, int64 [N, C]."""
    num_examples, num_tags = scores_NV.shape
    is_label_NV = np.zeros((num_examples, num_tags), dtype=bool)
    is_label_NV[np.repeat(np.arange(num_examples), sizes_N), indices_M] = True
    hits_Nk = np.cumsum(np.take_along_axis(is_label_NV, top_tags(scores_NV, max(RANKS)), axis=1), axis=1)
    hits_N3 = hits_Nk[:, [min(k, num_tags) - 1 for k in RANKS]]
    return np.column_stack([sizes_N > 0, is_label_NV.sum(axis=1), hits_N3, hits_N3 > 0]).astype(np.int64)


@dataclass(frozen=True)
class RankingSums:
    """The sums behind the ranking metrics for some examples; `a + b` are those of both."""

    sums_RC: NDArray[np.int64]
    """int64 [1 + B, C]: examples, positives, hits@1, @5, @10, examples with a hit in the top 1, 5, 10; row 0 unweighted."""
    num_tags: int
    """V."""
    num_unlabelled: int
    """Examples without a tag, left out of every metric."""

    @classmethod
    def from_scores(
        cls, scores_NV: NDArray[np.float32], labels: Labels, ids_N16: NDArray[np.uint8], num_replicates: int, seed: int
    ) -> "RankingSums":
        """Sum over one batch or shard.

        Args:
            scores_NV: float32 [N, V], higher is better; only their order within an example matters.
            labels: the true tags as compressed rows.
            ids_N16: example ids, uint8 [N, 16]; they decide the replicates' weights.
            num_replicates: B.
            seed: the recipe's seed.

        Raises:
            ValueError: if shapes disagree, a label is out of range or a score is NaN.
        """
        num_examples, num_tags = scores_NV.shape
        check_labels(labels, num_examples, num_tags)
        indices_M, offsets = labels
        sizes_N = np.diff(offsets).astype(np.int64)
        sums_RC = np.zeros((1 + num_replicates, len(_COLUMNS)), dtype=np.int64)
        chunk = max(1, min(_CHUNK_SCORES // max(num_tags, 1), _CHUNK_WEIGHTS // (1 + num_replicates)))
        for start in range(0, num_examples, chunk):
            rows = slice(start, min(start + chunk, num_examples))
            labels_of_rows = indices_M[offsets[rows.start] : offsets[rows.stop]]
            counts_NC = _example_counts(scores_NV[rows], labels_of_rows, sizes_N[rows])
            counts_NC[counts_NC[:, 0] == 0] = 0
            weights_BN = poisson_weights(ids_N16[rows], num_replicates, seed)
            sums_RC[0] += counts_NC.sum(axis=0)
            # Integers below 2^53, so a float64 product is exact and, unlike NumPy's integer one, uses BLAS.
            sums_RC[1:] += (weights_BN.astype(np.float64) @ counts_NC.astype(np.float64)).astype(np.int64)
        return cls(sums_RC, num_tags, int((sizes_N == 0).sum()))

    def __add__(self, other: "RankingSums") -> "RankingSums":
        """The sums over both sets of examples."""
        if self.num_tags != other.num_tags or self.sums_RC.shape != other.sums_RC.shape:
            raise ValueError(
                f"sums over {self.num_tags} tags and {len(self.sums_RC) - 1} replicates cannot be added to sums over "
                f"{other.num_tags} tags and {len(other.sums_RC) - 1} replicates"
            )
        return RankingSums(self.sums_RC + other.sums_RC, self.num_tags, self.num_unlabelled + other.num_unlabelled)

    def column(self, name: str) -> NDArray[np.float64]:
        """One sum in every row, float64 [R]; names as `examples`, `positives`, `hits@5`, `any@1`."""
        return self.sums_RC[:, _COLUMNS.index(name)].astype(np.float64)

    def values(self, metric: str) -> NDArray[np.float64]:
        """A metric in every row, float64 [R]; NaN where a row has no example."""
        kind, k = metric.split("@")
        numerator_R = self.column(f"any@{k}" if kind == "hit" else f"hits@{k}")
        denominator_R = self.column("positives" if kind == "recall" else "examples") * (int(k) if kind == "precision" else 1)
        return np.divide(numerator_R, denominator_R, out=np.full_like(numerator_R, np.nan), where=denominator_R > 0)

    def null_reason(self, metric: str) -> str | None:
        """Why a metric cannot be given, or None where it can."""
        k = int(metric.split("@")[1])
        return f"{metric} needs at least {k} tags, the vocabulary has {self.num_tags}" if self.num_tags < k else None

    def finish(self) -> dict[str, dict[str, Json]]:
        """Every metric as `{"value", "low", "high"}` with a 95 % interval, or nulls with a `reason`."""
        results = {}
        for metric in METRICS:
            reason = self.null_reason(metric)
            results[metric] = null_result(reason) if reason else interval_result(self.values(metric))
        return results


def paired_difference(sums_a: RankingSums, sums_b: RankingSums, metric: str) -> dict[str, Json]:
    """System a's metric minus system b's, with the interval of the difference over shared replicates.

    Args:
        sums_a: sums of the one system.
        sums_b: sums of the other, over the same examples with the same replicates and seed.
        metric: one of `METRICS`.

    Raises:
        ValueError: if the two were not evaluated on the same examples and replicates.
    """
    reason = sums_a.null_reason(metric)
    if sums_a.num_tags != sums_b.num_tags or not np.array_equal(sums_a.sums_RC[:, :2], sums_b.sums_RC[:, :2]):
        raise ValueError("a paired difference needs the same examples, labels, replicates and seed on both sides")
    return null_result(reason) if reason else paired_result(sums_a.values(metric), sums_b.values(metric))
