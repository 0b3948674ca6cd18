"""Augmentation of a batch against torchvision's kernels, image by image, with the same parameters."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import RandAugment
from torchvision.transforms.v2 import functional as kernels

from hardmoe.training.augment import Mix, augment_images, draw_mix, jittered, random_crops, resized_crops
from hardmoe.training.config import AugmentConfig
from hardmoe.training.randaugment import OPERATIONS, randaugment

EVERYTHING = AugmentConfig(crop=0.3, flip=True, jitter=0.4, randaugment=2, mixup=0.2, cutmix=1.0)


def make_images(num: int = 12, side: int = 16, seed: int = 0) -> torch.Tensor:
    """Smooth shapes and noise, so that neither interpolation nor histograms are trivial."""
    chance = np.random.default_rng(seed)
    waves = 60 * np.sin(np.arange(side) / chance.uniform(1, 4, (num, 3, 1, 1)))[:, :, :, :] + 120
    return torch.from_numpy(np.clip(waves + chance.normal(0, 20, (num, 3, side, side)), 0, 255).astype(np.uint8))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_crops_and_flips_are_torchvisions_of_each_image() -> None:
    images = make_images(40)
    boxes = random_crops(40, 16, 0.05, 1.5, generator())
    flips = torch.arange(40) % 3 == 0
    found = resized_crops(images, boxes, flips)
    for row, (top, left, height, width) in enumerate(boxes.tolist()):
        expected = kernels.resized_crop(images[row].float(), top, left, height, width, [16, 16], antialias=True)
        expected = kernels.horizontal_flip(expected) if flips[row] else expected
        torch.testing.assert_close(found[row], expected, rtol=0, atol=2e-3)


def test_crop_of_the_whole_image_changes_nothing() -> None:
    images = make_images()
    boxes = torch.tensor([[0, 0, 16, 16]]).repeat(12, 1)
    assert torch.equal(resized_crops(images, boxes, torch.zeros(12, dtype=torch.bool)).round(), images.float())


@pytest.mark.parametrize(("least", "ratio"), [(0.08, 1.3333), (0.5, 1.0), (1.0, 2.0), (0.001, 4.0)])
def test_crops_lie_in_the_image_and_within_their_bounds(least: float, ratio: float) -> None:
    side = 32
    tops, lefts, heights, widths = random_crops(4000, side, least, ratio, generator()).double().unbind(dim=1)
    assert tops.min() >= 0 and lefts.min() >= 0
    assert (tops + heights).max() <= side and (lefts + widths).max() <= side
    assert min(heights.min(), widths.min()) >= 1
    # Half a pixel of rounding on either side.
    assert ((heights + 0.5) * (widths + 0.5)).min() >= least * side**2
    assert ((widths - 0.5) / (heights + 0.5)).max() <= ratio and ((heights - 0.5) / (widths + 0.5)).max() <= ratio


def test_crops_areas_and_places_are_uniform() -> None:
    boxes = random_crops(20000, 256, 0.2, 1.0, generator()).double().numpy()
    areas = boxes[:, 2] * boxes[:, 3] / 256**2
    assert np.quantile(areas, [0.25, 0.5, 0.75]) == pytest.approx([0.4, 0.6, 0.8], abs=0.02)
    room = 256 - boxes[:, 2]
    places = boxes[:, :2][room > 50] / room[room > 50, None]
    assert places.mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.02)


def test_jitter_is_torchvisions_three_kernels_on_each_image() -> None:
    images = make_images()
    factors = torch.rand(12, 3, generator=generator()) * 1.6 + 0.2
    found = jittered(images.float(), factors)
    for row, (brightness, contrast, saturation) in enumerate(factors.tolist()):
        expected = kernels.adjust_brightness(images[row].float() / 255, brightness)
        expected = kernels.adjust_contrast(expected, contrast)
        expected = kernels.adjust_saturation(expected, saturation)
        torch.testing.assert_close(found[row] / 255, expected, rtol=0, atol=1e-5)


TORCHVISION_NAMES = {
    "identity": "Identity",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "colour": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
}


@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("name", TORCHVISION_NAMES)
def test_operation_of_randaugment_is_torchvisions_at_both_signs(name: str, magnitude: int) -> None:
    images, theirs = make_images(), RandAugment()
    strengths, signed = theirs._AUGMENTATION_SPACE[TORCHVISION_NAMES[name]]
    table = strengths(31, 16, 16)
    for sign in (1, -1) if signed else (1,):
        strength = 0.0 if table is None else float(table[magnitude]) * sign
        expected = theirs._apply_image_or_video_transform(
            images, TORCHVISION_NAMES[name], strength, interpolation=theirs.interpolation, fill=theirs._fill
        )
        # A factor of 1.27 in float32 and in float64 may round one grey value differently.
        torch.testing.assert_close(OPERATIONS[name](images, sign * magnitude / 30, 16), expected, rtol=0, atol=1)


def test_every_operation_of_randaugment_is_one_of_torchvisions_and_none_is_missing() -> None:
    assert set(TORCHVISION_NAMES) == set(OPERATIONS)
    assert set(TORCHVISION_NAMES.values()) == set(RandAugment._AUGMENTATION_SPACE)


def test_randaugment_gives_each_image_operations_of_its_own() -> None:
    """The same image throughout: one round shows it as it is after each operation and sign, alone as in the batch."""
    image = make_images(1)
    signed = {name for name, theirs in TORCHVISION_NAMES.items() if RandAugment._AUGMENTATION_SPACE[theirs][1]}
    outcomes = {
        OPERATIONS[name](image, sign * 0.3, 16).numpy().tobytes()
        for name in OPERATIONS
        for sign in ((1, -1) if name in signed else (1,))
    }
    found = randaugment(image.repeat(400, 1, 1, 1), 1, 9, generator())
    seen = {row.numpy().tobytes() for row in found}
    assert seen <= outcomes
    assert len(seen) >= 20
    assert torch.equal(randaugment(image.repeat(400, 1, 1, 1), 1, 9, generator()), found)


def test_augmentation_is_a_function_of_seed_and_step() -> None:
    images = make_images()
    kept = images.clone()
    first = augment_images(images, EVERYTHING, 3, 17)
    torch.rand(5)
    assert torch.equal(augment_images(images, EVERYTHING, 3, 17), first)
    assert torch.equal(images, kept), "the batch itself is left alone"
    assert first.dtype == torch.uint8
    assert not torch.equal(augment_images(images, EVERYTHING, 3, 18), first)
    assert not torch.equal(augment_images(images, EVERYTHING, 4, 17), first)


def test_a_batch_that_is_changed_in_pieces_is_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    images, config = make_images(30), AugmentConfig(crop=0.3, flip=True, jitter=0.4)
    whole = augment_images(images, config, 0, 0)
    monkeypatch.setattr("hardmoe.training.augment._PIECE", 7 * 3 * 16 * 16)
    assert torch.equal(augment_images(images, config, 0, 0), whole)


def test_augmentation_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    augment_images(make_images(), EVERYTHING, 0, 0)
    draw_mix(EVERYTHING, 16, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_on_returns_the_batch_itself() -> None:
    images = make_images()
    assert augment_images(images, AugmentConfig(), 0, 0) is images
    assert draw_mix(AugmentConfig(), 16, 0, 0) is None


def test_an_option_draws_the_same_whatever_else_is_on() -> None:
    """Flips with and without crops of the whole image are the same flips."""
    images = make_images()
    alone = augment_images(images, AugmentConfig(flip=True), 0, 5)
    with_crop = augment_images(images, AugmentConfig(flip=True, crop=1.0, crop_ratio=1.0), 0, 5)
    assert torch.equal(alone, with_crop)
    flipped = [torch.equal(row, image.flip(-1)) for row, image in zip(alone, images, strict=True)]
    assert 0 < sum(flipped) < 12
    assert all(torch.equal(row, image) for row, image, mirrored in zip(alone, images, flipped, strict=True) if not mirrored)


def test_mixup_blends_each_image_and_its_targets_with_those_before() -> None:
    images = torch.randn(5, 3, 8, 8).to(memory_format=torch.channels_last)
    targets = torch.eye(5)[:, :4].clone()
    targets[4] = 0.25
    mix = Mix(0.7)
    for row in range(5):
        torch.testing.assert_close(mix.images(images)[row], 0.7 * images[row] + 0.3 * images[row - 1])
        torch.testing.assert_close(mix.targets(targets)[row], 0.7 * targets[row] + 0.3 * targets[row - 1])
    assert mix.images(images).is_contiguous(memory_format=torch.channels_last)


def test_cutmix_puts_a_rectangle_of_the_image_before_and_counts_its_area() -> None:
    images = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 10, 10).contiguous(memory_format=torch.channels_last)
    mix = Mix(1 - 3 * 5 / 100, (2, 4, 5, 9))
    mixed = mix.images(images)
    expected = images.clone()
    expected[:, :, 2:5, 4:9] = images[[3, 0, 1, 2]][:, :, 2:5, 4:9]
    assert torch.equal(mixed, expected)
    assert mixed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("config", [AugmentConfig(mixup=0.3), AugmentConfig(cutmix=1.0), AugmentConfig(mixup=0.2, cutmix=1.0)])
def test_mixed_targets_sum_to_one_and_share_is_the_area(config: AugmentConfig) -> None:
    targets = torch.rand(6, 9, generator=generator())
    targets /= targets.sum(dim=1, keepdim=True)
    shares, boxes = [], 0
    for step in range(400):
        mix = draw_mix(config, 32, 0, step)
        assert mix is not None
        assert mix == draw_mix(config, 32, 0, step)
        torch.testing.assert_close(mix.targets(targets).sum(dim=1), torch.ones(6))
        shares.append(mix.share)
        if mix.box is not None:
            boxes += 1
            top, left, bottom, right = mix.box
            assert 0 <= top <= bottom <= 32 and 0 <= left <= right <= 32
            assert mix.share == pytest.approx(1 - (bottom - top) * (right - left) / 32**2)
    assert min(shares) >= 0 and max(shares) <= 1
    assert boxes == {(0.3, 0.0): 0, (0.0, 1.0): 400}.get((config.mixup, config.cutmix), boxes)
    if config.mixup and config.cutmix:
        assert 150 < boxes < 250


def test_share_of_mixup_follows_its_beta_distribution() -> None:
    """Beta(1, 1) is uniform; with a small parameter most batches are hardly mixed."""
    uniform = [draw_mix(AugmentConfig(mixup=1.0), 8, 0, step).share for step in range(2000)]
    assert np.quantile(uniform, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.05)
    narrow = [draw_mix(AugmentConfig(mixup=0.1), 8, 0, step).share for step in range(500)]
    assert np.mean([min(share, 1 - share) < 0.05 for share in narrow]) > 0.5
