"""ResNets in which each image goes through a few experts: whole residual stages, or single convolutions.

A stage's experts are narrow, each about half of the dense stage, so that two of them cost what it does; a shortcut leads
around all of them (Pavlitskaya et al., arXiv 2204.10598). Widths of ResNet-18's experts, with their parameters, are those of
its code; for ResNet-50 only the widths are known, and the blocks are as many as the dense stage has.
"""

import copy
import re

from torch import Tensor, nn

from hardmoe.errors import RecipeError
from hardmoe.models.moe.config import MoeConfig
from hardmoe.models.moe.constraints.base import Constraint
from hardmoe.models.moe.constraints.mean import MeanImportance
from hardmoe.models.moe.constraints.relative import RelativeImportance
from hardmoe.models.moe.experts.modules import ModuleExperts
from hardmoe.models.moe.layer import MoeLayer
from hardmoe.models.moe.networks.tokens import check_k, plan_of
from hardmoe.models.moe.routers.base import Router
from hardmoe.models.moe.routers.soft import SoftRouter
from hardmoe.models.moe.routers.sparse_gate import SparseGateRouter
from hardmoe.models.moe.scores.convolved import ConvolvedScores
from hardmoe.models.moe.scores.pooled import PooledScores

RESNET_DEFAULTS = MoeConfig(
    placement="stage4",
    num_experts=4,
    k=2,
    capacity_factor=0.0,
    inference_capacity_factor=0.0,
    priority=False,
    router="pooled",
    noise=1.0,
    constraint="relative",
    loss_weight=0.5,
)
_NARROW = {18: (25, 50, 90, 180), 50: (24, 58, 140, 200)}
_WHOLE_BATCH = 2**31
_LOSSES = {"none": (), "importance": ("unbiased",), "kl": ("kl",)}
_THRESHOLDS = {"relative": 0.5, "mean": 0.3}


class AroundExperts(nn.Module):
    """Experts beside a shortcut: their mixture plus a projection of the input."""

    def __init__(self, layer: MoeLayer, shortcut: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.shortcut = shortcut

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Maps as a dense stage gives them."""
        maps: Tensor = self.layer(maps_BCHW) + self.shortcut(maps_BCHW)
        return maps


def resnet(depth: int) -> nn.Module:
    """Torchvision's, dense."""
    import torchvision

    network: nn.Module = torchvision.models.get_model(f"resnet{depth}", weights=None)
    return network


def place_in_resnet(network: nn.Module, depth: int, config: MoeConfig) -> None:
    """Put experts in the place of a stage or a convolution; the network has the stem that it is to have."""
    match = re.fullmatch(r"(stage|plain)([1-4])|conv([0-4])", config.placement or "")
    if match is None:
        raise RecipeError(
            f"moe.placement: '{config.placement}' is none of a ResNet; set it to stage1 to stage4, plain1 to plain4, "
            f"or conv0 to conv4"
        )
    if match[3] is None:
        _replace_stage(network, depth, int(match[2]), config, match[1] == "stage")
    else:
        _replace_convolution(network, int(match[3]), config)


def narrow_stage(depth: int, stage: int) -> nn.Module:
    """One expert in the place of a stage, 1 to 4: residual blocks of torchvision's kind with a narrow inside."""
    from torchvision.models.resnet import BasicBlock, Bottleneck

    width, narrow = 64 * 2 ** (stage - 1), _NARROW[depth][stage - 1]
    stride = 1 if stage == 1 else 2
    if depth == 18:
        before = 64 if stage == 1 else width // 2
        blocks = [
            BasicBlock(before, narrow, stride, _projection(before, narrow, stride)),
            BasicBlock(narrow, width, 1, _projection(narrow, width, 1)),
        ]
    else:
        before, after = (64 if stage == 1 else 2 * width), 4 * width
        inside = round(64 * narrow / width)
        first = Bottleneck(before, width, stride, _projection(before, after, stride), base_width=inside)
        blocks = [first, *(Bottleneck(after, width, base_width=inside) for _ in range((3, 4, 6, 3)[stage - 1] - 1))]
    return _initialised(nn.Sequential(*blocks))


def _replace_stage(network: nn.Module, depth: int, stage: int, config: MoeConfig, shortcut: bool) -> None:
    dense = network.get_submodule(f"layer{stage}")
    convolutions = [module for module in dense.modules() if isinstance(module, nn.Conv2d)]
    before, stride = convolutions[0].in_channels, 1 if stage == 1 else 2
    after = 64 * 2 ** (stage - 1) * (1 if depth == 18 else 4)
    layer = image_layer(ModuleExperts(lambda: narrow_stage(depth, stage), config.num_experts or 1), before, config)
    around = nn.Identity() if before == after else _initialised(_projection(before, after, stride))
    setattr(network, f"layer{stage}", AroundExperts(layer, around) if shortcut else layer)


def _replace_convolution(network: nn.Module, place: int, config: MoeConfig) -> None:
    parent = network if place == 0 else network.get_submodule(f"layer{place}.1")
    name = "conv1" if place == 0 else "conv2"
    dense = parent.get_submodule(name)
    assert isinstance(dense, nn.Conv2d)
    experts = ModuleExperts(lambda: _initialised(copy.deepcopy(dense)), config.num_experts or 1)
    layer = image_layer(experts, dense.in_channels, config)
    layer.dense_names = (name,)
    setattr(parent, name, layer)


def image_layer(experts: ModuleExperts, channels: int, config: MoeConfig, kind: type[MoeLayer] = MoeLayer) -> MoeLayer:
    """A layer that decides once for every map it is given, of a config without nulls.

    Raises:
        RecipeError: router, constraint or k are none of such a layer's.
    """
    check_k(config.k or 1, experts.num_experts)
    router = _router(config, channels, experts.num_experts)
    hard = config.constraint in _THRESHOLDS
    if not hard and config.constraint not in _LOSSES:
        raise RecipeError(
            f"moe.constraint: {config.constraint} is one for patches or pixels; of ResNets it is one of "
            f"{', '.join([*_LOSSES, *_THRESHOLDS])}"
        )
    weights = {} if hard else dict.fromkeys(_LOSSES[config.constraint or "none"], config.loss_weight or 0.0)
    return kind(router, experts, plan_of(config, _WHOLE_BATCH), weights, item_dims=3)


def _router(config: MoeConfig, channels: int, num_experts: int) -> Router:
    if config.router == "soft":
        return SoftRouter(PooledScores(channels, num_experts), num_experts)
    if config.router not in ("pooled", "convolved"):
        raise RecipeError(f"moe.router: {config.router} is one of patches or pixels; of ResNets it is pooled, convolved or soft")
    scores = (PooledScores if config.router == "pooled" else ConvolvedScores)(channels, num_experts)
    constraint: Constraint | None = None
    if config.constraint in _THRESHOLDS:
        threshold = _THRESHOLDS[config.constraint] if config.threshold is None else config.threshold
        constraint = (RelativeImportance if config.constraint == "relative" else MeanImportance)(num_experts, threshold)
    # Hard constraints do without noise.
    noise = PooledScores(channels, num_experts, bias=False) if constraint is None and config.noise else None
    return SparseGateRouter(scores, num_experts, noise, constraint)


def _projection(before: int, after: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))


def _initialised(module: nn.Module) -> nn.Module:
    """As torchvision's ResNets begin."""
    for each in module.modules():
        if isinstance(each, nn.Conv2d):
            nn.init.kaiming_normal_(each.weight, mode="fan_out", nonlinearity="relu")
    return module
