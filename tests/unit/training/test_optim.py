"""The schedule against torch's, the optimiser against the formulas."""

import numpy as np
import pytest
import torch
from torch import nn, optim

from hardmoe.training.config import TrainingConfig
from hardmoe.training.optim import (
    build_optimizer,
    learning_rate_at,
    optimizer_state,
    restore_optimizer_state,
    set_learning_rate,
)


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


def test_linear_schedule_falls_in_equal_steps_from_the_peak_and_constant_stays_there() -> None:
    linear = TrainingConfig(learning_rate=0.2, warmup_fraction=0.1, schedule="linear")
    rates = [learning_rate_at(step, 100, linear) for step in range(101)]
    assert rates[:11] == pytest.approx(np.arange(1, 12) * 0.2 / 11)
    assert rates[10:] == pytest.approx(np.linspace(0.2, 0, 91))
    assert rates[-1] == 0
    constant = linear.model_copy(update={"schedule": "constant"})
    assert [learning_rate_at(step, 100, constant) for step in range(10)] == rates[:10]
    assert {learning_rate_at(step, 100, constant) for step in range(10, 101)} == {0.2}


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_learning_rate_of_adaptive_optimisers_follows_the_root_of_the_batch_size(name: str) -> None:
    config = TrainingConfig(optimizer=name, learning_rate=0.01, batch_size=1024, schedule="constant", warmup_fraction=0)
    assert learning_rate_at(0, 10, config) == pytest.approx(0.02)


def test_adamw_follows_its_formula_and_decays_matrices_only() -> None:
    config = TrainingConfig(optimizer="adamw", learning_rate=0.01, momentum=0.8, beta2=0.95, weight_decay=0.1)
    model = nn.Linear(2, 3)
    weights = {name: parameter.detach().double().numpy().copy() for name, parameter in model.named_parameters()}
    means, squares = ({name: np.zeros_like(value) for name, value in weights.items()} for _ in range(2))
    optimizer = build_optimizer(model, config)
    chance = np.random.default_rng(0)
    for step in range(1, 6):
        rate = 0.1 / step
        set_learning_rate(optimizer, rate)
        for name, parameter in model.named_parameters():
            gradient = chance.normal(size=tuple(parameter.shape))
            parameter.grad = torch.tensor(gradient, dtype=torch.float32)
            means[name] = 0.8 * means[name] + 0.2 * gradient
            squares[name] = 0.95 * squares[name] + 0.05 * gradient**2
            decayed = weights[name] * (1 - rate * 0.1) if name == "weight" else weights[name]
            root = np.sqrt(squares[name] / (1 - 0.95**step)) + 1e-8
            weights[name] = decayed - rate * means[name] / (1 - 0.8**step) / root
        optimizer.step()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=1e-4, atol=1e-6)


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 1), nn.GroupNorm(1, 8)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def step_on(model: nn.Module, optimizer: optim.Optimizer, step: int) -> None:
    images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step)).to(memory_format=torch.channels_last)
    optimizer.zero_grad()
    # No function of the squares alone, which normalisation leaves constant.
    model(images).sin().sum().backward()
    set_learning_rate(optimizer, 0.01)
    optimizer.step()


def test_fused_adamw_reads_channels_last_weights_and_gradients_in_the_same_order() -> None:
    """A fused kernel walks through memory: with other strides in the gradient it would move the wrong weights."""
    config = TrainingConfig(optimizer="adamw", learning_rate=0.001)
    fused, plain = convolutions(), convolutions()
    optimizer, groups = build_optimizer(fused, config), [{"params": [parameter]} for parameter in plain.parameters()]
    for group in groups:
        group["weight_decay"] = config.weight_decay if group["params"][0].ndim > 1 else 0.0
    oracle = optim.AdamW(groups, lr=0.0, foreach=False, fused=False)
    for step in range(4):
        step_on(fused, optimizer, step)
        step_on(plain, oracle, step)
    for found, expected in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_restored_state_of_an_optimiser_goes_on_with_the_same_bits(name: str) -> None:
    """Through contiguous copies on the CPU, as a checkpoint holds them, into another network's optimiser."""
    config = TrainingConfig(optimizer=name, learning_rate=0.01)
    whole, resumed = convolutions(), convolutions()
    optimizer = build_optimizer(whole, config)
    assert optimizer_state(whole, optimizer) == {}
    for step in range(3):
        step_on(whole, optimizer, step)
    saved = {key: tensor.contiguous().clone() for key, tensor in optimizer_state(whole, optimizer).items()}
    assert {key.partition(".")[2] for key in saved} == {name for name, _ in whole.named_parameters()}
    resumed.load_state_dict(whole.state_dict())
    other = build_optimizer(resumed, config)
    restore_optimizer_state(resumed, other, saved)
    for step in range(3, 6):
        step_on(whole, optimizer, step)
        step_on(resumed, other, step)
    again = optimizer_state(resumed, other)
    assert [key for key, tensor in optimizer_state(whole, optimizer).items() if not torch.equal(tensor, again[key])] == []
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert len({tensor.data_ptr() for tensor in again.values()}) == len(again), "no two states share memory"


def test_optimizer_leaves_frozen_parameters_out() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    model[1].requires_grad_(False)
    held = [parameter for group in build_optimizer(model, TrainingConfig()).param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in model[0].parameters()}
