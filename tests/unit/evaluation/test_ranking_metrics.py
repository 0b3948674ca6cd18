"""precision@k, recall@k and hit@k against a plain loop over examples."""

import json

import numpy as np
import pytest

from hardmoe.evaluation.bootstrap import poisson_weights
from hardmoe.evaluation.metrics import METRICS, RankingSums, ordered_keys, paired_difference, top_tags


def problem(num_examples: int = 60, num_tags: int = 25, seed: int = 0):
    """Coarsely rounded scores (many ties), zero to four labels an example."""
    generator = np.random.default_rng(seed)
    scores = np.round(generator.normal(size=(num_examples, num_tags)) * 2).astype(np.float32)
    rows = [generator.choice(num_tags, generator.integers(0, 5), replace=False) for _ in range(num_examples)]
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    ids = generator.integers(0, 256, (num_examples, 16), dtype=np.uint8)
    return scores, rows, (np.concatenate(rows), offsets), ids


def reference(scores, rows, weights) -> dict[str, float]:
    """The definitions, one example at a time, in Python integers."""
    hits = dict.fromkeys((1, 5, 10), 0)
    any_hit = dict.fromkeys((1, 5, 10), 0)
    examples = positives = 0
    for score, row, weight in zip(scores.tolist(), rows, weights.tolist(), strict=True):
        if len(row) == 0:
            continue
        ranking = sorted(range(len(score)), key=lambda tag, score=score: (-score[tag], tag))
        examples += weight
        positives += weight * len(row)
        for k in hits:
            found = len(set(ranking[:k]) & set(row.tolist()))
            hits[k] += weight * found
            any_hit[k] += weight * (found > 0)
    return {
        **{f"precision@{k}": hits[k] / (k * examples) for k in hits},
        "recall@10": hits[10] / positives,
        **{f"hit@{k}": any_hit[k] / examples for k in (1, 5)},
    }


def slice_labels(labels, start: int, stop: int):
    indices, offsets = labels
    return indices[offsets[start] : offsets[stop]], offsets[start : stop + 1] - offsets[start]


def test_metrics_and_every_replicate_equal_the_definitions():
    scores, rows, labels, ids = problem()
    sums = RankingSums.from_scores(scores, labels, ids, num_replicates=7, seed=5)

    all_weights = np.vstack([np.ones(len(ids), dtype=np.uint8), poisson_weights(ids, 7, 5)])
    for replicate, weights in enumerate(all_weights):
        expected = reference(scores, rows, weights)
        assert {metric: sums.values(metric)[replicate] for metric in METRICS} == pytest.approx(expected)
    assert sums.num_unlabelled == sum(len(row) == 0 for row in rows) > 0


@pytest.mark.parametrize("cut", [1, 17, 59])
def test_sums_of_shards_in_any_order_are_the_same_bits(cut):
    scores, _, labels, ids = problem()
    whole = RankingSums.from_scores(scores, labels, ids, 20, 0)
    first = RankingSums.from_scores(scores[:cut], slice_labels(labels, 0, cut), ids[:cut], 20, 0)
    second = RankingSums.from_scores(scores[cut:], slice_labels(labels, cut, len(ids)), ids[cut:], 20, 0)

    for total in (first + second, second + first):
        np.testing.assert_array_equal(total.sums_RC, whole.sums_RC)
        assert total.finish() == whole.finish()
        assert total.num_unlabelled == whole.num_unlabelled


def test_many_small_chunks_equal_one(monkeypatch):
    scores, _, labels, ids = problem()
    whole = RankingSums.from_scores(scores, labels, ids, 20, 0)
    monkeypatch.setattr("hardmoe.evaluation.metrics._CHUNK_SCORES", 7 * scores.shape[1])
    np.testing.assert_array_equal(RankingSums.from_scores(scores, labels, ids, 20, 0).sums_RC, whole.sums_RC)


def test_equal_scores_rank_by_lower_index():
    scores = np.array([[0.0, 1.0, -0.0, 1.0, 0.0]], dtype=np.float32)
    assert top_tags(scores, 5).tolist() == [[1, 3, 0, 2, 4]]
    assert top_tags(scores, 2).tolist() == [[1, 3]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_ordered_keys_have_the_order_of_the_floats(dtype):
    values = np.array([-np.inf, -3.5, -1.0, -1e-7, 0.0, 1e-7, 0.5, 2.0, np.inf], dtype=dtype)
    keys = ordered_keys(values)
    assert (np.diff(keys.astype(object)) > 0).all()
    assert ordered_keys(np.array([-0.0], dtype=dtype)) == ordered_keys(np.array([0.0], dtype=dtype))


def test_finish_has_json_values_and_the_interval_contains_the_value():
    scores, _, labels, ids = problem()
    results = RankingSums.from_scores(scores, labels, ids, 200, 0).finish()
    assert set(results) == set(METRICS)
    assert json.loads(json.dumps(results)) == results
    assert all(result["low"] < result["value"] < result["high"] for result in results.values())


def test_too_few_tags_make_a_metric_null_and_say_why():
    scores, _, labels, ids = problem(num_tags=6)
    results = RankingSums.from_scores(scores, labels, ids, 10, 0).finish()
    assert results["precision@5"]["value"] is not None
    for metric in ("precision@10", "recall@10"):
        assert results[metric]["value"] is None
        assert results[metric]["reason"] == f"{metric} needs at least 10 tags, the vocabulary has 6"


def test_no_labelled_example_is_null_not_a_crash():
    scores = np.zeros((3, 12), dtype=np.float32)
    labels = (np.zeros(0, dtype=np.int64), np.zeros(4, dtype=np.int64))
    sums = RankingSums.from_scores(scores, labels, np.zeros((3, 16), dtype=np.uint8), 5, 0)
    assert sums.num_unlabelled == 3
    assert {result["reason"] for result in sums.finish().values()} == {"no example with a tag"}


def test_paired_difference_is_narrower_than_the_two_intervals():
    scores, _, labels, ids = problem(num_examples=400)
    better = scores.copy()
    for example in range(0, 400, 10):
        better[example, labels[0][labels[1][example] : labels[1][example + 1]]] += 9
    sums_a = RankingSums.from_scores(better, labels, ids, 300, 0)
    sums_b = RankingSums.from_scores(scores, labels, ids, 300, 0)

    result = paired_difference(sums_a, sums_b, "hit@5")

    assert result["value"] == pytest.approx(sums_a.values("hit@5")[0] - sums_b.values("hit@5")[0])
    assert 0 < result["low"] < result["value"] < result["high"]
    alone = sums_a.finish()["hit@5"]
    assert result["high"] - result["low"] < alone["high"] - alone["low"]
    assert paired_difference(sums_a, sums_a, "recall@10") == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_paired_difference_of_other_examples_or_seed_is_refused():
    scores, _, labels, ids = problem()
    sums = RankingSums.from_scores(scores, labels, ids, 10, 0)
    other_seed = RankingSums.from_scores(scores, labels, ids, 10, 1)
    with pytest.raises(ValueError, match="same examples"):
        paired_difference(sums, other_seed, "hit@1")


def test_bad_inputs_are_refused():
    scores, _, (indices, offsets), ids = problem()
    with pytest.raises(ValueError, match="NaN"):
        RankingSums.from_scores(scores * np.float32(np.nan), (indices, offsets), ids, 2, 0)
    with pytest.raises(ValueError, match="in \\[0, 25\\)"):
        RankingSums.from_scores(scores, (indices + 25, offsets), ids, 2, 0)
    with pytest.raises(ValueError, match="offsets"):
        RankingSums.from_scores(scores, (indices, offsets[:-1]), ids, 2, 0)
    with pytest.raises(ValueError, match="cannot be added"):
        a = RankingSums.from_scores(scores, (indices, offsets), ids, 2, 0)
        b = RankingSums.from_scores(scores, (indices, offsets), ids, 3, 0)
        _ = a + b
