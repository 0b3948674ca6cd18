"""How large a backbone is and how many floating-point operations an image costs in it, counted on shapes alone.

Products only (convolutions, matrix products, attention), two operations for a multiplication and an addition, as the field
counts. The network runs on torch's `meta` device, where nothing is computed. Rejected: formulas per architecture, which are wrong
about the first network that somebody adds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hardmoe.models.backbones import Backbone, build_backbone
from hardmoe.models.branching import split


@dataclass(frozen=True)
class BackboneSize:
    """Of a backbone, and of its stages up to the one where experts branch off (0 without one)."""

    flops: int
    """Of one image."""
    parameters: int
    shared_flops: int = 0
    shared_parameters: int = 0


def measure_backbone(name: str, *, image_size: int, stem: str = "auto", branch_at: str | None = None) -> BackboneSize:
    """Count a backbone's parameters and the operations of one image.

    Args:
        name: as for `build_backbone`.
        image_size: height and width, in pixels.
        stem: as for `build_backbone`.
        branch_at: the last stage that is shared; None for none.

    Raises:
        RecipeError: there is no such backbone or stage.
    """
    try:
        # The user's own code need not work without content, and torchvision's RegNets compute while they are built.
        with torch.device("cpu" if ":" in name else "meta"):
            backbone = build_backbone(name, image_size=image_size, seed=0, stem=stem)
    except NotImplementedError:
        backbone = build_backbone(name, image_size=image_size, seed=0, stem=stem)
    return _measured(backbone, image_size, name, branch_at)


def _measured(backbone: Backbone, image_size: int, name: str, branch_at: str | None) -> BackboneSize:
    device = next(backbone.parameters()).device
    image_13HW = torch.zeros(1, 3, image_size, image_size, device=device)
    flops, parameters = _flops(backbone.eval(), image_13HW), _parameters(backbone)
    if branch_at is None:
        return BackboneSize(flops, parameters)
    shared = split(backbone, branch_at, name).shared
    return BackboneSize(flops, parameters, _flops(shared, image_13HW), _parameters(shared))


def _flops(module: nn.Module, image_13HW: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(image_13HW)
    return int(counter.get_total_flops())


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
