"""The moving average of the weights against a loop in NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from hardmoe.training.average import WeightAverage


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)


def moved(model: nn.Module, step: int) -> None:
    """As a step would: other weights, other statistics, a counter that counts."""
    model.train()(torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(step)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * (step + 1))


def test_average_of_weights_and_statistics_is_that_of_a_numpy_loop() -> None:
    model = make_model()
    average = WeightAverage(model, 0.6)
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    expected = {name: model.state_dict()[name].double().numpy().copy() for name in names}
    for step in range(15):
        moved(model, step)
        average.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        for name in names:
            expected[name] = decay * expected[name] + (1 - decay) * model.state_dict()[name].double().numpy()
    assert sorted(average.tensors) == sorted(names)
    for name in names:
        assert average.tensors[name].dtype == torch.float32
        np.testing.assert_allclose(average.tensors[name].numpy(), expected[name], rtol=1e-5, atol=1e-6)


def test_network_in_use_as_its_average_has_its_own_bits_again_afterwards() -> None:
    model = make_model()
    average = WeightAverage(model, 0.9)
    for step in range(3):
        moved(model, step)
        average.update(step)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), average.in_use():
        for name, tensor in average.tensors.items():
            assert torch.equal(model.state_dict()[name], tensor)
            assert not torch.equal(before[name], tensor)
        raise ZeroDivisionError
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    average.replace()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in average.tensors.items())
    assert model.state_dict()["1.num_batches_tracked"] == 3


def test_average_of_weights_that_stay_is_the_weights_to_the_bit() -> None:
    model = make_model()
    average = WeightAverage(model, 0.999)
    for step in range(50):
        average.update(step)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in average.tensors.items())
