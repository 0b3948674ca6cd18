"""Transformers whose MLP is a layer of experts in some blocks: V-MoE's shapes, and those of the sweet spot.

V-MoE's S is not the usual small transformer: 8 blocks of width 512, where `moe_vit_small` has 12 of width 384. A block is
`x + MoE(LN(x))`, so an item that no expert takes goes on as it is.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from hardmoe.models.moe.config import MoeConfig
from hardmoe.models.moe.networks.placement import transformer_blocks
from hardmoe.models.moe.networks.tokens import DEFAULTS, token_layer


@dataclass(frozen=True)
class Shape:
    """Of a transformer."""

    width: int
    depth: int
    hidden: int
    heads: int


VMOE = {
    "xs": Shape(192, 6, 768, 3),
    "s": Shape(512, 8, 2048, 8),
    "b": Shape(768, 12, 3072, 12),
    "l": Shape(1024, 24, 4096, 16),
    "h": Shape(1280, 32, 5120, 16),
}
"""Riquelme et al., arXiv 2106.05974, appendix B, and one size for images of 32 pixels."""
SWEET_SPOT = {"small": Shape(384, 12, 1536, 6), "base": Shape(768, 12, 3072, 12)}

VMOE_DEFAULTS = MoeConfig(placement="every2", num_experts=32).over(DEFAULTS)
SWEET_SPOT_DEFAULTS = MoeConfig(priority=True).over(DEFAULTS)


def transformer(shape: Shape, patch_size: int, image_size: int) -> nn.Module:
    """Torchvision's, dense."""
    from torchvision.models.vision_transformer import VisionTransformer

    network: nn.Module = VisionTransformer(image_size, patch_size, shape.depth, shape.heads, shape.width, shape.hidden)
    return network


def place_in_transformer(network: nn.Module, config: MoeConfig) -> None:
    """Put layers of experts in the places of MLPs."""
    from torchvision.models.vision_transformer import MLPBlock

    blocks: Any = network.get_submodule("encoder.layers")
    for index in transformer_blocks(config.placement or "", len(blocks)):
        dense = blocks[index].mlp
        width, ratio = dense[0].in_features, config.mlp_ratio or 0.0
        if round(width * ratio) != dense[0].out_features:
            dense = MLPBlock(width, round(width * ratio), 0.0)
        layer = token_layer(dense[0], dense[3], config)
        layer.dense_names = ("mlp.0", "mlp.3")
        blocks[index].mlp = layer
