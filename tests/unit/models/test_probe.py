"""Looking at a backbone without building it: the same width, the same refusals, none of the weights."""

import pytest
import torch
from torch import nn

from hardmoe.errors import RecipeError
from hardmoe.models.backbones import build_backbone
from hardmoe.models.probe import probe_backbone


def narrow(image_size: int) -> nn.Module:
    """A user's own network, which computes with its weights while it is being built."""
    network = nn.Sequential(nn.Conv2d(3, 7, image_size), nn.Flatten())
    assert network[0].weight.sum().item() != 0.0
    network.num_features = 7
    return network


def broken(image_size: int) -> nn.Module:
    raise KeyError(image_size)


@pytest.mark.parametrize("name", ["resnet18", "resnet20_w8", "quicknet_w4", "mobilenet_v3_small", "vit_b_16", "convnext_tiny"])
def test_width_is_that_of_the_network_itself(name: str) -> None:
    probed = probe_backbone(name, image_size=32)
    assert probed == build_backbone(name, image_size=32, seed=0).num_features


def test_probe_neither_reads_nor_advances_the_global_generator() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    probe_backbone("resnet18", image_size=32)
    assert torch.equal(torch.rand(3), expected)


def test_network_that_needs_its_weights_while_it_is_built_has_no_known_width() -> None:
    assert probe_backbone("regnet_y_400mf", image_size=32) is None


def test_own_network_is_run_as_it_is() -> None:
    assert probe_backbone(f"{__name__}:narrow", image_size=16) == 7


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [
        ("resnet19", 32, "unknown backbone 'resnet19'; did you mean resnet18"),
        ("alexnet", 16, r"'alexnet' cannot be run on images of 16 pixels \(.*too small\); raise trunk.image_size or choose"),
        ("vit_b_16", 20, r"'vit_b_16' cannot be built for images of 20 pixels \(.*\); set another trunk.image_size or choose"),
        (f"{__name__}:nothing", 32, "cannot load the backbone .*; give an importable package.module:factory .*PYTHONPATH"),
        (f"{__name__}:broken", 32, "called with image_size=32, raised KeyError: 32; correct the factory"),
    ],
)
def test_network_that_cannot_be_is_refused_with_the_remedy(name: str, image_size: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        probe_backbone(name, image_size=image_size)
