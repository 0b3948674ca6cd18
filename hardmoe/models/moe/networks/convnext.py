"""ConvNeXts with layers of experts: in some blocks the pointwise MLP becomes experts, and a shortcut leads around them.

The depthwise convolution and the normalisation before the MLP are shared; every pixel of a map is routed for itself (Videau et
al., arXiv 2411.18322, figure 1b).
"""

from typing import Any

from torch import Tensor, nn

from hardmoe.models.moe.config import MoeConfig
from hardmoe.models.moe.layer import MoeLayer
from hardmoe.models.moe.networks.placement import staged_blocks
from hardmoe.models.moe.networks.tokens import DEFAULTS, token_layer

CONVNEXT_DEFAULTS = MoeConfig(num_experts=4, k=1, mlp_ratio=2.0, priority=True).over(DEFAULTS)
_MLP = slice(3, 6)
"""Linear, GELU, linear in torchvision's block."""


class ShortcutLayer(MoeLayer):
    """A layer of experts with a shortcut around it."""

    def forward(self, inputs_BHWD: Tensor) -> Tensor:
        """Inputs plus what the experts make of them."""
        return inputs_BHWD + super().forward(inputs_BHWD)


def convnext(size: str) -> nn.Module:
    """Torchvision's, dense."""
    import torchvision

    network: nn.Module = torchvision.models.get_model(f"convnext_{size}", weights=None)
    return network


def place_in_convnext(network: nn.Module, config: MoeConfig) -> None:
    """Put layers of experts in the places of MLPs."""
    features: Any = network.get_submodule("features")
    stages = list(features)[1::2]
    for stage, index in staged_blocks(config.placement or "", [len(blocks) for blocks in stages]):
        block = stages[stage][index]
        pieces = list(block.block)
        first, _, second = pieces[_MLP]
        hidden = round(first.in_features * (config.mlp_ratio or 0.0))
        if hidden != first.out_features:
            first, second = _linear(first.in_features, hidden), _linear(hidden, second.out_features)
        layer = token_layer(first, second, config, ShortcutLayer)
        layer.dense_names = ("3", "5")
        block.block = nn.Sequential(*pieces[:3], layer, *pieces[6:])


def _linear(before: int, after: int) -> nn.Linear:
    """As ConvNeXt begins."""
    layer = nn.Linear(before, after)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer
