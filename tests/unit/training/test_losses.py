"""The loss against float64 NumPy and torch's own."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from hardmoe.training.losses import softmax_cross_entropy_multi


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
