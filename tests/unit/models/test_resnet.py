"""The residual networks for small images, against the paper's tables and torchvision's block."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from hardmoe.models.resnet import CIFAR_DEPTHS, BasicBlock, EverySecondPixel, PaddedShortcut, cifar_resnet, quicknet


def num_parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_cifar_resnet_has_the_parameters_of_the_papers_table(depth: int, millions: float) -> None:
    with_classifier = num_parameters(cifar_resnet(depth)) + 64 * 10 + 10
    assert with_classifier / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("depth", CIFAR_DEPTHS)
def test_cifar_resnet_has_as_many_layers_as_its_name_says(depth: int) -> None:
    convolutions = [module for module in cifar_resnet(depth).modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) + 1 == depth


def test_cifar_resnet_refuses_other_depths() -> None:
    with pytest.raises(ValueError, match="depth 21"):
        cifar_resnet(21)


@pytest.mark.parametrize(("width", "millions"), [(12, 0.37), (24, 1.08)])
def test_quicknet_with_a_decoder_of_2000_tags_has_the_size_studied(width: int, millions: float) -> None:
    network = quicknet(width)
    decoder = network.num_features * 2000 + 2000
    assert round((num_parameters(network) + decoder) / 1e6, 2) == millions


@pytest.mark.parametrize("size", [8, 15, 32])
def test_quicknet_pools_images_of_any_size_into_features(size: int) -> None:
    network = quicknet(4).eval()
    assert network(torch.zeros(2, 3, size, size)).shape == (2, network.num_features) == (2, 32)


def test_cifar_resnet_sees_the_full_resolution_and_halves_twice() -> None:
    network = cifar_resnet(20, width=4).eval()
    sizes = []
    for module in (network.stem, *network.blocks):
        module.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape[-1]))
    network(torch.zeros(1, 3, 32, 32))
    assert sizes == [32] * 4 + [16] * 3 + [8] * 3


def test_padded_shortcut_equals_one_by_one_pooling_with_zero_channels() -> None:
    maps = torch.arange(2 * 3 * 5 * 5, dtype=torch.float32).reshape(2, 3, 5, 5)
    expected = torch.cat([functional.avg_pool2d(maps, kernel_size=1, stride=2), torch.zeros(2, 4, 3, 3)], dim=1)
    assert torch.equal(PaddedShortcut(4)(maps), expected)


def test_quicknet_odd_batch_and_two_threads_survives_the_backward_pass() -> None:
    """The demo's trunk once died of a corrupted heap: a strided 1x1 convolution of 12 channels, 31 images, two threads.

    A process of its own, since the failure kills it.
    """
    code = (
        "import torch; from hardmoe.models.resnet import quicknet; torch.set_num_threads(2)\n"
        "network = quicknet(12).to(memory_format=torch.channels_last).train()\n"
        "images = torch.randn(31, 3, 32, 32).contiguous(memory_format=torch.channels_last)\n"
        "for _ in range(20): network(images).sum().backward()\n"
        "print('survived')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "survived", result.stderr[-500:]


def test_every_second_pixel_before_a_1x1_convolution_equals_the_strided_one() -> None:
    strided = torch.nn.Conv2d(3, 5, kernel_size=1, stride=2, bias=False)
    dense = torch.nn.Conv2d(3, 5, kernel_size=1, bias=False)
    dense.load_state_dict(strided.state_dict())
    for size in (7, 8):
        maps = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        torch.testing.assert_close(dense(EverySecondPixel()(maps)), strided(maps))


@pytest.mark.parametrize(("before", "after", "stride"), [(5, 5, 1), (3, 7, 2)])
def test_basic_block_is_torchvisions_to_the_bit(before: int, after: int, stride: int) -> None:
    from torchvision.models.resnet import BasicBlock as Theirs
    from torchvision.models.resnet import conv1x1

    def built(kind: type[torch.nn.Module]) -> torch.nn.Module:
        torch.manual_seed(0)
        return kind(before, after, stride, conv1x1(before, after, stride) if stride > 1 else None).train()

    ours, theirs = built(BasicBlock), built(Theirs)
    maps = torch.randn(4, before, 9, 8)
    results = []
    for block in (ours, theirs):
        inputs = maps.clone().requires_grad_(True)
        outputs = block(inputs)
        (outputs**2).sum().backward()
        results.append([outputs, inputs.grad, *(parameter.grad for parameter in block.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
