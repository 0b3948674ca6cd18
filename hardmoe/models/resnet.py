"""Residual networks for small images: He et al.'s CIFAR family and the quick family.

Both are a stem, stages of basic blocks whose width doubles, and global average pooling; they differ only in the numbers below.
Rejected: squeezing the ImageNet networks to small widths, whose stem throws away 15 of 16 pixels; torchvision's `BasicBlock`,
which is the same to the bit and takes every worker two seconds to import.

The quick family exists so that studies on hundreds of thousands of icons fit a laptop: a stride-2 stem and one block per
stage. With a decoder of 2,000 tags it has 0.37 M parameters at width 12 and 1.08 M at width 24.

Shape letters: B batch, C channels, H height, W width, D feature dim.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

CIFAR_DEPTHS = (20, 32, 44, 56, 110)
"""The depths of He et al. 2016, section 4.2: 6n + 2 layers."""


class EverySecondPixel(nn.Module):
    """Halve height and width by taking every second pixel; before a 1x1 convolution this is that convolution at stride 2.

    torch 2.15's CPU kernel for the gradient of a strided 1x1 convolution writes out of bounds with fewer than 16 input
    channels, `channels_last` and a batch that the threads do not divide (12 channels, 31 images, 2 threads: the process
    dies of a corrupted heap). The dense convolution behind a subsampling takes another kernel and is as fast.
    """

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C, ceil(H / 2), ceil(W / 2)]."""
        return maps_BCHW[:, :, ::2, ::2]


class PaddedShortcut(nn.Module):
    """He et al.'s option A: the shortcut of a widening block takes every second pixel and pads channels with zeros."""

    def __init__(self, added_channels: int) -> None:
        super().__init__()
        self.added_channels = added_channels

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Halve height and width, add channels of zeros; no parameters."""
        return functional.pad(maps_BCHW[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.added_channels))


class BasicBlock(nn.Module):
    """He et al.'s block of two 3x3 convolutions beside a shortcut, with torchvision's names.

    Args:
        before: channels that come in.
        after: channels that go out.
        stride: of the first convolution.
        downsample: the shortcut; None for the identity.
    """

    def __init__(self, before: int, after: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(after, after, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample = downsample

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Maps [B, before, H, W] to [B, after, ceil(H / stride), ceil(W / stride)]."""
        residual_BCHW = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(maps_BCHW)))))
        shortcut_BCHW = maps_BCHW if self.downsample is None else self.downsample(maps_BCHW)
        added_BCHW: Tensor = self.relu(residual_BCHW.add_(shortcut_BCHW))
        return added_BCHW


class SmallResNet(nn.Module):
    """A stem, stages of basic blocks with widths w, 2w, 4w, …, and global average pooling.

    Args:
        width: channels of the first stage.
        num_stages: each after the first halves the image and doubles the channels.
        blocks_per_stage: basic blocks (two 3x3 convolutions each) in a stage.
        stem_stride: 1 keeps the image's size, 2 halves it, which makes everything after it four times cheaper.
        projection: widen shortcuts by a 1x1 convolution (option B) instead of zero padding (option A).
    """

    def __init__(self, width: int, num_stages: int, blocks_per_stage: int, stem_stride: int, projection: bool) -> None:
        super().__init__()
        widths = [width * 2**stage for stage in range(num_stages)]
        self.num_features = widths[-1]
        self.blocks_per_stage = blocks_per_stage
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, kernel_size=3, stride=stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        blocks: list[nn.Module] = []
        for before, after in pairwise([width, *widths]):
            blocks.append(_first_block(before, after, projection))
            blocks.extend(BasicBlock(after, after) for _ in range(blocks_per_stage - 1))
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Pooled features, float [B, D]."""
        return torch.flatten(self.pool(self.blocks(self.stem(images_B3HW))), 1)


def _first_block(before: int, after: int, projection: bool) -> nn.Module:
    """The block that opens a stage; it widens and halves unless the stage is the first."""
    if before == after:
        block: nn.Module = BasicBlock(before, after)
    elif projection:
        widening = nn.Conv2d(before, after, kernel_size=1, bias=False)
        block = BasicBlock(before, after, 2, nn.Sequential(EverySecondPixel(), widening, nn.BatchNorm2d(after)))
    else:
        block = BasicBlock(before, after, 2, PaddedShortcut(after - before))
    return block


def cifar_resnet(depth: int, width: int = 16) -> SmallResNet:
    """He et al.'s ResNet for 32x32 images: three stages, full-size stem, shortcuts without parameters.

    Args:
        depth: one of `CIFAR_DEPTHS`.
        width: channels of the first stage, 16 in the paper.
    """
    if depth not in CIFAR_DEPTHS:
        raise ValueError(f"depth {depth} is not one of {CIFAR_DEPTHS}")
    return SmallResNet(width, num_stages=3, blocks_per_stage=(depth - 2) // 6, stem_stride=1, projection=False)


def quicknet(width: int) -> SmallResNet:
    """Four stages of one block each behind a stride-2 stem."""
    return SmallResNet(width, num_stages=4, blocks_per_stage=1, stem_stride=2, projection=True)
