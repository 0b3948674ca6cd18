"""Networks with layers of experts by name."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from hardmoe.models.moe.config import MoeConfig
from hardmoe.models.moe.networks import convnext, resnet, vit

NAMES = (
    "moe_resnet18",
    "moe_resnet50",
    "moe_convnext_tiny",
    "moe_convnext_small",
    "moe_convnext_base",
    "moe_vit_small",
    "moe_vit_base",
    "vmoe_xs4",
    "vmoe_s4",
    "vmoe_s32",
    "vmoe_b32",
    "vmoe_b16",
    "vmoe_l32",
    "vmoe_l16",
    "vmoe_h14",
)
_PATCH = 16
"""Of the sweet spot's transformers, in pixels."""


@dataclass(frozen=True)
class MoeRecipe:
    """How one is made: the dense network, where the experts go, and what is so unless the config says otherwise."""

    dense: Callable[[int], nn.Module]
    """From the image's size; in three steps, so that a stem can be exchanged in between."""
    place: Callable[[nn.Module, MoeConfig], None]
    defaults: MoeConfig

    def put_experts(self, network: nn.Module, config: MoeConfig | None) -> None:
        """Put layers of experts into the dense network.

        Raises:
            RecipeError: the config does not go with this network.
        """
        self.place(network, (config or MoeConfig()).over(self.defaults))


def moe_recipe(name: str) -> MoeRecipe | None:
    """How the network of this name is made; None if it is no network with experts."""
    if match := re.fullmatch(r"vmoe_(xs|s|b|l|h)([1-9]\d*)", name):
        shape, patch = vit.VMOE[match[1]], int(match[2])
        return MoeRecipe(lambda size: vit.transformer(shape, patch, size), vit.place_in_transformer, vit.VMOE_DEFAULTS)
    if match := re.fullmatch(r"moe_vit_(small|base)", name):
        shape = vit.SWEET_SPOT[match[1]]
        return MoeRecipe(lambda size: vit.transformer(shape, _PATCH, size), vit.place_in_transformer, vit.SWEET_SPOT_DEFAULTS)
    if match := re.fullmatch(r"moe_convnext_(tiny|small|base)", name):
        which = match[1]
        return MoeRecipe(lambda _: convnext.convnext(which), convnext.place_in_convnext, convnext.CONVNEXT_DEFAULTS)
    if match := re.fullmatch(r"moe_resnet(18|50)", name):
        depth = int(match[1])
        return MoeRecipe(
            lambda _: resnet.resnet(depth),
            lambda network, config: resnet.place_in_resnet(network, depth, config),
            resnet.RESNET_DEFAULTS,
        )
    return None
