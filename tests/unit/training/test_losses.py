"""The loss against float64 NumPy and torch's own."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from hardmoe.data.loader import ExampleSet, SparseTargets, TrainingBatch
from hardmoe.training.config import TrainingConfig
from hardmoe.training.losses import (
    TagLoss,
    build_loss,
    inverse_sqrt_weights,
    one_tag_each,
    sigmoid_cross_entropy,
    softmax_cross_entropy_multi,
    start_from_shares,
)

CPU = torch.device("cpu")


@pytest.fixture
def logits_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    chance = np.random.default_rng(0)
    targets = np.zeros((9, 30))
    for row in targets:
        row[chance.choice(30, chance.integers(1, 6), replace=False)] = 1
    targets /= targets.sum(axis=1, keepdims=True)
    return torch.tensor(chance.normal(0, 20, (9, 30)), dtype=torch.float32), torch.tensor(targets, dtype=torch.float32)


def test_softmax_cross_entropy_multi_equals_the_formula_in_float64(logits_and_targets: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, targets = (tensor.double().numpy() for tensor in logits_and_targets)
    log_sum = np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True)) + logits.max(
        axis=1, keepdims=True
    )
    expected = -(targets * (logits - log_sum)).sum(axis=1).mean()
    assert softmax_cross_entropy_multi(*logits_and_targets).item() == pytest.approx(expected, rel=1e-6)


def test_softmax_cross_entropy_multi_has_the_gradient_softmax_minus_target(
    logits_and_targets: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits, targets = logits_and_targets
    logits.requires_grad_()
    softmax_cross_entropy_multi(logits, targets).backward()
    np.testing.assert_allclose(logits.grad, (logits.detach().softmax(dim=1) - targets) / 9, atol=1e-7)


def test_softmax_cross_entropy_multi_with_one_tag_each_is_torchs_cross_entropy() -> None:
    logits, classes = torch.linspace(-3, 3, 20).reshape(4, 5), torch.tensor([0, 4, 2, 2])
    found = softmax_cross_entropy_multi(logits, functional.one_hot(classes, 5).float())
    assert found.item() == pytest.approx(functional.cross_entropy(logits, classes).item())


def test_softmax_cross_entropy_multi_of_bfloat16_logits_is_computed_in_float32() -> None:
    logits, targets = torch.zeros(2, 1000, dtype=torch.bfloat16), torch.full((2, 1000), 1e-3)
    loss = softmax_cross_entropy_multi(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(np.log(1000), rel=1e-5)


def test_softmax_cross_entropy_multi_refuses_shapes_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\].*\[1, 3\]"):
        softmax_cross_entropy_multi(torch.zeros(2, 3), torch.zeros(1, 3))


def test_softmax_cross_entropy_multi_with_weights_is_torchs_without_its_renormalisation(
    logits_and_targets: tuple[torch.Tensor, torch.Tensor],
) -> None:
    weights = torch.linspace(0.5, 3, 30)
    expected = functional.cross_entropy(*logits_and_targets, weight=weights)
    assert softmax_cross_entropy_multi(*logits_and_targets, weights).item() == pytest.approx(expected.item(), rel=1e-5)


def test_sigmoid_cross_entropy_equals_the_formula_in_float64(logits_and_targets: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, targets = logits_and_targets[0] / 5, (logits_and_targets[1] > 0).float()
    weights = torch.linspace(0.5, 3, 30)
    probabilities = 1 / (1 + np.exp(-logits.double().numpy()))
    present = targets.numpy() > 0
    terms = -np.log(np.where(present, probabilities, 1 - probabilities))
    assert sigmoid_cross_entropy(logits, targets).item() == pytest.approx(terms.sum(axis=1).mean(), rel=1e-5)
    expected = (terms * weights.numpy()).sum(axis=1).mean()
    assert sigmoid_cross_entropy(logits, targets, weights).item() == pytest.approx(expected, rel=1e-5)


def test_sigmoid_cross_entropy_has_the_gradient_probability_minus_target(
    logits_and_targets: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits, targets = logits_and_targets[0].requires_grad_(), (logits_and_targets[1] > 0).float()
    sigmoid_cross_entropy(logits, targets).backward()
    np.testing.assert_allclose(logits.grad, (logits.detach().sigmoid() - targets) / 9, atol=1e-7)


def test_sigmoid_cross_entropy_refuses_shapes_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\].*\[1, 3\]"):
        sigmoid_cross_entropy(torch.zeros(2, 3), torch.zeros(1, 3))


LABELS = [[0], [1, 2], [0, 2, 3], [2]]


def make_batch(ids_seed: int = 0) -> TrainingBatch:
    ids = np.random.default_rng(ids_seed).integers(0, 256, (4, 16), dtype=np.uint8)
    offsets = np.cumsum([0, *map(len, LABELS)])
    targets = SparseTargets.from_rows(np.array([tag for tags in LABELS for tag in tags], np.int32), offsets)
    return TrainingBatch(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), targets, ids)


def make_examples() -> ExampleSet:
    batch = make_batch()
    offsets = np.cumsum([0, *map(len, LABELS)])
    indices = batch.targets.indices_L.numpy().astype(np.int32)
    return ExampleSet(batch.ids_B16, batch.images_B3SS.numpy(), np.arange(4), indices, offsets)


def test_targets_of_each_loss_by_hand() -> None:
    softmax = TagLoss("softmax", 0).targets(make_batch(), 0, 5, CPU)
    np.testing.assert_allclose(softmax[2], [1 / 3, 0, 1 / 3, 1 / 3, 0])
    sigmoid = TagLoss("sigmoid", 0).targets(make_batch(), 0, 5, CPU)
    np.testing.assert_array_equal(sigmoid, [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [1, 0, 1, 1, 0], [0, 0, 1, 0, 0]])
    smoothed = TagLoss("softmax", 0, smoothing=0.2).targets(make_batch(), 0, 5, CPU)
    np.testing.assert_allclose(smoothed[1], [0.04, 0.44, 0.44, 0.04, 0.04], rtol=1e-6)


def test_one_tag_draws_one_of_an_images_own_tags_as_often_as_any_other() -> None:
    loss, batch = TagLoss("one_tag", 7), make_batch()
    drawn = torch.stack([loss.targets(batch, step, 5, CPU) for step in range(3000)])
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert (drawn.sum(dim=2) == 1).all()
    shares = drawn.double().mean(dim=0).numpy()
    expected = TagLoss("softmax", 0).targets(batch, 0, 5, CPU).numpy()
    # Five standard deviations of a share of 3,000 draws.
    np.testing.assert_allclose(shares, expected, atol=5 * np.sqrt(0.25 / 3000))
    assert (shares[expected == 0] == 0).all()


def test_one_tag_depends_on_the_example_and_not_on_its_place_in_the_batch() -> None:
    batch, loss = make_batch(), TagLoss("one_tag", 7)
    order = [2, 0, 3, 1]
    offsets = np.cumsum([0, *(len(LABELS[row]) for row in order)])
    indices = np.array([tag for row in order for tag in LABELS[row]], np.int32)
    shuffled = TrainingBatch(batch.images_B3SS, SparseTargets.from_rows(indices, offsets), batch.ids_B16[order])
    for step in range(20):
        assert torch.equal(loss.targets(shuffled, step, 5, CPU), loss.targets(batch, step, 5, CPU)[order])


def test_one_tag_at_both_ends_of_the_hash() -> None:
    targets = make_batch().targets
    assert one_tag_each(targets, np.zeros(4)).indices_L.tolist() == [0, 1, 0, 2]
    assert one_tag_each(targets, np.full(4, 1 - 2.0**-53)).indices_L.tolist() == [0, 2, 3, 2]


def test_inverse_sqrt_weights_are_one_on_average_over_the_labels() -> None:
    counts = np.array([100, 4, 1, 0])
    weights = inverse_sqrt_weights(counts).numpy()
    np.testing.assert_allclose(weights / weights[0], [1, 5, 10, 10], rtol=1e-6)
    assert (weights * counts).sum() == pytest.approx(105, rel=1e-6)
    built = build_loss(TrainingConfig(class_weights="inverse_sqrt"), make_examples(), 5, 0, CPU).weights_V
    assert built is not None
    np.testing.assert_allclose(built / built[2], np.sqrt(3) / np.sqrt([2, 1, 3, 1, 1]), rtol=1e-6)
    assert build_loss(TrainingConfig(), make_examples(), 5, 0, CPU).weights_V is None


def test_decoder_that_starts_from_shares_predicts_them() -> None:
    decoder = nn.Linear(3, 5)
    start_from_shares(decoder, make_examples())
    np.testing.assert_allclose(torch.sigmoid(decoder.bias.detach()), (np.array([2, 1, 3, 1, 0]) + 0.5) / 5, rtol=1e-6)
