"""How experts are used, counted by hand."""

import math

import pytest
import torch
from moe_parts import mlp_layer, route_gates

from hardmoe.models.moe.layer import Plan
from hardmoe.models.moe.routing import Limits
from hardmoe.models.moe.statistics import Usage, observed, tag_shares


def test_usage_is_counted_by_hand() -> None:
    gates = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.25, 0.5, 0.25, 0.0], [0.5, 0.25, 0.25, 0.0]], dtype=torch.float64)
    usage = Usage.empty(4)
    usage.add(route_gates(gates, 1, 1, False))
    # The first expert takes the first item and has no room for the third.
    assert usage.activation_E.tolist() == [1, 1, 0, 0]
    assert usage.importance_E.tolist() == [0.5, 0.5, 0, 0]
    summary = usage.summary()
    assert summary["cv_activation"] == pytest.approx(1)
    assert summary["living_experts"] == 2
    assert summary["dropped"] == pytest.approx(1 / 3)
    assert summary["entropy"] == pytest.approx(1.5 * math.log(2))


def test_usage_of_two_batches_is_the_sum_and_observers_leave_nothing_behind() -> None:
    layer = mlp_layer(Plan(k=2, group_images=1, inference_capacity_factor=0.7)).eval()
    images = torch.randn(4, 9, 5, dtype=torch.float64)
    with observed(layer) as whole:
        layer(images)
    with observed(layer) as first:
        layer(images[:3])
    with observed(layer) as second:
        layer(images[3:])
    added = first[""] + second[""]
    assert added.summary() == pytest.approx(whole[""].summary())
    assert torch.equal(added.activation_E, whole[""].activation_E)
    assert whole[""].num_items == 36
    assert layer.observers == []


def test_share_of_a_tag_is_that_of_its_images() -> None:
    layer = mlp_layer(Plan(k=1, group_images=3)).eval()
    images = torch.randn(5, 4, 5, dtype=torch.float64)
    valid = torch.ones(1, 20, dtype=torch.bool)
    routing = layer.router(images.view(1, 20, 5), valid, Limits(1, 20))
    tags = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 1, 0]], dtype=torch.bool)
    shares = tag_shares(routing, tags)
    chosen = routing.experts_GSk.view(5, 4)
    for tag in range(3):
        images_of_tag = tags[:, tag].nonzero()[:, 0]
        counts = torch.bincount(chosen[images_of_tag].flatten(), minlength=4).double()
        assert torch.allclose(shares[tag], counts / max(1, int(counts.sum())))
