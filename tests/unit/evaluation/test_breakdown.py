"""Calibration and frequency bands against loops over images."""

import numpy as np
import pytest

from hardmoe.evaluation.breakdown import BANDS, BINS, Breakdown, frequency_bands


def batch(count: int, tags: int, seed: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(count, tags))
    scores = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)
    labels = [np.sort(rng.choice(tags, rng.integers(0, 4), replace=False)) for _ in range(count)]
    return scores, (np.concatenate(labels).astype(np.int32), np.cumsum([0, *map(len, labels)]).astype(np.int64))


def test_sums_are_those_of_a_loop_and_add_up() -> None:
    counts = np.random.default_rng(0).zipf(1.5, 30).clip(max=1000).astype(np.int64)
    bands = frequency_bands(counts)
    scores, (indices, offsets) = batch(400, 30, seed=1)
    half = offsets[200]
    first = Breakdown.of(scores[:200], (indices[:half], offsets[:201]), bands)
    second = Breakdown.of(scores[200:], (indices[half:], offsets[200:] - half), bands)
    found = (first + second).results(bands)
    whole = Breakdown.of(scores, (indices, offsets), bands)
    assert whole.results(bands) == found
    bins, recalled = [[] for _ in range(BINS)], [[] for _ in range(BANDS)]
    for row, score in enumerate(scores):
        tags = indices[offsets[row] : offsets[row + 1]].tolist()
        if tags:
            best = np.argsort(-score, kind="stable")
            sure = float(np.exp(float(score[best[0]])))
            bins[min(int(sure * BINS), BINS - 1)].append((sure, best[0] in tags))
            for tag in tags:
                recalled[bands[tag]].append(tag in best[:10])
    images = sum(map(len, bins))
    error = sum(abs(sum(right for _, right in some) - sum(sure for sure, _ in some)) for some in bins)
    assert found["calibration_error"] == pytest.approx(error / images, abs=6e-5)
    for told, some in zip(found["bins"], bins, strict=True):
        assert (told is None) == (not some)
        if told is not None:
            assert told == {"images": len(some), **{k: pytest.approx(v, abs=6e-5) for k, v in _means(some).items()}}
    for band, told in enumerate(found["frequency_bands"]):
        share = np.mean(recalled[band]) if recalled[band] else None
        assert told == {"tags": int((bands == band).sum()), "labels": len(recalled[band]), "recall@10": pytest.approx(share)}


def _means(some: list[tuple[float, bool]]) -> dict[str, float]:
    return {"right": float(np.mean([right for _, right in some])), "probability": float(np.mean([sure for sure, _ in some]))}


def test_bands_hold_a_fifth_of_the_labels_each_the_most_frequent_first() -> None:
    counts = np.array([1, 50, 2, 50, 100, 3, 40, 4, 50, 100])
    bands = frequency_bands(counts)
    assert bands[[4, 9]].tolist() == [0, 1]
    assert bands[np.argsort(-counts, kind="stable")].tolist() == sorted(bands.tolist())
    assert frequency_bands(np.zeros(3, np.int64)).tolist() == [0, 0, 0]
    assert frequency_bands(np.ones(10, np.int64)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_perfectly_calibrated_system_has_no_error_and_a_sure_wrong_one_all_of_it() -> None:
    scores = np.log(np.tile([0.5, 0.5 - 1e-6, 1e-6], (10, 1))).astype(np.float32)
    labels = (np.array([0, 1] * 5, np.int32), np.arange(11))
    bands = np.zeros(3, np.int64)
    assert Breakdown.of(scores, labels, bands).results(bands)["calibration_error"] == pytest.approx(0.0, abs=6e-5)
    sure = np.log(np.tile([1 - 2e-9, 1e-9, 1e-9], (10, 1))).astype(np.float32)
    wrong = (np.full(10, 2, np.int32), np.arange(11))
    assert Breakdown.of(sure, wrong, bands).results(bands)["calibration_error"] == pytest.approx(1.0, abs=6e-5)
