"""Cutting networks: the two pieces are the network, and what is held does not move."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from hardmoe.errors import RecipeError
from hardmoe.models.backbones import Backbone, build_backbone
from hardmoe.models.branching import split
from hardmoe.models.probe import check_branch
from hardmoe.training.inference import predict_from_maps


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("quicknet_w4", ["stem", "layer1", "layer2", "layer3"]),
        ("resnet20_w8", ["stem", "layer1", "layer2"]),
        ("resnet18", ["stem", "layer1", "layer2", "layer3"]),
        ("resnext50_32x4d", ["layer3"]),
    ],
)
def test_two_pieces_are_the_network_to_the_bit_wherever_it_is_cut(name: str, stages: list[str]) -> None:
    backbone = build_backbone(name, image_size=32, seed=0).eval()
    images_B3SS = torch.randn(3, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    counts = []
    with torch.inference_mode():
        expected = backbone(images_B3SS)
        for stage in stages:
            branch = split(backbone, stage, name)
            assert torch.equal(branch.rest(branch.shared(images_B3SS)), expected)
            counts.append(sum(parameter.numel() for parameter in branch.shared.parameters()))
    assert counts == sorted(set(counts)), "a later stage shares more"


def test_rest_in_batches_of_one_size_has_the_bits_of_the_whole_network_in_such_batches() -> None:
    backbone = build_backbone("quicknet_w12", image_size=32, seed=0).eval()
    branch = split(backbone, "layer2", "quicknet_w12")
    images_N3SS = torch.randn(21, 3, 32, 32).contiguous(memory_format=torch.channels_last)

    def padded(batch: torch.Tensor) -> torch.Tensor:
        blank = torch.zeros(8 - len(batch), *batch.shape[1:])
        return torch.cat([batch, blank]).contiguous(memory_format=torch.channels_last)

    with torch.inference_mode():
        whole = torch.cat([backbone(padded(batch))[: len(batch)] for batch in images_N3SS.split(8)])
        maps = torch.cat([branch.shared(padded(batch))[: len(batch)] for batch in images_N3SS.split(8)])
    rows = torch.tensor([20, 3, 11, 4, 5, 6, 7, 8, 0, 19])
    assert torch.equal(predict_from_maps(branch.rest, maps[rows], 8), whole[rows])


def test_held_stages_keep_every_bit_while_the_rest_is_trained() -> None:
    backbone = build_backbone("quicknet_w4", image_size=32, seed=0)
    branch = split(backbone, "layer2", "quicknet_w4")
    backbone.hold(branch.shared)
    assert "network.stem.0.weight" in backbone.state_dict(), "what is held stays a part of the network, under its own name"
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    for mode in (True, False, True):
        backbone.train(mode)
        assert not any(module.training for module in branch.shared.modules() if isinstance(module, nn.BatchNorm2d))
    backbone(torch.randn(8, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    moved = {name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, before[name])}
    held = {f"network.{name}" for name in ("stem", "blocks.0", "blocks.1")}
    assert moved and not any(name.startswith(tuple(held)) for name in moved)
    assert {name for name, _ in backbone.named_parameters() if not name.startswith(tuple(held))} <= moved


@pytest.mark.parametrize(
    ("name", "stage", "has"),
    [
        ("quicknet_w4", "layer4", "it can branch at image, stem, layer1, layer2, layer3"),
        ("resnet18", "laier2", "it can branch at image, stem, layer1, layer2, layer3"),
        ("mobilenet_v3_small", "layer1", "it has none, as only residual networks have; set it to image"),
    ],
)
def test_stage_that_is_none_is_refused_with_those_there_are(name: str, stage: str, has: str) -> None:
    with pytest.raises(RecipeError) as refused:
        check_branch(name, stage, image_size=32)
    assert str(refused.value) == (
        f"experts.branch_at: '{stage}' is no stage of the backbone '{name}' that leaves something to train; {has}"
    )


def test_network_without_stages_is_run_as_it_is() -> None:
    backbone = Backbone(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), 2)
    with pytest.raises(RecipeError, match="it has none"):
        split(backbone, "layer1", "own:factory")
