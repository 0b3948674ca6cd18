"""Every variant's loss and gradients against NumPy in float64; what sampling leaves unbiased; shards equal to the whole."""

from itertools import product

import numpy as np
import pytest
import torch
from embedding_rows import embedding_rows

from hardmoe.decoder import objective as objective_module
from hardmoe.decoder.config import DecoderConfig
from hardmoe.decoder.embeddings import EmbeddingSet
from hardmoe.decoder.linear_loss import SHARD_TAGS, BatchLabels, LossForm, linear_loss
from hardmoe.decoder.objective import Objective, evaluate
from hardmoe.decoder.optimizer import DecoderOptimizer
from hardmoe.decoder.sampling import ChosenTags, TagSampler, inclusion_probabilities
from hardmoe.models.shared_decoder import DecoderForm, SharedDecoder

K, E, V, B = 3, 4, 9, 7


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def batch_of(num_examples: int = B, tags: int = V) -> EmbeddingSet:
    return EmbeddingSet.from_rows(*embedding_rows(num_examples, E, tags))


def model_of(form: DecoderForm, tags: int = V) -> SharedDecoder:
    """Every parameter random, so that none has a gradient of zero by chance."""
    generator = torch.Generator().manual_seed(3)
    model = SharedDecoder.initial(K, E, torch.randn(tags, E, generator=generator), torch.zeros(tags), 0, form)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def numpy_loss(p, batch: EmbeddingSet, loss: str, drawn_B, chosen: ChosenTags) -> float:
    """The mean loss, from the definitions."""
    total = 0.0
    for row in range(len(batch)):
        h, e = batch.embeddings_NE[row].astype(np.float64), batch.experts_N[row]
        if "alignment.shared" in p:
            z = p["alignment.shared"] @ h + p["alignment.left"][e] @ (p["alignment.right"][e] @ h) + p["alignment.bias"][e]
        elif "alignment.weight" in p:
            weight = p["alignment.weight"][e]
            z = (weight @ h if weight.ndim == 2 else weight * h) + p["alignment.bias"][e]
        else:
            z = h
        logits = p["decoder.weight"] @ z
        if "decoder.log_scale" in p:
            logits = np.exp(p["decoder.log_scale"]) * logits / np.linalg.norm(z) / np.linalg.norm(p["decoder.weight"], axis=1)
        logits = (logits + p["decoder.bias"])[chosen.tags_T]
        tags = batch.label_indices_L[batch.label_offsets[row] : batch.label_offsets[row + 1]]
        if loss == "one_tag":
            tags = tags[[int(drawn_B[row] * len(tags))]]
        is_target = np.isin(chosen.tags_T, tags)
        if loss == "sigmoid":
            probabilities = 1 / (1 + np.exp(-logits))
            terms = -np.where(is_target, np.log(probabilities), np.log(1 - probabilities))
            total += (terms / chosen.probabilities_T).sum()
        else:
            total += np.log((np.exp(logits) / chosen.probabilities_T).sum()) - logits[is_target].mean()
    return total / len(batch)


def numerical_gradients(p, *arguments):
    gradients, step = {}, 1e-5
    for name, value in p.items():
        gradients[name] = np.zeros_like(value)
        for at in np.ndindex(value.shape):
            ends = []
            for sign in (1, -1):
                moved = {**p, name: value.copy()}
                moved[name][at] += sign * step
                ends.append(numpy_loss(moved, *arguments))
            gradients[name][at] = (ends[0] - ends[1]) / (2 * step)
    return gradients


def loss_and_gradients(found: Objective, batch: EmbeddingSet, step: int = 0) -> tuple[float, dict[str, np.ndarray]]:
    loss, rows = found.loss(batch, step)
    torch.autograd.backward(loss)
    parameters = dict(found.model.named_parameters())
    gradients = {name: np.zeros(value.shape) for name, value in parameters.items()}
    for name, value in parameters.items():
        if value.grad is not None:
            gradients[name] = value.grad.double().numpy().copy()
            value.grad = None
    for name, value in (rows.by_name() if rows else {}).items():
        gradients[name][rows.tags_T.numpy()] = value.grad.double().numpy()
    return loss.item(), gradients


EVERY = ChosenTags(np.arange(V), np.ones(V))
ALIGN = {"affine": {"dim": 6}, "lowrank": {"dim": 6, "rank": 2}, "scale": {}, "none": {}}


@pytest.mark.parametrize("temperature", [None, 0.4])
@pytest.mark.parametrize("align", ALIGN)
def test_loss_and_gradients_of_every_variant_equal_a_float64_reference(monkeypatch, align, temperature):
    monkeypatch.setattr(objective_module, "SHARD_TAGS", 4)  # 9 tags in shards of 4, 4 and 1
    batch, form = batch_of(), DecoderForm(align, temperature=temperature, **ALIGN[align])
    for loss, classes in product(("softmax", "one_tag", "sigmoid"), ("full", "sharded", "sampled")):
        extra = {"sampled_tags": 4} if classes == "sampled" else {}
        config = DecoderConfig(align=align, temperature=temperature, loss=loss, classes=classes, **ALIGN[align], **extra)
        found = Objective.of(model_of(form), config, 5, batch)
        drawn_B = objective_module.hash_fractions(batch.ids_N16, 5, "one_tag", 2)
        chosen = EVERY
        if found.sampler is not None:
            chosen = found.sampler.choose(found._targets(batch, 2).indices_L.numpy(), 2)
            assert len(chosen.tags_T) < V or loss != "one_tag", "the step must leave something out"
        p = {name: value.detach().double().numpy() for name, value in found.model.named_parameters()}

        value, gradients = loss_and_gradients(found, batch, step=2)

        arguments = (batch, loss, drawn_B, chosen)
        assert value == pytest.approx(numpy_loss(p, *arguments), rel=1e-5), (loss, classes)
        for name, expected in numerical_gradients(p, *arguments).items():
            np.testing.assert_allclose(gradients[name], expected, rtol=1e-3, atol=2e-5, err_msg=f"{loss} {classes} {name}")


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_sharded_equals_full_in_loss_and_gradients(loss):
    """More tags than one shard holds, and the last shard a small one."""
    tags, batch = 2 * SHARD_TAGS + 5, batch_of(num_examples=64, tags=2 * SHARD_TAGS + 5)
    found = {}
    for classes in ("full", "sharded"):
        config = DecoderConfig(loss=loss, classes=classes)
        found[classes] = loss_and_gradients(Objective.of(model_of(DecoderForm(), tags), config, 0, batch), batch)
    assert found["sharded"][0] == pytest.approx(found["full"][0], rel=1e-5)
    for name, expected in found["full"][1].items():
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(found["sharded"][1][name], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


class _Given:
    """A sampler that draws what it is told."""

    def __init__(self, drawn: ChosenTags) -> None:
        self.drawn = drawn

    def choose(self, labels_L, step) -> ChosenTags:
        return self.drawn


def test_sampled_normaliser_and_its_gradient_are_unbiased_and_so_is_the_sigmoid_loss():
    """Over all 2^6 samples with their probabilities, of an example that has three of the nine tags."""
    examples = batch_of()
    batch = examples.take(np.flatnonzero(np.diff(examples.label_offsets) == 3)[:1])
    own = batch.label_indices_L
    assert len(own) == 3
    others = np.setdiff1d(np.arange(V), own)
    pi_V = np.ones(V)
    pi_V[others] = np.linspace(0.15, 0.9, len(others))
    model = model_of(DecoderForm())

    def outcome(loss: str, sampler):
        config = DecoderConfig(loss=loss, classes="sampled" if sampler else "full")
        value, gradients = loss_and_gradients(Objective(model, config, 0, sampler), batch)
        return value, np.concatenate([gradients[name].ravel() for name in sorted(gradients)])

    full = {loss: outcome(loss, None) for loss in ("softmax", "sigmoid")}
    positive = outcome("softmax", _Given(ChosenTags(np.sort(own), np.ones(3))))
    mean_z, mean_z_gradient, mean_log = 0.0, 0.0, 0.0
    mean_sigmoid, mean_sigmoid_gradient = 0.0, 0.0
    for drawn in product((False, True), repeat=len(others)):
        tags = np.sort(np.concatenate([own, others[list(drawn)]]))
        chance = np.prod(np.where(drawn, pi_V[others], 1 - pi_V[others]))
        sampler = _Given(ChosenTags(tags, pi_V[tags]))
        value, gradient = outcome("softmax", sampler)
        # exp(loss) is Z' times exp(-mean of the own logits), which is the same in every sample and in the full loss.
        mean_z += chance * np.exp(value)
        mean_z_gradient += chance * np.exp(value) * gradient
        mean_log += chance * value
        value, gradient = outcome("sigmoid", sampler)
        mean_sigmoid += chance * value
        mean_sigmoid_gradient += chance * gradient

    assert mean_z == pytest.approx(np.exp(full["softmax"][0]), rel=1e-5)
    np.testing.assert_allclose(mean_z_gradient, np.exp(full["softmax"][0]) * full["softmax"][1], rtol=1e-4, atol=1e-4)
    assert mean_log < full["softmax"][0], "Jensen: the loss itself is estimated from below"
    assert positive[0] < mean_log, "and a sample of nothing but the own tags would be far off"
    assert mean_sigmoid == pytest.approx(full["sigmoid"][0], rel=1e-5)
    np.testing.assert_allclose(mean_sigmoid_gradient, full["sigmoid"][1], rtol=1e-4, atol=1e-5)


def test_tags_are_drawn_as_often_as_said_independently_and_by_hash():
    counts_V = np.array([1000, 400, 90, 30, 12, 5, 3, 0, 0])
    sampler, labels = TagSampler(counts_V, 4, seed=1), np.array([7, 7, 2])
    steps = 4000
    drawn_SV = np.zeros((steps, V), bool)
    for step in range(steps):
        chosen = sampler.choose(labels, step)
        assert (np.diff(chosen.tags_T) > 0).all()
        drawn_SV[step, chosen.tags_T] = True
    expected_V = inclusion_probabilities(counts_V, 4)
    assert expected_V.sum() == pytest.approx(4)
    assert chosen.probabilities_T[np.searchsorted(chosen.tags_T, 7)] == 1
    expected_V[[2, 7]] = 1
    errors_V = np.sqrt(expected_V * (1 - expected_V) / steps)
    assert (np.abs(drawn_SV.mean(0) - expected_V) <= 4 * errors_V + 1e-12).all()
    free = [3, 4, 5, 6, 8]
    correlations = np.corrcoef(drawn_SV[:, free].T) - np.eye(len(free))
    assert np.abs(correlations).max() < 4 / np.sqrt(steps)

    def first(seed: int) -> list[list[int]]:
        return [TagSampler(counts_V, 4, seed).choose(labels, step).tags_T.tolist() for step in range(20)]

    assert first(1) == [np.flatnonzero(row).tolist() for row in drawn_SV[:20]]
    assert first(2) != first(1)


@pytest.mark.parametrize("sampled_tags", [1, 3, 5, 8, 9, 20])
def test_inclusion_probabilities_are_cut_proportions(sampled_tags):
    counts_V = np.array([0, 500, 2, 90, 7, 7, 1, 0, 60])
    found_V = inclusion_probabilities(counts_V, sampled_tags)
    assert found_V.sum() == pytest.approx(min(sampled_tags, V))
    assert 0 < found_V.min() <= found_V.max() <= 1
    ratios = (found_V / (counts_V + 1))[found_V < 1]
    assert np.allclose(ratios, ratios[:1])
    assert (found_V[found_V < 1, None] <= 1).all()


def test_rows_that_are_not_computed_stay_as_they_are():
    model, batch = model_of(DecoderForm()), batch_of(num_examples=2)
    before = model.decoder.weight.detach().clone()
    found = Objective.of(model, DecoderConfig(classes="sampled", sampled_tags=1, weight_decay=0.1), 0, batch)
    optimizer = DecoderOptimizer(model, weight_decay=0.1)
    loss, rows = found.loss(batch, 0)
    torch.autograd.backward(loss)
    optimizer.step(1, 0.01, rows)
    left = np.setdiff1d(np.arange(V), rows.tags_T.numpy())
    assert 0 < len(left) < V
    assert torch.equal(model.decoder.weight[left], before[left])
    assert (model.decoder.weight[rows.tags_T] != before[rows.tags_T]).all()
    assert (optimizer.squares["decoder.weight"][left] == 0).all()


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_scores_do_not_depend_on_the_shards(monkeypatch, loss):
    model, examples = model_of(DecoderForm()), batch_of(num_examples=40)
    whole = evaluate(model, examples, loss)
    monkeypatch.setattr(objective_module, "SHARD_TAGS", 4)
    shards = evaluate(model, examples, loss)
    assert shards.precision_at_1 == whole.precision_at_1
    assert shards.loss == pytest.approx(whole.loss, rel=1e-12)
    p = {name: value.detach().double().numpy() for name, value in model.named_parameters()}
    assert whole.loss == pytest.approx(numpy_loss(p, examples, loss, None, EVERY), rel=1e-6)


def test_the_earlier_of_two_equal_logits_is_the_best(monkeypatch):
    monkeypatch.setattr(objective_module, "SHARD_TAGS", 4)
    model = SharedDecoder(torch.zeros(V, E), torch.tensor([0, 0, 1, 0, 0, 0, 1, 0, 0.0]))
    examples = batch_of(num_examples=30)
    ends = examples.label_offsets
    has_tag = [2 in examples.label_indices_L[ends[row] : ends[row + 1]] for row in range(len(examples))]
    assert evaluate(model, examples).precision_at_1 == np.mean(has_tag)


def test_gradient_is_that_of_the_loss_times_what_comes_from_outside():
    """The loss as part of another: its own backward pass must hand on the factor."""
    generator = torch.Generator().manual_seed(0)
    points, weight, bias = (torch.randn(s, generator=generator, requires_grad=True) for s in ((B, E), (V, E), (V,)))
    labels = BatchLabels(torch.arange(B), torch.arange(B), torch.ones(B))
    for shard in (None, 4):
        plain = torch.autograd.grad(linear_loss(points, weight, bias, labels, LossForm(False, shard)), (points, weight, bias))
        tripled = torch.autograd.grad(
            3 * linear_loss(points, weight, bias, labels, LossForm(False, shard)), (points, weight, bias)
        )
        for a, b in zip(plain, tripled, strict=True):
            torch.testing.assert_close(3 * a, b)
