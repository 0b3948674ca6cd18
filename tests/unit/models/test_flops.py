"""Operations and parameters of backbones against figures that others have counted."""

import pytest
import torchvision
from torch import nn

from hardmoe.models.backbones import build_backbone
from hardmoe.models.flops import measure_backbone


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
