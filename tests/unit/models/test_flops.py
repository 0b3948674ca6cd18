"""Operations and parameters of backbones against figures that others have counted."""

from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from hardmoe.models.backbones import build_backbone
from hardmoe.models.flops import BackboneSize, measure_backbone
from hardmoe.models.moe.config import MoeConfig


@pytest.mark.parametrize(("name", "weights"), [("resnet18", "ResNet18_Weights"), ("resnet50", "ResNet50_Weights")])
def test_torchvisions_own_counts_are_reached(name: str, weights: str) -> None:
    """Torchvision counts a multiplication and an addition once, and the last layer, which is ours to add."""
    told = getattr(torchvision.models, weights).IMAGENET1K_V1.meta
    found = measure_backbone(name, image_size=224, stem="imagenet")
    width = {"resnet18": 512, "resnet50": 2048}[name]
    assert found.flops / 2 + width * 1000 == pytest.approx(told["_ops"] * 1e9, rel=1e-3)
    assert found.parameters + (width + 1) * 1000 == told["num_params"]
    assert (found.shared_flops, found.shared_parameters) == (0, 0)


def test_stages_that_are_shared_are_counted_apart() -> None:
    found = measure_backbone("resnet18", image_size=32, branch_at="layer1")
    network = build_backbone("resnet18", image_size=32, seed=0).network
    # 32x32 all along: the small stem, and two blocks of two convolutions from 64 to 64 channels.
    assert found.shared_flops == 2 * 32 * 32 * 9 * (3 * 64 + 4 * 64 * 64)
    pieces = [network.conv1, network.bn1, network.layer1]
    assert found.shared_parameters == sum(each.numel() for piece in pieces for each in piece.parameters())
    assert 0 < found.shared_flops < found.flops


class Linear(nn.Module):
    """One matrix product of all pixels."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.num_features = 5
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size * image_size, self.num_features))

    def forward(self, images_B3HW):  # type: ignore[no-untyped-def]
        return self.layers(images_B3HW)


def test_your_own_network_is_counted_too() -> None:
    found = measure_backbone(f"{__name__}:Linear", image_size=8)
    assert (found.flops, found.parameters) == (2 * 192 * 5, 193 * 5)


def _xs(**moe: Any) -> BackboneSize:
    """V-MoE's smallest at 16 pixels in patches of 8: five items of width 192, six blocks, an MLP of 768."""
    return measure_backbone("vmoe_xs8", image_size=16, moe=MoeConfig(num_experts=8, placement="last2", **moe))


DENSE = 2 * 4 * 192 * 192 + 2 * (6 * 5 * 4 * 192 * 192 + 6 * 5 * 2 * 192 * 768)
"""Patches (3 x 8 x 8 values each to 192), projections of attention, MLPs."""
ATTENTION = 6 * 2 * 2 * 5 * 5 * 192
MLP = 2 * 2 * 192 * 768
ROUTER = 2 * 5 * 192 * 8


@pytest.mark.parametrize("k", [1, 2])
def test_experts_of_a_layer_count_with_the_choices_of_its_items(k: int) -> None:
    found = _xs(k=k)
    assert found.flops == DENSE + ATTENTION + 2 * (ROUTER + 5 * (k - 1) * MLP)
    assert found.routed_flops == 2 * 5 * k * MLP
    assert found.spared_flops == 0
    per_expert = 2 * 192 * 768 + 768 + 192
    assert found.inactive_parameters == 2 * (8 - k) * per_expert
    dense = found.parameters - 2 * (7 * per_expert + 8 * 192)
    with torch.device("meta"):
        oracle = torchvision.models.VisionTransformer(16, 8, 6, 3, 192, 768, num_classes=1)
    assert dense == sum(parameter.numel() for parameter in oracle.parameters()) - 193


def test_capacity_bounds_what_experts_cost_in_use_and_in_training_alike() -> None:
    """Eight images are 40 items; half of their 80 choices are 40 slots, 5 an expert, rounded up to 8; one alone has 4 at
    least."""
    training = _xs(k=2, capacity_factor=0.5)
    assert training.flops == _xs(k=2).flops
    assert training.spared_flops == 2 * (5 * 2 - 8) * MLP
    in_use = _xs(k=1, capacity_factor=0.0, inference_capacity_factor=0.5)
    assert in_use.routed_flops == 2 * 5 * MLP
    assert in_use.spared_flops == 0


@pytest.mark.parametrize(
    ("moe", "num_run"), [({"router": "soft", "constraint": "none"}, 8), ({"dispatch": "einsum", "capacity_factor": 1.0}, 8)]
)
def test_routers_and_dispatches_that_run_more_cost_more(moe: dict[str, Any], num_run: int) -> None:
    assert _xs(**moe).routed_flops == 2 * 5 * num_run * MLP


def test_images_experts_count_k_times_whatever_the_images() -> None:
    dense, experts = (measure_backbone(name, image_size=32) for name in ("resnet18", "moe_resnet18"))
    # Each narrow expert is about half of the stage that it stands for.
    assert experts.flops / dense.flops == pytest.approx(1, abs=0.03)
    assert experts.inactive_parameters == 2 * 4_037_448
    assert 0.2 < experts.routed_flops / experts.flops < 0.26
    one = measure_backbone("moe_resnet18", image_size=32, moe=MoeConfig(k=1))
    assert experts.routed_flops == 2 * one.routed_flops
    assert experts.flops - one.flops == one.routed_flops


def test_experts_in_the_last_layer_alone_are_a_percent_of_all_and_of_every_stage_a_third() -> None:
    """The share of routed operations that decides what experts are worth (arXiv 2605.15484)."""
    shares = {}
    for placement in ("last2", "every2"):
        found = measure_backbone("moe_vit_small", image_size=224, moe=MoeConfig(placement=placement, k=1))
        shares[placement] = found.routed_flops / found.flops
    assert shares["every2"] == pytest.approx(3 * shares["last2"], rel=0.01)
    assert shares["every2"] == pytest.approx(0.30, abs=0.02)


def test_experts_within_shared_stages_are_counted_with_those() -> None:
    moe = MoeConfig(placement="stage1")
    found = measure_backbone("moe_resnet18", image_size=32, branch_at="layer1", moe=moe)
    assert found.inactive_parameters == found.routed_flops == 0
    assert found.shared_inactive_parameters == 2 * 75_023
    assert 0 < found.shared_routed_flops < found.shared_flops


def test_network_of_thousands_of_millions_is_counted_without_its_weights() -> None:
    found = measure_backbone("vmoe_h14", image_size=224)
    assert found.parameters > 7e9
    assert found.parameters - found.inactive_parameters < 1.1e9
