"""RetinaNet with experts in its heads, held against the dense one and against torchvision's own head."""

import pytest
import torch
from torchvision.models.detection.retinanet import RetinaNetHead

from hardmoe.models.moe.config import MoeConfig
from hardmoe.models.moe.layer import moe_layers
from hardmoe.models.moe.networks.retinanet import (
    HEADS,
    NUM_ANCHORS,
    Detector,
    DetectorPlan,
    build_detector,
    give_experts,
)
from hardmoe.models.moe.statistics import observed
from hardmoe.training.auxiliary import take_auxiliary_loss

PLAN = DetectorPlan(num_classes=3, image_size=64, width=4, channels=8, depth=2)
BOTH = tuple(HEADS)


def batch(count: int = 4) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    images = list(torch.rand(count, 3, 64, 64, generator=generator))
    boxes = torch.tensor([[4.0, 4.0, 22.0, 20.0], [10.0, 20.0, 55.0, 60.0]])
    return images, [{"boxes": boxes, "labels": torch.tensor([n % 3, 2])} for n in range(count)]


def detector(heads: tuple[str, ...] = (), **moe: object) -> Detector:
    built = build_detector(PLAN, seed=3)
    with torch.random.fork_rng():
        # Logits near the prior make every loss the same; these do not.
        torch.manual_seed(5)
        for parameter in built.head.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    if heads:
        give_experts(built, heads, MoeConfig.model_validate(moe), seed=4)
    return built


def test_dense_head_is_torchvisions_with_the_same_weights() -> None:
    plan = DetectorPlan(num_classes=3, image_size=64, width=4, channels=8, depth=4)
    ours, theirs = build_detector(plan, seed=0).head, RetinaNetHead(8, NUM_ANCHORS, 3)
    for head, last in (("classification_head", "cls_logits"), ("regression_head", "bbox_reg")):
        whole, dense = getattr(getattr(ours, head), last), getattr(theirs, head)
        convolutions = [*(block[0] for block in dense.conv), getattr(dense, last)]
        for mine, other in zip(whole[::2], convolutions, strict=True):
            other.load_state_dict(mine.state_dict())
    levels = [torch.randn(2, 8, size, size) for size in (8, 4, 2)]
    for name, found in ours(levels).items():
        torch.testing.assert_close(found, theirs(levels)[name])


@pytest.mark.parametrize("heads", [("regression",), ("classification",), BOTH])
@pytest.mark.parametrize("constraint", ["relative", "importance", "none"])
def test_experts_that_are_copies_are_the_dense_head_in_outputs_and_losses(heads: tuple[str, ...], constraint: str) -> None:
    """The weights of a map sum to one, whatever the gate says."""
    dense, mixed = detector(), detector(heads, constraint=constraint)
    dense.freeze_backbone(), mixed.freeze_backbone()
    images, targets = batch()
    for mode in (True, False):
        dense.train(mode), mixed.train(mode)
        levels = list(dense.backbone(torch.stack(images)).values())
        for name, found in mixed.head(levels).items():
            torch.testing.assert_close(found, dense.head(levels)[name], rtol=1e-4, atol=1e-5)
    take_auxiliary_loss(mixed)
    for name, loss in mixed.train()(images, targets).items():
        torch.testing.assert_close(loss, dense.train()(images, targets)[name], rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_expert_and_the_gate_and_not_the_frozen_backbone() -> None:
    mixed = detector(BOTH, constraint="none", noise=0.0, k=4)
    mixed.freeze_backbone()
    statistics = {name: value.clone() for name, value in mixed.backbone.state_dict().items()}
    with torch.no_grad():
        for _, layer in moe_layers(mixed):
            for parameter in layer.experts.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    sum(mixed.train()(*batch()).values()).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in mixed.head.parameters())
    assert all(parameter.grad is None for parameter in mixed.backbone.parameters())
    for name, value in mixed.backbone.state_dict().items():
        assert torch.equal(value, statistics[name]), f"{name} of a frozen backbone moved"


def test_each_image_and_level_is_one_decision_of_k_experts() -> None:
    mixed = detector(("regression",)).eval()
    with observed(mixed) as usages:
        mixed(batch(5)[0])
    (usage,) = usages.values()
    assert usage.num_items == 5 * 3 and usage.activation_E.sum() == 5 * 3 * 2


def test_auxiliary_losses_of_all_levels_add_up() -> None:
    """A layer that ran three times once told the last level's loss alone."""
    mixed = detector(("classification",), constraint="importance", noise=0.0, loss_weight=1.0).train()
    (layer,) = (layer for _, layer in moe_layers(mixed))
    levels = [torch.randn(4, 8, size, size) for size in (8, 4, 2)]
    single = []
    for level in levels:
        layer(level)
        single.append(take_auxiliary_loss(mixed))
    mixed.head(levels)
    torch.testing.assert_close(take_auxiliary_loss(mixed), torch.stack(single).sum())
    assert take_auxiliary_loss(mixed) is None


def test_hard_constraint_keeps_the_experts_of_a_biased_gate_evenly_used() -> None:
    mixed = detector(("regression",)).train()
    (layer,) = (layer for _, layer in moe_layers(mixed))
    layer.router.scores.linear.bias.data += torch.tensor([9.0, 6.0, 3.0, 0.0])
    levels = [torch.rand(4, 8, size, size) for size in (8, 4, 2)]
    with observed(mixed) as usages:
        for _ in range(40):
            mixed.head(levels)
    (usage,) = usages.values()
    shares = usage.importance_E / usage.importance_E.sum()
    assert shares.min() > 0.2 and shares.max() < 0.3


def test_anchors_are_those_that_the_detector_decodes_with() -> None:
    built = detector()
    images = built.transform(batch(1)[0])[0]
    (theirs,) = built.anchor_generator(images, list(built.backbone(images.tensors).values()))
    torch.testing.assert_close(torch.cat(built.anchors()), theirs)
