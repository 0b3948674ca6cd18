"""The schedule against torch's, the optimiser against the formulas."""

import numpy as np
import pytest
import torch
from torch import nn, optim

from hardmoe.training.config import TrainingConfig
from hardmoe.training.optim import build_optimizer, learning_rate_at, set_learning_rate


def test_learning_rate_without_warmup_is_torchs_cosine() -> None:
    config = TrainingConfig(learning_rate=0.3, warmup_fraction=0)
    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for step in range(50):
        assert learning_rate_at(step, 50, config) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_learning_rate_rises_linearly_to_the_peak_then_falls_to_nothing() -> None:
    config = TrainingConfig(learning_rate=0.2, warmup_fraction=0.1)
    rates = [learning_rate_at(step, 100, config) for step in range(100)]
    assert rates[:11] == pytest.approx(np.arange(1, 12) * 0.2 / 11)
    assert max(rates) == rates[10] == 0.2
    assert all(np.diff(rates[10:]) < 0)
    assert 0 < rates[-1] < 1e-3
    assert learning_rate_at(100, 100, config) == 0


def test_learning_rate_is_proportional_to_the_batch_size() -> None:
    half = learning_rate_at(3, 10, TrainingConfig(batch_size=128))
    assert half == pytest.approx(learning_rate_at(3, 10, TrainingConfig(batch_size=256)) / 2)


@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_learning_rate_of_the_shortest_trainings_is_positive(total_steps: int) -> None:
    assert all(learning_rate_at(step, total_steps, TrainingConfig()) > 0 for step in range(total_steps))


def test_optimizer_follows_nesterovs_formula_and_decays_matrices_only() -> None:
    config = TrainingConfig(momentum=0.9, weight_decay=0.1)
    model = nn.Linear(2, 3)
    weights = {name: parameter.detach().double().numpy().copy() for name, parameter in model.named_parameters()}
    momentum = {name: np.zeros_like(value) for name, value in weights.items()}
    optimizer = build_optimizer(model, config)
    chance = np.random.default_rng(0)
    for step in range(4):
        set_learning_rate(optimizer, 0.5 / (step + 1))
        for name, parameter in model.named_parameters():
            gradient = chance.normal(size=tuple(parameter.shape))
            parameter.grad = torch.tensor(gradient, dtype=torch.float32)
            gradient = gradient + (0.1 * weights[name] if name == "weight" else 0)
            momentum[name] = 0.9 * momentum[name] + gradient
            weights[name] = weights[name] - 0.5 / (step + 1) * (gradient + 0.9 * momentum[name])
        optimizer.step()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=1e-4, atol=1e-6)


def test_optimizer_leaves_frozen_parameters_out() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    model[1].requires_grad_(False)
    held = [parameter for group in build_optimizer(model, TrainingConfig()).param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in model[0].parameters()}
