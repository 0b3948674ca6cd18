"""Items in groups that are routed on their own; any number of images, the last groups filled up and masked.

Shape letters: B images, T items of an image, G groups, S items of a group, X shape of an item.
"""

import torch
from torch import Tensor

from hardmoe.errors import HardmoeError


def group(items_BTX: Tensor, group_images: int) -> tuple[Tensor, Tensor]:
    """Divide a batch into groups of at most `group_images` images each, as even as can be.

    Nine images in groups of eight are five and four, not eight and one. Rejected: refusing such a batch, as V-MoE's code does,
    whose users cannot predict one image.

    Returns:
        Items [G, S, X], zeros where there is no image; and which of them there are, bool [G, S].

    Raises:
        HardmoeError: there are no images.
    """
    batch, items = items_BTX.shape[:2]
    if batch == 0:
        raise HardmoeError("a layer of experts was given a batch of no images; give it one image at least")
    num_groups = -(-batch // group_images)
    per_group = -(-batch // num_groups)
    missing = num_groups * per_group - batch
    if missing:
        items_BTX = torch.cat([items_BTX, items_BTX.new_zeros(missing, *items_BTX.shape[1:])])
    valid_B = torch.arange(num_groups * per_group, device=items_BTX.device) < batch
    items_GSX = items_BTX.reshape(num_groups, per_group * items, *items_BTX.shape[2:])
    return items_GSX, valid_B[:, None].expand(-1, items).reshape(num_groups, per_group * items)


def ungroup(outputs_GSY: Tensor, batch: int, items: int) -> Tensor:
    """The inverse: [G, S, Y] to [B, T, Y], without what filled up."""
    return outputs_GSY.reshape(-1, items, *outputs_GSY.shape[2:])[:batch]
