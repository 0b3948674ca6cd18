"""LAMB against the paper's algorithm written out in float64 NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from hardmoe.training.config import TrainingConfig
from hardmoe.training.lamb import Lamb
from hardmoe.training.optim import build_optimizer, set_learning_rate

LAMB = TrainingConfig(optimizer="lamb", learning_rate=0.01, momentum=0.8, beta2=0.95, weight_decay=0.1)


def lamb_step(weight: np.ndarray, gradients: list[np.ndarray], decay: float, rate: float, adapt: bool) -> np.ndarray:
    """One step, from all gradients so far: the averages as explicit sums, not as recursions."""
    num = len(gradients)
    mean = sum(0.2 * 0.8 ** (num - 1 - at) * gradient for at, gradient in enumerate(gradients)) / (1 - 0.8**num)
    square = sum(0.05 * 0.95 ** (num - 1 - at) * gradient**2 for at, gradient in enumerate(gradients)) / (1 - 0.95**num)
    update = mean / (np.sqrt(square) + 1e-6) + decay * weight
    ratio = np.linalg.norm(weight) / np.linalg.norm(update) if adapt and np.any(weight) and np.any(update) else 1.0
    return weight - rate * ratio * update


def test_lamb_is_the_papers_algorithm_on_matrices_and_plain_adam_on_biases() -> None:
    chance = np.random.default_rng(0)
    model = nn.Linear(4, 3)
    optimizer = build_optimizer(model, LAMB)
    assert isinstance(optimizer, Lamb)
    weights = {name: parameter.detach().double().numpy().copy() for name, parameter in model.named_parameters()}
    gradients: dict[str, list[np.ndarray]] = {"weight": [], "bias": []}
    for step in range(5):
        set_learning_rate(optimizer, 0.1 / (step + 1))
        for name, parameter in model.named_parameters():
            gradients[name].append(chance.normal(size=tuple(parameter.shape)))
            parameter.grad = torch.tensor(gradients[name][-1], dtype=torch.float32)
            matrix = name == "weight"
            weights[name] = lamb_step(weights[name], gradients[name], 0.1 if matrix else 0.0, 0.1 / (step + 1), matrix)
        optimizer.step()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=1e-4, atol=1e-6)


def test_lamb_moves_weights_that_are_zero_as_adam_would() -> None:
    """Their length is no measure of a step: at a ratio of 0 they would stay zero for ever."""
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = Lamb([{"params": [weight], "lr": 0.1}], (0.9, 0.999))
    weight.grad = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    optimizer.step()
    np.testing.assert_allclose(weight.detach().numpy(), [[-0.1, 0.1], [-0.1, 0.1]], rtol=1e-4)


def test_lamb_leaves_parameters_without_a_gradient_and_counts_each_ones_own_steps() -> None:
    early, late = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([{"params": [early, late], "lr": 0.1}], (0.9, 0.999))
    for late_too in (False, True):
        early.grad = torch.ones(2, 2)
        late.grad = torch.ones(2, 2) if late_too else None
        optimizer.step()
        if not late_too:
            assert torch.equal(late.detach(), torch.ones(2, 2))
    # A constant gradient: mean / root of the mean square is 1, and the step is a tenth of the weight's own length.
    np.testing.assert_allclose(late.detach().numpy(), 0.9, rtol=1e-4)
    np.testing.assert_allclose(early.detach().numpy(), 0.81, rtol=1e-4)


def test_lamb_refuses_a_closure() -> None:
    with pytest.raises(ValueError, match="closure"):
        Lamb([{"params": [nn.Parameter(torch.ones(1))]}], (0.9, 0.999)).step(lambda: 0.0)
