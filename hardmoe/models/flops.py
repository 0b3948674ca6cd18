"""How large a backbone is and how many floating-point operations an image costs in it, counted on shapes alone.

Products only (convolutions, matrix products, attention), two operations for a multiplication and an addition, as the field
counts. The network runs on torch's `meta` device, where nothing is computed. Rejected: formulas per architecture, which are wrong
about the first network that somebody adds. Experts within layers count with the items that they take at most in an even or uneven
routing alike: the k choices of every item, as far as there are slots for them.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hardmoe.models.backbones import Backbone, build_backbone
from hardmoe.models.branching import split
from hardmoe.models.moe.config import MoeConfig
from hardmoe.models.moe.layer import MoeLayer, as_in_training, moe_layers


@dataclass(frozen=True)
class BackboneSize:
    """Of a backbone, and of its stages up to the one where experts branch off (0 without one)."""

    flops: int
    """Of one image in use."""
    parameters: int
    shared_flops: int = 0
    shared_parameters: int = 0
    inactive_parameters: int = 0
    """Of `parameters` without the shared ones, those that one image does not pass: (E - k) / E of those of layers with E
    experts."""
    shared_inactive_parameters: int = 0
    """Of the shared ones, the same."""
    routed_flops: int = 0
    """Of `flops` without the shared ones, those of experts within layers."""
    shared_routed_flops: int = 0
    """Of the shared ones, the same."""
    spared_flops: int = 0
    """Of `flops`, what a forward pass in training does not compute, as experts have fewer slots then."""


def measure_backbone(
    name: str, *, image_size: int, stem: str = "auto", branch_at: str | None = None, moe: MoeConfig | None = None
) -> BackboneSize:
    """Count a backbone's parameters and the operations of one image.

    Args:
        name: as for `build_backbone`.
        image_size: height and width, in pixels.
        stem: as for `build_backbone`.
        branch_at: the last stage that is shared; None for none.
        moe: as for `build_backbone`.

    Raises:
        RecipeError: there is no such backbone or stage.
    """
    try:
        # The user's own code need not work without content, and torchvision's RegNets compute while they are built.
        with torch.device("cpu" if ":" in name else "meta"):
            backbone = build_backbone(name, image_size=image_size, seed=0, stem=stem, moe=moe)
    except NotImplementedError:
        backbone = build_backbone(name, image_size=image_size, seed=0, stem=stem, moe=moe)
    return _measured(backbone, image_size, name, branch_at)


def _measured(backbone: Backbone, image_size: int, name: str, branch_at: str | None) -> BackboneSize:
    device = next(backbone.parameters()).device
    image_13HW = torch.zeros(1, 3, image_size, image_size, device=device)
    flops, parameters = _flops(backbone.eval(), image_13HW), _parameters(backbone)
    size = BackboneSize(flops, parameters)
    shared = None if branch_at is None else split(backbone, branch_at, name).shared
    if shared is not None:
        size = replace(size, shared_flops=_flops(shared, image_13HW), shared_parameters=_parameters(shared))
    layers = [layer for _, layer in moe_layers(backbone)]
    if not layers:
        return size
    common = set() if shared is None else {layer for _, layer in moe_layers(shared)}
    routed = _routed_flops(backbone, image_13HW)
    size = replace(
        size,
        inactive_parameters=sum(_inactive(layer) for layer in layers if layer not in common),
        shared_inactive_parameters=sum(_inactive(layer) for layer in common),
        routed_flops=sum(count for layer, count in routed.items() if layer not in common),
        shared_routed_flops=sum(count for layer, count in routed.items() if layer in common),
    )
    # Slots are rounded up in whole groups.
    group_images = layers[0].plan.group_images if layers[0].item_dims == 1 else 1
    with as_in_training(backbone):
        trained = _flops(backbone, image_13HW.expand(group_images, -1, -1, -1)) // group_images
    return replace(size, spared_flops=max(0, flops - trained))


def _flops(module: nn.Module, images_B3HW: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(images_B3HW)
    return int(counter.get_total_flops())


def _routed_flops(backbone: Backbone, image_13HW: Tensor) -> dict[MoeLayer, int]:
    """Of one image, in the experts of each layer; one that is alone is every item's, so nothing is routed there."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(image_13HW)
    counts = counter.get_flop_counts()
    return {
        layer: sum(counts[f"{type(backbone).__name__}.{name}.experts"].values()) if layer.num_experts > 1 else 0
        for name, layer in moe_layers(backbone)
    }


def _inactive(layer: MoeLayer) -> int:
    return _parameters(layer.experts) * (layer.num_experts - layer.num_active) // layer.num_experts


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
