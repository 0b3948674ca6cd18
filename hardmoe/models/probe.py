"""A look at a backbone before anything is started: does it exist, does it take images of this size, how wide is it?

The network is built and run on torch's `meta` device, where weights and activations have shapes and no content: a ViT-H costs
a fraction of a second and no memory, and a misspelt name is told before a terabyte is ingested. Rejected: a table of names,
sizes and widths, which would be wrong about the first network that somebody adds.
"""

import torch

from hardmoe.errors import RecipeError
from hardmoe.models.backbones import build_backbone
from hardmoe.models.branching import split
from hardmoe.models.moe.config import MoeConfig


def probe_backbone(name: str, *, image_size: int, stem: str = "auto", moe: MoeConfig | None = None) -> int | None:
    """The width of a backbone's features; None where it can be known only by training it.

    Raises:
        RecipeError: there is no such backbone, or it does not go with the image size, the stem or the experts.
    """
    if ":" in name:
        # The user's own code need not work without content, so it is run as it is.
        return build_backbone(name, image_size=image_size, seed=0, stem=stem, moe=moe).num_features
    try:
        with torch.device("meta"), torch.no_grad():
            backbone = build_backbone(name, image_size=image_size, seed=0, stem=stem, moe=moe).eval()
            backbone(torch.zeros(2, 3, image_size, image_size))
    except NotImplementedError:
        # Torchvision's RegNets compute with their initial weights while they are being built.
        return None
    except RuntimeError as error:
        raise RecipeError(
            f"the backbone '{name}' cannot be run on images of {image_size} pixels ({str(error).splitlines()[0]}); "
            "raise trunk.image_size or choose another backbone"
        ) from error
    return backbone.num_features


def check_branch(name: str, stage: str, *, image_size: int, stem: str = "auto", moe: MoeConfig | None = None) -> None:
    """Whether a network can be cut behind a stage.

    Raises:
        RecipeError: it cannot.
    """
    with torch.device("meta"):
        split(build_backbone(name, image_size=image_size, seed=0, stem=stem, moe=moe), stage, name)
