"""Augmentation of training images: on the device, whole batches at a time, with parameters of its own for every image.

What is drawn is a function of (seed, step) alone, option by option, so a resumed training sees the same pixels, another
attempt draws the same, and turning one option on changes nothing about the others. It is drawn on the CPU, a few numbers for each
image, so that a GPU gets the same.

Crop and flip are one call of torch's bilinear `grid_sample`, with a grid for every image that stays inside its crop: the result
of torchvision's `resized_crop` for each. torchvision's own transforms draw one set of parameters for a batch, from the global
generator; its kernels are used wherever images can share a call (see `randaugment`), and imported where jitter or RandAugment is
on, since features of a network of one's own need none of it. Rejected: a loop over images, and two
interpolation matrices for each image, which are exact too.

Milliseconds of one CPU core for 256 images of 32 / 64 pixels: crop and flip 4.5 / 16 (torchvision, image by image, 43 / 49),
jitter 3.8 / 13, two rounds of RandAugment 16 / 35, mixing 0.3 / 2.6. A step of quicknet_w24 takes 300 / 1,100, one of resnet18
15,000 at 32: crop, flip and jitter are 3 % of the first and 0.1 % of the second, with RandAugment 8 % and 0.2 %.

Shape letters: B batch, S side in pixels, V tags.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from hardmoe.hashing import derive_seed
from hardmoe.training.config import AugmentConfig

_PIECE = 1 << 18
"""Values that a CPU changes at a time, so that what lies between two operations stays in its cache: half the time at 64 px."""
_TRIES = 10
"""Crops drawn for an image before it is left whole, as in torchvision; with crop: 0.35 one in 10^7 is."""


def augment_images(images_B3SS: Tensor, config: AugmentConfig, seed: int, step: int) -> Tensor:
    """Crop, flip, jitter and RandAugment a batch.

    Args:
        images_B3SS: uint8, on the device.
        config: what of it is on.
        seed: the training's.
        step: 0 for the first.

    Returns:
        uint8 [B, 3, S, S]; the batch itself if nothing is on, else another one.
    """
    if config.crop is not None or config.flip or config.jitter:
        images_B3SS = _drawn(len(images_B3SS), images_B3SS.shape[-1], config, seed, step).applied_to(images_B3SS)
    if config.randaugment:
        from hardmoe.training.randaugment import randaugment

        images_B3SS = randaugment(images_B3SS, config.randaugment, config.magnitude, _generator(seed, "randaugment", step))
    return images_B3SS


@dataclass(frozen=True)
class _Drawn:
    """What crop, flip and jitter do to each image of a batch; None for nothing."""

    boxes_B4: Tensor | None
    flips_B: Tensor
    factors_B3: Tensor | None

    def applied_to(self, images_B3SS: Tensor) -> Tensor:
        """The changed batch, uint8; on a CPU piece by piece."""
        on_cpu = images_B3SS.device.type == "cpu"
        rows = max(1, _PIECE // images_B3SS[0].numel()) if on_cpu else len(images_B3SS)
        changed_B3SS = torch.empty_like(images_B3SS)
        for start in range(0, len(images_B3SS), rows):
            changed_B3SS[start : start + rows] = self._piece(images_B3SS[start : start + rows], slice(start, start + rows))
        return changed_B3SS

    def _piece(self, images_n3SS: Tensor, rows: slice) -> Tensor:
        device = images_n3SS.device
        flips_n = self.flips_B[rows].to(device)
        if self.boxes_B4 is not None:
            pixels_n3SS = resized_crops(images_n3SS, self.boxes_B4[rows].to(device), flips_n)
        else:
            pixels_n3SS = torch.where(flips_n[:, None, None, None], images_n3SS.flip(-1), images_n3SS)
        if self.factors_B3 is not None:
            pixels_n3SS = jittered(pixels_n3SS.float(), self.factors_B3[rows].to(device))
        return pixels_n3SS.round_() if pixels_n3SS.is_floating_point() else pixels_n3SS


def _drawn(num: int, side: int, config: AugmentConfig, seed: int, step: int) -> _Drawn:
    boxes_B4, flips_B, factors_B3 = None, torch.zeros(num, dtype=torch.bool), None
    if config.crop is not None:
        boxes_B4 = random_crops(num, side, config.crop, config.crop_ratio, _generator(seed, "crop", step))
    if config.flip:
        flips_B = torch.rand(num, generator=_generator(seed, "flip", step)) < 0.5
    if config.jitter:
        factors_B3 = torch.rand(num, 3, generator=_generator(seed, "jitter", step)) * 2 * config.jitter + (1 - config.jitter)
    return _Drawn(boxes_B4, flips_B, factors_B3)


def random_crops(num: int, side: int, least_area: float, most_ratio: float, generator: torch.Generator) -> Tensor:
    """Boxes of random resized crops of square images: area uniform in [least_area, 1], aspect ratio log-uniform, place uniform.

    Returns:
        int64 [num, 4]: top, left, height, width, all in whole pixels.
    """
    areas_TB = torch.empty(_TRIES, num).uniform_(least_area, 1, generator=generator) * side**2
    ratios_TB = torch.empty(_TRIES, num).uniform_(-1, 1, generator=generator).mul_(np.log(most_ratio)).exp_()
    places_B2 = torch.rand(num, 2, generator=generator)
    widths_TB, heights_TB = (areas_TB * ratios_TB).sqrt().round(), (areas_TB / ratios_TB).sqrt().round()
    fits_TB = (widths_TB <= side) & (heights_TB <= side) & (widths_TB >= 1) & (heights_TB >= 1)
    first_1B = fits_TB.int().argmax(dim=0, keepdim=True)
    sizes_B2 = torch.stack([heights_TB.gather(0, first_1B)[0], widths_TB.gather(0, first_1B)[0]], dim=1)
    sizes_B2 = torch.where(fits_TB.any(dim=0)[:, None], sizes_B2, float(side))
    corners_B2 = (places_B2 * (side - sizes_B2 + 1)).floor()
    return torch.cat([corners_B2, sizes_B2], dim=1).long()


def resized_crops(images_B3SS: Tensor, boxes_B4: Tensor, flips_B: Tensor) -> Tensor:
    """Every image's own box, enlarged to the whole image by bilinear interpolation, mirrored where asked.

    Args:
        images_B3SS: any type, on the device.
        boxes_B4: as from `random_crops`, on the device.
        flips_B: bool, on the device.

    Returns:
        float32 [B, 3, S, S].
    """
    num, side = len(images_B3SS), images_B3SS.shape[-1]
    tops_B, lefts_B, heights_B, widths_B = boxes_B4.unbind(dim=1)
    columns_BS = _places(lefts_B, widths_B, flips_B, side)[:, None, :].expand(num, side, side)
    rows_BS = _places(tops_B, heights_B, torch.zeros_like(flips_B), side)[:, :, None].expand(num, side, side)
    grid_BSS2 = torch.stack([columns_BS, rows_BS], dim=3)
    return grid_sample(images_B3SS.float(), grid_BSS2, mode="bilinear", padding_mode="border", align_corners=False)


def _places(starts_B: Tensor, lengths_B: Tensor, flips_B: Tensor, side: int) -> Tensor:
    """Where each new pixel of one axis lies in the image, float32 [B, S], in `grid_sample`'s coordinates."""
    pixels_S = torch.arange(side, device=starts_B.device, dtype=torch.float32)
    order_BS = torch.where(flips_B[:, None], side - 1 - pixels_S, pixels_S)
    places_BS = (order_BS + 0.5) * (lengths_B / side)[:, None] - 0.5
    # Held inside the crop, so that no pixel from beyond it has a weight.
    places_BS = torch.minimum(places_BS.clamp_min_(0), (lengths_B - 1)[:, None]) + starts_B[:, None]
    return (2 * places_BS + 1) / side - 1


def jittered(pixels_B3SS: Tensor, factors_B3: Tensor) -> Tensor:
    """Brightness, contrast, saturation by each image's own factors, clamped to [0, 255] after each; float32, in place."""
    from torchvision.transforms.v2.functional import rgb_to_grayscale

    brightness_B111, contrast_B111, saturation_B111 = factors_B3[:, :, None, None, None].unbind(dim=1)
    pixels_B3SS.mul_(brightness_B111).clamp_(0, 255)
    means_B111 = rgb_to_grayscale(pixels_B3SS).mean(dim=(1, 2, 3), keepdim=True)
    pixels_B3SS.mul_(contrast_B111).add_(means_B111 * (1 - contrast_B111)).clamp_(0, 255)
    grey_B1SS = rgb_to_grayscale(pixels_B3SS)
    return pixels_B3SS.mul_(saturation_B111).add_(grey_B1SS * (1 - saturation_B111)).clamp_(0, 255)


@dataclass(frozen=True)
class Mix:
    """How a batch is mixed with itself, moved by one image."""

    share: float
    """Of each image that stays its own."""
    box: tuple[int, int, int, int] | None = None
    """Top, left, bottom, right of what comes from the image before; None blends all of it."""

    def images(self, images_B3SS: Tensor) -> Tensor:
        """The mixed images, float [B, 3, S, S], channels last as they came."""
        images_BSS3 = images_B3SS.permute(0, 2, 3, 1)  # `roll` gives up any other layout
        if self.box is None:
            return images_BSS3.lerp(images_BSS3.roll(1, dims=0), 1 - self.share).permute(0, 3, 1, 2)
        top, left, bottom, right = self.box
        mixed_BSS3 = images_BSS3.clone()
        mixed_BSS3[:, top:bottom, left:right] = images_BSS3[:, top:bottom, left:right].roll(1, dims=0)
        return mixed_BSS3.permute(0, 3, 1, 2)

    def targets(self, targets_BV: Tensor) -> Tensor:
        """Their targets, float32 [B, V]; what summed to 1 does so still."""
        return targets_BV.lerp(targets_BV.roll(1, dims=0), 1 - self.share)

    def larger(self, values_B: Tensor) -> Tensor:
        """Of values of the images, [B], those of the one that has the larger share of each mixed image."""
        return values_B if self.share >= 0.5 else values_B.roll(1, dims=0)


def draw_mix(config: AugmentConfig, side: int, seed: int, step: int) -> Mix | None:
    """What mixup or CutMix does at a step; None where both are off."""
    if not config.mixup and not config.cutmix:
        return None
    chance = np.random.default_rng(derive_seed(seed, "augment", "mix", step))
    cut = bool(config.cutmix) and (not config.mixup or bool(chance.random() < 0.5))
    alpha = config.cutmix if cut else config.mixup
    share = float(chance.beta(alpha, alpha))
    if not cut:
        return Mix(share)
    half = 0.5 * side * np.sqrt(1 - share)
    centre_2 = chance.integers(0, side, 2)
    top, left = np.clip(np.round(centre_2 - half), 0, side).astype(int).tolist()
    bottom, right = np.clip(np.round(centre_2 + half), 0, side).astype(int).tolist()
    # What lies beyond the edge is cut off, so the share is that of the rectangle that is left.
    return Mix(1 - (bottom - top) * (right - left) / side**2, (top, left, bottom, right))


def _generator(seed: int, option: str, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, "augment", option, step))
