"""Fitting the decoder: the arithmetic, the resume, and what the alignment is for."""

import json

import numpy as np
import pytest
import torch
from embedding_rows import embedding_rows

from hardmoe.data.resampling import batch_slice, epoch_order
from hardmoe.decoder.config import DecoderConfig
from hardmoe.decoder.embeddings import EmbeddingSet
from hardmoe.decoder.fit import fit
from hardmoe.decoder.objective import evaluate
from hardmoe.errors import DataError, HardmoeError
from hardmoe.hashing import derive_seed
from hardmoe.models.shared_decoder import DecoderForm, SharedDecoder
from hardmoe.storage import LocalStorage
from hardmoe.training.checkpoint import Checkpoints
from hardmoe.training.metrics_log import MetricsLog
from hardmoe.training.reporting import TrainingSinks

K, E, V = 3, 6, 8


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def some_rows(num_examples: int = 90, seed: int = 0):
    """Some examples have no label."""
    return embedding_rows(num_examples, E, V, seed, fewest_labels=0)


def start(align: str = "affine", dim: int | None = None) -> SharedDecoder:
    generator = torch.Generator().manual_seed(5)
    weight, bias = torch.randn(V, E, generator=generator), torch.randn(V, generator=generator)
    return SharedDecoder.initial(K, E, weight, bias, 0, DecoderForm(align, dim))


def start_of(config: DecoderConfig) -> SharedDecoder:
    form = DecoderForm(config.align, config.dim, config.rank, config.temperature)
    return SharedDecoder.initial(K, E, torch.ones(V, E), torch.zeros(V), 0, form)


def weights(model: SharedDecoder) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def numpy_fit(model: SharedDecoder, examples: EmbeddingSet, config: DecoderConfig, seed: int):
    """The whole fit in float64, gradients by hand, AdamW as in Loshchilov and Hutter (2019)."""
    p = {name: value.astype(np.float64) for name, value in weights(model).items()}
    mean, square = ({name: np.zeros_like(value) for name, value in p.items()} for _ in range(2))
    offsets = examples.label_offsets
    batches = -(-len(examples) // config.batch_size)
    total, step, epoch_losses = batches * config.epochs, 0, []
    for epoch in range(config.epochs):
        order = epoch_order(examples.ids_N16, derive_seed(seed, "decoder"), epoch)
        losses = []
        for index in range(batches):
            rows = order[batch_slice(len(examples), config.batch_size, index)]
            gradient = {name: np.zeros_like(value) for name, value in p.items()}
            for row in rows:
                h, e = examples.embeddings_NE[row].astype(np.float64), examples.experts_N[row]
                tags = examples.label_indices_L[offsets[row] : offsets[row + 1]]
                z = p["alignment.weight"][e] @ h + p["alignment.bias"][e]
                logits = p["decoder.weight"] @ z + p["decoder.bias"]
                probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
                target = np.bincount(tags, minlength=V) / len(tags)
                losses.append(-(target * np.log(probabilities)).sum())
                error = (probabilities - target) / len(rows)
                gradient["decoder.weight"] += np.outer(error, z)
                gradient["decoder.bias"] += error
                gradient["alignment.weight"][e] += np.outer(p["decoder.weight"].T @ error, h)
                gradient["alignment.bias"][e] += p["decoder.weight"].T @ error
            rate = config.learning_rate * 0.5 * (1 + np.cos(np.pi * step / total))
            step += 1
            for name in p:
                if name == "decoder.weight":
                    p[name] *= 1 - rate * config.weight_decay
                mean[name] = 0.9 * mean[name] + 0.1 * gradient[name]
                square[name] = 0.999 * square[name] + 0.001 * gradient[name] ** 2
                p[name] -= rate * (mean[name] / (1 - 0.9**step)) / (np.sqrt(square[name] / (1 - 0.999**step)) + 1e-8)
        epoch_losses.append(np.mean(losses))
    return p, epoch_losses


def test_fit_equals_a_float64_reference_written_by_hand():
    config = DecoderConfig(epochs=3, batch_size=25, learning_rate=0.02, weight_decay=0.1, dim=2 * E)
    examples = EmbeddingSet.from_rows(*some_rows())
    model = start(dim=2 * E)
    expected, losses = numpy_fit(model, examples.labelled(), config, seed=4)
    log = MetricsLog()

    result = fit(model, examples, None, config, seed=4, sinks=TrainingSinks(log=log))

    for name, value in weights(model).items():
        np.testing.assert_allclose(value, expected[name], atol=2e-4, err_msg=name)
    assert [row["loss"] for row in log.rows] == pytest.approx(losses, rel=1e-5)
    assert result.final_loss == log.rows[-1]["loss"]
    assert result.examples_seen == 3 * len(examples.labelled()) == log.rows[-1]["examples"]


def test_fit_does_not_depend_on_the_order_of_rows():
    ids, embeddings, experts, indices, offsets = some_rows()
    order = np.random.default_rng(1).permutation(len(ids))
    labels = [indices[offsets[row] : offsets[row + 1]] for row in order]
    shuffled = (ids[order], embeddings[order], experts[order], np.concatenate(labels), np.cumsum([0, *map(len, labels)]))
    config = DecoderConfig(epochs=2, batch_size=16)
    models = start(), start()

    fit(models[0], EmbeddingSet.from_rows(ids, embeddings, experts, indices, offsets), None, config, seed=0)
    fit(models[1], EmbeddingSet.from_rows(*shuffled), None, config, seed=0)

    assert_same_bits(weights(models[0]), weights(models[1]))


def test_renumbering_experts_only_permutes_the_alignment():
    ids, embeddings, experts, indices, offsets = some_rows()
    new_number = np.array([2, 0, 1], dtype=np.int32)
    config = DecoderConfig(epochs=3, batch_size=16)
    model, renumbered = start(), start()

    fit(model, EmbeddingSet.from_rows(ids, embeddings, experts, indices, offsets), None, config, seed=0)
    fit(renumbered, EmbeddingSet.from_rows(ids, embeddings, new_number[experts], indices, offsets), None, config, seed=0)

    expected = weights(model)
    for name, value in weights(renumbered).items():
        found = value[new_number] if name.startswith("alignment") else value
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=1e-6, err_msg=name)


class KilledError(Exception):
    pass


RESUMED = {
    "affine": {},
    "none": {"align": "none"},
    "cosine, sharded": {"align": "lowrank", "rank": 2, "temperature": 0.5, "classes": "sharded"},
    "one tag, sampled": {"align": "scale", "loss": "one_tag", "classes": "sampled", "sampled_tags": 3},
}


@pytest.mark.parametrize("killed_after", [2, 7, 11, 17])
@pytest.mark.parametrize("variant", RESUMED)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, killed_after, variant):
    training = EmbeddingSet.from_rows(*some_rows(seed=0))
    validation = EmbeddingSet.from_rows(*some_rows(seed=1, num_examples=40))
    config = DecoderConfig(epochs=3, batch_size=12, checkpoint_every_steps=3, **RESUMED[variant])

    def sinks(name: str, progress=None) -> TrainingSinks:
        return TrainingSinks(Checkpoints(LocalStorage(tmp_path / name), "checkpoints"), MetricsLog(), progress)

    def kill(progress):
        if progress.step == killed_after:
            raise KilledError

    whole, resumed = start_of(config), start_of(config)
    logs = [sinks("whole"), sinks("killed", lambda progress: steps.append(progress.step))]
    expected = fit(whole, training, validation, config, 0, logs[0])
    with pytest.raises(KilledError):
        fit(start_of(config), training, validation, config, 0, sinks("killed", kill))
    steps = []
    result = fit(resumed, training, validation, config, 0, logs[1])

    assert steps[0] == killed_after // 3 * 3 + 1
    assert_same_bits(weights(resumed), weights(whole))
    assert result == expected
    written = [sinks.log.to_bytes() for sinks in logs]
    assert written[0] == written[1]
    rows = [json.loads(line) for line in written[0].splitlines()]
    assert [row["epoch"] for row in rows if "validation_precision@1" in row] == [1, 2, 3]


def test_checkpoints_of_another_fit_are_not_taken_up(tmp_path, caplog):
    examples = EmbeddingSet.from_rows(*some_rows())
    checkpoints = Checkpoints(LocalStorage(tmp_path), "checkpoints")
    config = DecoderConfig(epochs=2, batch_size=12, checkpoint_every_steps=3)
    fit(start(), examples, None, config, 0, TrainingSinks(checkpoints))
    fresh, other = start(), start()

    fit(fresh, examples, None, config, seed=1)
    fit(other, examples, None, config, 1, TrainingSinks(checkpoints))

    assert "belong to another fit" in caplog.text
    assert_same_bits(weights(other), weights(fresh))


def rotated_blobs(num_examples: int, seed: int) -> EmbeddingSet:
    """One tag per blob; each expert sees the blobs through a rotation of its own."""
    means, generator = np.random.default_rng(0).normal(size=(V, E)) * 2.5, np.random.default_rng(seed)
    rotations = [np.linalg.qr(np.random.default_rng(9 + k).normal(size=(E, E)))[0] for k in range(K)]
    tags, experts = generator.integers(0, V, num_examples), generator.integers(0, K, num_examples)
    points = means[tags] + generator.normal(size=(num_examples, E))
    embeddings = np.stack([rotations[k] @ point for k, point in zip(experts, points, strict=True)])
    ids = generator.integers(0, 256, (num_examples, 16), dtype=np.uint8)
    offsets = np.arange(num_examples + 1)
    return EmbeddingSet.from_rows(ids, embeddings.astype(np.float16), experts.astype(np.int32), tags.astype(np.int32), offsets)


def test_affine_alignment_recovers_the_optimum_where_none_cannot():
    """The Bayes rule is the nearest mean once each expert's rotation is undone."""
    training, test = rotated_blobs(4000, seed=1), rotated_blobs(1000, seed=2)
    means = np.random.default_rng(0).normal(size=(V, E)) * 2.5
    rotations = [np.linalg.qr(np.random.default_rng(9 + k).normal(size=(E, E)))[0] for k in range(K)]
    undone = np.stack([rotations[k].T @ h for k, h in zip(test.experts_N, test.embeddings_NE.astype(float), strict=True)])
    nearest = ((undone[:, None] - means[None]) ** 2).sum(-1).argmin(1)
    optimum = (nearest == test.label_indices_L).mean()

    found = {}
    for align in ("affine", "none"):
        model = SharedDecoder.initial(K, E, torch.zeros(V, E), torch.zeros(V), 0, DecoderForm(align))
        fit(model, training, None, DecoderConfig(epochs=8, batch_size=64, learning_rate=0.05, align=align), seed=0)
        found[align] = evaluate(model, test).precision_at_1

    assert optimum > 0.95
    assert found["affine"] > optimum - 0.03
    assert found["none"] < optimum - 0.2


def mirrored_blobs(num_pairs: int, seed: int) -> EmbeddingSet:
    """Two tags at m and -m; expert 0 sees x, expert 1 sees x turned by half a circle, -x. Every x is there with its mirror image,
    for both experts."""
    generator = np.random.default_rng(seed)
    points = np.full(E, 0.8) + generator.normal(size=(num_pairs, E))
    seen = np.concatenate([points, -points, -points, points])  # (x, tag 0), (-x, tag 1) of expert 0; the same of expert 1
    experts, tags = np.repeat([0, 1], 2 * num_pairs), np.tile(np.repeat([0, 1], num_pairs), 2)
    ids = generator.integers(0, 256, (len(seen), 16), dtype=np.uint8)
    offsets = np.arange(len(seen) + 1)
    return EmbeddingSet.from_rows(ids, seen.astype(np.float16), experts.astype(np.int32), tags.astype(np.int32), offsets)


def test_without_alignment_no_linear_decoder_whatever_beats_chance_where_alignment_is_optimal():
    """Let d = w·h + b be the margin of tag 0. Of x and its mirror image as both experts see them, tag 0 is said rightly where
    w·x > -b and where w·x < b, tag 1 where w·x > b and where w·x < -b: always two of the four. So no w and b are right more often
    than half the time. The optimum is the sign of m·x, once expert 1's space has been turned back."""
    training, test = mirrored_blobs(500, seed=1), mirrored_blobs(250, seed=2)
    turned = np.where(test.experts_N == 0, 1, -1)[:, None] * test.embeddings_NE.astype(float)
    optimum = ((turned.sum(1) < 0) == test.label_indices_L).mean()
    found = {}
    for align in ("affine", "lowrank", "scale", "none"):
        rank = {"rank": 1} if align == "lowrank" else {}
        config = DecoderConfig(epochs=8, batch_size=64, learning_rate=0.1, align=align, **rank)
        weight = torch.randn(2, E, generator=torch.Generator().manual_seed(0))
        model = SharedDecoder.initial(2, E, weight, torch.zeros(2), 0, DecoderForm(align, rank=config.rank))
        fit(model, training, None, config, seed=0)
        found[align] = evaluate(model, test).precision_at_1
    assert optimum > 0.95
    assert found.pop("none") == 0.5
    assert min(found.values()) > optimum - 0.02, found


def test_sampling_every_tag_is_the_full_fit_to_the_bit():
    examples = EmbeddingSet.from_rows(*some_rows())
    models = start(), start()
    fit(models[0], examples, None, DecoderConfig(epochs=2, batch_size=16), seed=0)
    fit(models[1], examples, None, DecoderConfig(epochs=2, batch_size=16, classes="sampled", sampled_tags=V), seed=0)
    assert_same_bits(weights(models[1]), weights(models[0]))


def test_fitted_from_few_sampled_tags_the_decoder_is_nearly_as_good():
    training, test = rotated_blobs(4000, seed=1), rotated_blobs(1000, seed=2)
    found = {}
    for classes in ("full", "sampled"):
        extra = {"sampled_tags": 2} if classes == "sampled" else {}
        model = SharedDecoder.initial(K, E, torch.zeros(V, E), torch.zeros(V), 0)
        config = DecoderConfig(epochs=1, batch_size=4, learning_rate=0.02, classes=classes, **extra)
        fit(model, training, None, config, seed=0)
        found[classes] = evaluate(model, test).precision_at_1
    assert found["full"] > 0.9
    assert found["sampled"] > found["full"] - 0.02


def test_bad_rows_are_refused():
    ids, embeddings, experts, indices, offsets = some_rows()
    with pytest.raises(ValueError, match="different numbers"):
        EmbeddingSet.from_rows(ids[:-1], embeddings, experts, indices, offsets)
    ids[0] = ids[1]
    with pytest.raises(ValueError, match="twice"):
        EmbeddingSet.from_rows(ids, embeddings, experts, indices, offsets)


def test_impossible_fits_are_refused():
    ids, embeddings, experts, indices, offsets = some_rows()
    none = EmbeddingSet.from_rows(ids, embeddings, experts, indices[:0], np.zeros_like(offsets))
    with pytest.raises(DataError, match="no training example has a tag"):
        fit(start(), none, None, DecoderConfig(), 0)
    with pytest.raises(ValueError, match=r"experts must be in \[0, 3\)"):
        fit(start(), EmbeddingSet.from_rows(ids, embeddings, experts + 1, indices, offsets), None, DecoderConfig(), 0)
    with pytest.raises(ValueError, match=r"tag indices must be in \[0, 8\)"):
        fit(start(), EmbeddingSet.from_rows(ids, embeddings, experts, indices + 1, offsets), None, DecoderConfig(), 0)
    with pytest.raises(HardmoeError, match=r"loss became nan in epoch 1 of 6; lower decoder\.learning_rate"):
        examples = EmbeddingSet.from_rows(ids, embeddings, experts, indices, offsets)
        fit(start(), examples, None, DecoderConfig(learning_rate=1e36, batch_size=8), 0)
    row = int(np.argmax(np.diff(offsets)))
    embeddings[row, 2] = np.inf
    with pytest.raises(DataError, match=f"{ids[row].tobytes().hex()} is not finite: expert {experts[row]} diverged"):
        fit(start(), EmbeddingSet.from_rows(ids, embeddings, experts, indices, offsets), None, DecoderConfig(), 0)


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].tobytes() == expected[name].tobytes(), name
