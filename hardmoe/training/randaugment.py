"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719) of a batch, with operations of its own for every image.

All of an operation's images have the same strength and one of two signs, so they share a call of torchvision's kernel: about
20 calls for each round, whatever the batch size. torchvision's own `RandAugment` gives all images of a batch the same
operations. The strengths and the operations are torchvision's, nearest-neighbour interpolation and black borders too.

Shape letters: B batch, S side in pixels.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as kernels

_STRONGEST = 30
Operation = Callable[[Tensor, float, int], Tensor]
"""Of images uint8 [n, 3, S, S], a signed strength as a share of the strongest, and S."""


def _sheared(images: Tensor, strength: float, side: int, *, down: bool) -> Tensor:
    degrees = math.degrees(math.atan(0.3 * strength))
    shear = [0.0, degrees] if down else [degrees, 0.0]
    sheared: Tensor = kernels.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0, 0])
    return sheared


def _translated(images: Tensor, strength: float, side: int, *, down: bool) -> Tensor:
    pixels = int(150 / 331 * side * strength)
    translate = [0, pixels] if down else [pixels, 0]
    translated: Tensor = kernels.affine(images, angle=0.0, translate=translate, scale=1.0, shear=[0.0, 0.0])
    return translated


_SIGNED: dict[str, Operation] = {
    "shear_x": partial(_sheared, down=False),
    "shear_y": partial(_sheared, down=True),
    "translate_x": partial(_translated, down=False),
    "translate_y": partial(_translated, down=True),
    "rotate": lambda images, strength, side: kernels.rotate(images, 30 * strength),
    "brightness": lambda images, strength, side: kernels.adjust_brightness(images, 1 + 0.9 * strength),
    "colour": lambda images, strength, side: kernels.adjust_saturation(images, 1 + 0.9 * strength),
    "contrast": lambda images, strength, side: kernels.adjust_contrast(images, 1 + 0.9 * strength),
    "sharpness": lambda images, strength, side: kernels.adjust_sharpness(images, 1 + 0.9 * strength),
}
_UNSIGNED: dict[str, Operation] = {
    "identity": lambda images, strength, side: images,
    "posterize": lambda images, strength, side: kernels.posterize(images, 8 - round(4 * strength)),
    "solarize": lambda images, strength, side: kernels.solarize(images, 255 * (1 - strength)),
    "autocontrast": lambda images, strength, side: kernels.autocontrast(images),
    "equalize": lambda images, strength, side: kernels.equalize(images),
}
OPERATIONS: dict[str, Operation] = _SIGNED | _UNSIGNED


def randaugment(images_B3SS: Tensor, rounds: int, magnitude: int, generator: torch.Generator) -> Tensor:
    """Operations drawn for every image, one a round.

    Args:
        images_B3SS: uint8, on any device.
        rounds: operations on each image.
        magnitude: their strength, 0 to 30.
        generator: on the CPU.

    Returns:
        uint8 [B, 3, S, S].
    """
    names, num = list(OPERATIONS), len(images_B3SS)
    drawn_RB = torch.randint(len(names), (rounds, num), generator=generator)
    negative_RB = torch.rand(rounds, num, generator=generator) < 0.5
    images_B3SS = images_B3SS.clone()
    for drawn_B, negative_B in zip(drawn_RB, negative_RB, strict=True):
        for index, name in enumerate(names):
            signs = (1.0, -1.0) if name in _SIGNED else (1.0,)
            for sign in signs:
                chosen_B = (drawn_B == index) & (negative_B == (sign < 0) if name in _SIGNED else True)
                rows = chosen_B.nonzero()[:, 0].to(images_B3SS.device)
                if len(rows) and name != "identity":
                    images_B3SS[rows] = OPERATIONS[name](images_B3SS[rows], sign * magnitude / _STRONGEST, images_B3SS.shape[-1])
    return images_B3SS
