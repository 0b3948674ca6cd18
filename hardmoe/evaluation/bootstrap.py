"""Poisson bootstrap over test examples (Chamandy et al., "Estimating uncertainty for massive data streams", 2012).

Replicate b gives every example a weight drawn from Poisson(1), a function of hash(seed, example_id, b) only. So weighted
sums can be taken shard by shard and added, in any order and under any sharding, and two systems evaluated on the same
examples get the same replicates: the interval of their difference is a paired one. Rejected: the multinomial bootstrap,
whose N draws need all examples in one place and in one order.

Arrays of replicated values have R = 1 + B rows: row 0 is the point estimate (every weight 1), rows 1 to B the replicates.

Shape letters: N examples, B replicates, R = 1 + B rows.
"""

from decimal import Decimal, localcontext
from functools import cache

import numpy as np
from numpy.typing import NDArray

from hardmoe.config import Json
from hardmoe.hashing import hash_ids, number_ids

BOOTSTRAP_SEED = 0
"""Not the recipe's: the same test images weigh the same in every run, so that runs with other seeds can be compared as well."""


@cache
def _poisson_thresholds() -> NDArray[np.uint64]:
    """`floor(2^64 P(X <= j))` for j = 0, 1, …: a uniform 64-bit word that reaches threshold j stands for a count above j."""
    with localcontext() as context:
        context.prec = 60
        thresholds: list[int] = []
        term = Decimal(-1).exp()
        cumulative = term
        while (threshold := int(cumulative * 2**64)) < 2**64 - 1:
            thresholds.append(threshold)
            term /= len(thresholds)
            cumulative += term
    return np.array(thresholds, dtype=np.uint64)


def poisson_weights(ids_N16: NDArray[np.uint8], num_replicates: int, seed: int) -> NDArray[np.uint8]:
    """Draw every example's Poisson(1) weight in every replicate.

    Args:
        ids_N16: example ids, uint8 [N, 16].
        num_replicates: B, the number of replicates.
        seed: the recipe's seed.

    Returns:
        uint8 [B, N]; a column depends on its id alone, a row on its number alone.
    """
    weights_BN = np.empty((num_replicates, len(ids_N16)), dtype=np.uint8)
    thresholds = _poisson_thresholds()
    for replicate in range(num_replicates):
        words_N = hash_ids(ids_N16, seed, "bootstrap", replicate)
        weights_BN[replicate] = np.searchsorted(thresholds, words_N, side="right")
    return weights_BN


def percentile_interval(values_B: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """The central percentile interval of the replicates' values.

    Replicates without a value (NaN: every one of a handful of examples had weight 0) are left out.

    Args:
        values_B: one value per replicate, float64 [B].
        level: the share of the replicates inside, in (0, 1).

    Raises:
        ValueError: if no replicate has a value.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be in (0, 1), not {level}")
    finite_B = values_B[np.isfinite(values_B)]
    if len(finite_B) == 0:
        raise ValueError("no replicate has a value")
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(finite_B, [tail, 1.0 - tail])
    return float(low), float(high)


def null_result(reason: str) -> dict[str, Json]:
    """A metric that cannot be given, and why."""
    return {"value": None, "low": None, "high": None, "reason": reason}


def interval_result(values_R: NDArray[np.float64], centred: bool = False) -> dict[str, Json]:
    """`{"value", "low", "high"}` of replicated values: the point estimate with its 95 % interval.

    Args:
        values_R: float64 [1 + B], the point estimate first.
        centred: move the replicates so that their mean is the point estimate, for a statistic that resampling itself
            biases; their spread is kept.
    """
    if not np.isfinite(values_R[0]):
        return null_result("no example with a tag")
    if not np.isfinite(values_R[1:]).any():
        return {"value": float(values_R[0]), "low": None, "high": None, "reason": "too few examples for an interval"}
    shift = float(values_R[0] - np.nanmean(values_R[1:])) if centred else 0.0
    low, high = percentile_interval(values_R[1:] + shift)
    return {"value": float(values_R[0]), "low": low, "high": high}


def paired_result(values_a_R: NDArray[np.float64], values_b_R: NDArray[np.float64], centred: bool = False) -> dict[str, Json]:
    """`a - b` with the interval of the replicates' differences; both must come from the same examples and seed."""
    if values_a_R.shape != values_b_R.shape:
        raise ValueError(f"different numbers of replicates: {len(values_a_R) - 1} and {len(values_b_R) - 1}")
    return interval_result(values_a_R - values_b_R, centred)


def hierarchical_result(values_SR: NDArray[np.float64]) -> dict[str, Json]:
    """`{"value", "low", "high"}` of the mean over several runs, resampled over runs and examples at once.

    In replicate b as many runs are drawn, with replacement, and their b-th replicates averaged (Davison and Hinkley 1997, section
    3.8), so the interval covers the choice of test examples and the luck of the training. Of one run it covers the former alone.

    Args:
        values_SR: float64 [S, 1 + B], of every run the point estimate first; all over the same examples.
    """
    num_runs, num_replicates = len(values_SR), values_SR.shape[1] - 1
    words_BS = np.stack([hash_ids(number_ids(num_replicates), BOOTSTRAP_SEED, "runs", run) for run in range(num_runs)], axis=1)
    drawn_BS = (words_BS >> np.uint64(32)) * np.uint64(num_runs) >> np.uint64(32)
    replicates_B = values_SR[drawn_BS.astype(np.int64), 1 + np.arange(num_replicates)[:, None]].mean(axis=1)
    return interval_result(np.concatenate([values_SR[:, 0].mean(keepdims=True), replicates_B]))
