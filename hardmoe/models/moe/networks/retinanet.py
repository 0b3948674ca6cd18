"""Torchvision's RetinaNet with experts in its heads (Pavlitskaya et al., arXiv 2204.10598), small enough for a CPU.

Anchors, losses, matching and decoding are torchvision's. What is ours is the last layer of a head: it is the whole tower, or a
`MoeLayer` whose experts are whole towers, so that nothing else knows of experts. A decision is made once for every image and
level of the pyramid, by one gate for all levels. In the paper's code the gate's convolution is dead and checkpoints forget its
constraint; here the gate is the pooled one of its ResNets, and the constraint's state is a buffer. Rejected: a box head that
routes single positions, which would need the router of patches and has no counterpart in the paper.

Shape letters: B images, C channels, H height, W width, L levels, A anchors.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetClassificationHead, RetinaNetRegressionHead
from torchvision.ops import FeaturePyramidNetwork

from hardmoe.hashing import derive_seed
from hardmoe.models.moe.config import MoeConfig
from hardmoe.models.moe.experts.modules import ModuleExperts
from hardmoe.models.moe.layer import MoeLayer
from hardmoe.models.moe.networks.resnet import RESNET_DEFAULTS, image_layer
from hardmoe.models.resnet import SmallResNet

HEAD_DEFAULTS = RESNET_DEFAULTS.model_copy(update={"placement": None, "threshold": 0.3})
"""Four experts, two of them for each map, relative importance of 0.3, as in the paper."""
STRIDES = (8, 16, 32)
ANCHOR_SIZES = tuple(tuple(round(2 * stride * 2 ** (third / 3)) for third in range(3)) for stride in STRIDES)
"""In pixels: on each level three octaves' thirds from twice its stride on."""
ASPECT_RATIOS = (0.5, 1.0, 2.0)
NUM_ANCHORS = len(ANCHOR_SIZES[0]) * len(ASPECT_RATIOS)
PRIOR = 0.01
"""What a class head begins by believing of every anchor."""
HEADS = {"regression": "regression_head", "classification": "classification_head"}


@dataclass(frozen=True)
class DetectorPlan:
    """The shape of a detector."""

    num_classes: int
    image_size: int
    """Side of the square images, a multiple of the largest stride."""
    width: int = 12
    """Channels of the backbone's first stage."""
    channels: int = 32
    """Of every level of the pyramid, and of the towers."""
    depth: int = 2
    """Convolutions of a tower before its last; torchvision's have 4."""


class LevelMoeLayer(MoeLayer):
    """A layer that runs several times in a step, once a level, and wants something each time."""

    def forward(self, inputs_BTX: Tensor) -> Tensor:
        """As `MoeLayer`; the auxiliary losses of all runs add up until somebody takes them."""
        before = self.auxiliary_loss if self.training else None
        outputs_BTY = super().forward(inputs_BTX)
        if before is not None:
            self.auxiliary_loss = before if self.auxiliary_loss is None else before + self.auxiliary_loss
        return outputs_BTY


class RegressionHead(RetinaNetRegressionHead):  # type: ignore[misc]
    """Torchvision's, whose last layer is all of it."""

    def __init__(self, channels: int, whole: nn.Module) -> None:
        super().__init__(channels, NUM_ANCHORS)
        self.conv = nn.Identity()
        self.bbox_reg = whole


class ClassificationHead(RetinaNetClassificationHead):  # type: ignore[misc]
    """Torchvision's, whose last layer is all of it."""

    def __init__(self, channels: int, num_classes: int, whole: nn.Module) -> None:
        super().__init__(channels, NUM_ANCHORS, num_classes)
        self.conv = nn.Identity()
        self.cls_logits = whole


class PyramidBackbone(nn.Module):
    """A residual network whose last three stages feed a feature pyramid."""

    def __init__(self, plan: DetectorPlan) -> None:
        super().__init__()
        network = SmallResNet(plan.width, num_stages=5, blocks_per_stage=1, stem_stride=2, projection=True)
        self.stem, self.stages = network.stem, network.blocks
        self.pyramid = FeaturePyramidNetwork([plan.width * 2**stage for stage in (2, 3, 4)], plan.channels)
        self.out_channels = plan.channels

    def forward(self, images_B3HW: Tensor) -> OrderedDict[str, Tensor]:
        """Maps [B, C, H / stride, W / stride] by the names of the levels, finest first."""
        maps_BCHW, found = self.stem(images_B3HW), OrderedDict[str, Tensor]()
        for number, stage in enumerate(self.stages):
            maps_BCHW = stage(maps_BCHW)
            if number >= 2:
                found[str(number - 2)] = maps_BCHW
        levels: OrderedDict[str, Tensor] = self.pyramid(found)
        return levels


class Detector(RetinaNet):  # type: ignore[misc]
    """A RetinaNet over images of one size; its backbone may be frozen, batch normalisation's statistics included."""

    def __init__(self, plan: DetectorPlan) -> None:
        anchors = AnchorGenerator(ANCHOR_SIZES, (ASPECT_RATIOS,) * len(STRIDES))
        super().__init__(
            PyramidBackbone(plan), plan.num_classes, plan.image_size, plan.image_size, anchor_generator=anchors, head=_Heads(plan)
        )
        # All images have the size already.
        self.transform._skip_resize = True
        self.plan = plan
        self.has_frozen_backbone = False

    def train(self, mode: bool = True) -> "Detector":
        """As torch's; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.has_frozen_backbone:
            self.backbone.eval()
        return self

    def freeze_backbone(self) -> None:
        """Train the heads alone from here on."""
        self.has_frozen_backbone = True
        self.backbone.requires_grad_(False)
        self.train(self.training)

    def anchors(self) -> list[Tensor]:
        """The anchors of an image, level by level, xyxy [A, 4]."""
        size = self.plan.image_size
        maps = [torch.zeros(1, 1, size // stride, size // stride) for stride in STRIDES]
        (all_A4,) = self.anchor_generator(ImageList(torch.zeros(1, 3, size, size), [(size, size)]), maps)
        return list(all_A4.split([each.shape[-1] ** 2 * NUM_ANCHORS for each in maps]))


class _Heads(nn.Module):
    """Both heads, as `RetinaNetHead` has them."""

    def __init__(self, plan: DetectorPlan) -> None:
        super().__init__()
        logit = -math.log((1 - PRIOR) / PRIOR)
        self.classification_head = ClassificationHead(
            plan.channels, plan.num_classes, tower(plan, NUM_ANCHORS * plan.num_classes, logit)
        )
        self.regression_head = RegressionHead(plan.channels, tower(plan, NUM_ANCHORS * 4, 0.0))

    def compute_loss(
        self,
        targets: Sequence[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: Sequence[Tensor],
        matched_idxs: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Torchvision's focal loss and its L1 loss."""
        return {
            "classification": self.classification_head.compute_loss(targets, head_outputs, matched_idxs),
            "bbox_regression": self.regression_head.compute_loss(targets, head_outputs, anchors, matched_idxs),
        }

    def forward(self, levels: Sequence[Tensor]) -> dict[str, Tensor]:
        """Of all levels' anchors in a row."""
        return {"cls_logits": self.classification_head(levels), "bbox_regression": self.regression_head(levels)}


def tower(plan: DetectorPlan, outputs: int, bias: float) -> nn.Sequential:
    """Convolutions and the one that answers; initialised as torchvision's heads are."""
    widths = [plan.channels] * (plan.depth + 1)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True)]
    layers.append(nn.Conv2d(plan.channels, outputs, 3, padding=1))
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            # As wide as the signal needs: torchvision's 0.01 is for 256 channels, and fades away in narrow towers.
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    nn.init.normal_(layers[-1].weight, std=0.01)  # type: ignore[arg-type]
    nn.init.constant_(layers[-1].bias, bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers)


def build_detector(plan: DetectorPlan, seed: int) -> Detector:
    """A dense detector with initial weights of a seed; global generators stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Detector(plan)


def give_experts(detector: Detector, heads: Sequence[str], config: MoeConfig, seed: int) -> None:
    """Put experts, copies of the dense tower, in the place of a head or of both.

    Args:
        detector: a dense one.
        heads: names in `HEADS`.
        config: the layers; what is null is the paper's.
        seed: of the gates' weights.
    """
    full = config.over(HEAD_DEFAULTS)
    for name in heads:
        head: Any = getattr(detector.head, HEADS[name])
        attribute = "bbox_reg" if name == "regression" else "cls_logits"
        dense: nn.Module = getattr(head, attribute)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(seed, name))
            experts = ModuleExperts(lambda dense=dense: copy.deepcopy(dense), full.num_experts or 1)  # type: ignore[misc]
            setattr(head, attribute, image_layer(experts, detector.plan.channels, full, LevelMoeLayer))
