"""`map` against scikit-learn's average precision, weights and ties included."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from hardmoe.evaluation import average_precision
from hardmoe.evaluation.average_precision import AveragePrecisionScores, merged, paired_map_difference, quantise
from hardmoe.evaluation.bootstrap import poisson_weights


def problem(num_examples: int = 80, num_tags: int = 12, decimals: int = 4, seed: int = 0):
    """Scores that carry some signal; the last tag has no positive, some examples no label."""
    generator = np.random.default_rng(seed)
    truth = generator.random((num_examples, num_tags)) < 0.15
    truth[:, -1] = False
    truth[::11] = False
    scores = np.round(generator.normal(size=truth.shape) + truth, decimals).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(truth.sum(axis=1))])
    labels = (np.nonzero(truth)[1], offsets)
    return scores, truth, labels, generator.integers(0, 256, (num_examples, 16), dtype=np.uint8)


def sklearn_map(scores, truth, weights) -> float:
    kept = truth.any(axis=1)
    per_tag = [
        average_precision_score(truth[kept, tag], scores[kept, tag], sample_weight=weights[kept])
        for tag in range(truth.shape[1])
        if (truth[kept, tag] * weights[kept]).any()
    ]
    return float(np.mean(per_tag))


@pytest.mark.parametrize("decimals", [4, 1, 0])
def test_map_and_every_replicate_equal_sklearn_on_the_quantised_scores(decimals):
    scores, truth, labels, ids = problem(decimals=decimals)
    values = AveragePrecisionScores.from_scores(scores, labels, ids).values(num_replicates=6, seed=2)

    quantised = quantise(scores).astype(float)
    for row, weights in enumerate(np.vstack([np.ones(len(ids)), poisson_weights(ids, 6, 2)])):
        assert values[row] == pytest.approx(sklearn_map(quantised, truth, weights), abs=1e-12)


def test_map_is_close_to_sklearn_on_the_scores_themselves():
    scores, truth, labels, ids = problem(num_examples=500)
    value = AveragePrecisionScores.from_scores(scores, labels, ids).values(1, 0)[0]
    assert value == pytest.approx(sklearn_map(scores, truth, np.ones(500)), abs=2e-3)


def test_quantise_is_monotone_within_its_tolerance_and_saturates():
    values = np.concatenate([-np.geomspace(1e-4, 1e4, 2000)[::-1], [0.0], np.geomspace(1e-4, 1e4, 2000)]).astype(np.float32)
    keys = quantise(values[None])[0].astype(int)
    assert (np.diff(keys) >= 0).all()
    spaced = np.float32(-5.0) * (1 + np.arange(5, dtype=np.float32) * 2e-3)
    assert (np.diff(quantise(spaced[None])[0].astype(int)) < 0).all()
    extremes = quantise(np.array([[-np.inf, -1e30, 0.0, 1e30, np.inf]], dtype=np.float32))[0]
    assert extremes[0] == extremes[1] < extremes[2] < extremes[3] == extremes[4]


def test_merging_shards_in_any_order_gives_the_same_result():
    scores, _, (indices, offsets), ids = problem()
    parts = [
        AveragePrecisionScores.from_scores(
            scores[a:b], (indices[offsets[a] : offsets[b]], offsets[a : b + 1] - offsets[a]), ids[a:b]
        )
        for a, b in ((0, 5), (5, 50), (50, 80))
    ]
    whole = AveragePrecisionScores.from_scores(scores, (indices, offsets), ids).finish(20, 0)
    assert merged(parts).finish(20, 0) == whole
    assert (parts[2] + parts[0] + parts[1]).finish(20, 0) == whole


def test_tags_in_small_chunks_equal_one(monkeypatch):
    scores, _, labels, ids = problem()
    whole = AveragePrecisionScores.from_scores(scores, labels, ids).finish(5, 0)
    monkeypatch.setattr(average_precision, "_CHUNK_KEYS", 2 * len(ids))
    assert AveragePrecisionScores.from_scores(scores, labels, ids).finish(5, 0) == whole


def test_interval_contains_the_value_though_resampling_lifts_average_precision():
    """Seen on 900 examples of 600 tags: value 0.135, plain percentile interval 0.152 to 0.175."""
    scores, _, labels, ids = problem(num_examples=60, num_tags=50)
    result = AveragePrecisionScores.from_scores(scores, labels, ids).finish(100, 0)
    assert result["low"] < result["value"] < result["high"]


@pytest.mark.parametrize("limit", ["MAX_SCORES", "MAX_EXAMPLES"])
def test_above_a_limit_the_result_is_null_with_a_reason(monkeypatch, limit):
    monkeypatch.setattr(average_precision, limit, 10)
    scores, _, labels, ids = problem()
    kept = AveragePrecisionScores.from_scores(scores, labels, ids)
    assert kept.keys_NV.size == kept.positives_M2.size == 0
    result = (kept + kept).finish(10, 0)
    assert result["value"] is None
    assert f"not for {2 * kept.num_examples} examples of 12 tags" in result["reason"]
    with pytest.raises(ValueError, match="map is given for up to"):
        kept.values(10, 0)


def test_no_positive_at_all_is_null():
    scores = AveragePrecisionScores.from_scores(
        np.zeros((4, 3), np.float32), (np.zeros(0, int), np.zeros(5, int)), np.zeros((4, 16), np.uint8)
    )
    assert scores.finish(5, 0)["reason"] == "no example with a tag"


def test_paired_difference_needs_the_same_examples_in_any_order():
    scores, _, labels, ids = problem()
    a = AveragePrecisionScores.from_scores(scores, labels, ids)
    b = AveragePrecisionScores.from_scores(-scores, labels, ids)
    result = paired_map_difference(a, b, 30, 0)
    assert result["value"] == pytest.approx(a.values(1, 0)[0] - b.values(1, 0)[0])
    assert result["low"] < result["value"] < result["high"]
    others = AveragePrecisionScores.from_scores(scores, labels, ids[::-1] ^ 1)
    with pytest.raises(ValueError, match="same examples"):
        paired_map_difference(a, others, 5, 0)


def test_nan_scores_and_other_vocabularies_are_refused():
    scores, _, labels, ids = problem()
    with pytest.raises(ValueError, match="NaN"):
        AveragePrecisionScores.from_scores(scores * np.float32(np.nan), labels, ids)
    wider = AveragePrecisionScores.from_scores(np.hstack([scores, scores]), labels, ids)
    with pytest.raises(ValueError, match="vocabularies"):
        _ = wider + AveragePrecisionScores.from_scores(scores, labels, ids)
