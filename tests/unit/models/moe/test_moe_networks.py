"""Networks with experts: which blocks have them, and how many parameters there are, against the papers' recomputed totals."""

from typing import Any

import pytest
import torch
import torchvision
from pydantic import ValidationError
from torch import nn

from hardmoe.errors import RecipeError
from hardmoe.models.backbones import Backbone, TagClassifier, build_backbone
from hardmoe.models.moe.config import MoeConfig
from hardmoe.models.moe.experts.base import PaddedRows
from hardmoe.models.moe.layer import MoeLayer, moe_layers
from hardmoe.models.moe.networks.placement import staged_blocks, transformer_blocks
from hardmoe.models.moe.networks.resnet import AroundExperts, narrow_stage
from hardmoe.training.pretrained import fitting_weights

JFT_CLASSES = 18_291
"""Of JFT-300M; V-MoE's head is a layer of the width (`pre_logits`), then one to these."""


def _meta(name: str, image_size: int = 224, **moe: Any) -> Backbone:
    with torch.device("meta"):
        return build_backbone(name, image_size=image_size, seed=0, moe=MoeConfig(**moe) if moe else None)


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("placement", "depth", "expected"),
    [
        ("last2", 8, (5, 7)),
        ("last2", 12, (9, 11)),
        ("last2", 24, (21, 23)),
        ("last5", 32, (23, 25, 27, 29, 31)),
        ("every2", 8, (1, 3, 5, 7)),
        ("every3", 12, (2, 5, 8, 11)),
    ],
)
def test_blocks_of_a_transformer_are_upstreams(placement: str, depth: int, expected: tuple[int, ...]) -> None:
    assert transformer_blocks(placement, depth) == expected


def test_blocks_of_a_convnext_are_those_of_the_papers_arithmetic() -> None:
    tiny = (3, 3, 9, 3)
    assert staged_blocks("last2", tiny) == ((2, 8), (3, 2))
    assert staged_blocks("stage", tiny) == ((0, 2), (1, 2), (2, 8), (3, 2))
    assert staged_blocks("last3", tiny) == ((2, 4), (2, 8), (3, 2))
    assert staged_blocks("every2", tiny) == ((0, 1), (1, 1), (2, 1), (2, 3), (2, 5), (2, 7), (3, 1))


@pytest.mark.parametrize(
    ("name", "placement", "dense_millions", "millions"),
    [
        ("vmoe_s32", "every2", 36.5, 296.9),
        ("vmoe_b16", "every2", 100.5, 979.0),
        ("vmoe_l16", "every2", 323.1, 3446.0),
        ("vmoe_h14", "last5", 655.8, 2688.6),
        ("vmoe_h14", "every2", 655.8, 7160.8),
    ],
)
def test_vmoe_has_the_papers_parameters(name: str, placement: str, dense_millions: float, millions: float) -> None:
    """Dense + n ((E - 1) MLP + D E), exactly, and the printed totals to their last digit; nothing is allocated."""
    backbone = _meta(name, placement=placement)
    layers = [layer for _, layer in moe_layers(backbone)]
    width = layers[0].experts.weight1_EDF.shape[1]
    mlp = _parameters(layers[0].experts) // 32
    head = width * (width + 1) + (width + 1) * JFT_CLASSES
    total = _parameters(backbone) + head
    dense = total - len(layers) * (31 * mlp + 32 * width)
    hidden = layers[0].experts.weight1_EDF.shape[2]
    assert mlp == 2 * width * hidden + hidden + width
    assert round(dense / 1e6, 1) == dense_millions
    assert round(total / 1e6, 1) == millions
    image = torch.zeros(1, 3, 224, 224, device="meta")
    assert backbone.eval()(image).shape == (1, width)


def _convnext_total(size: str, experts: int, ratio: int, places: str) -> int:
    """Torchvision's ConvNeXt, less the replaced MLPs, plus experts and router."""
    depths, dims = {"tiny": ((3, 3, 9, 3), (96, 192, 384, 768)), "small": ((3, 3, 27, 3), (96, 192, 384, 768))}.get(
        size, ((3, 3, 27, 3), (128, 256, 512, 1024))
    )
    with torch.device("meta"):
        total = _parameters(torchvision.models.get_model(f"convnext_{size}", weights=None))
    for stage, _ in staged_blocks(places, depths):
        dim = dims[stage]
        total += experts * (2 * ratio * dim * dim + (ratio + 1) * dim) + experts * dim - (8 * dim * dim + 5 * dim)
    return total


@pytest.mark.parametrize(
    ("size", "experts", "ratio", "placement", "millions"),
    [
        ("tiny", 4, 2, "last2", 34.5),
        ("tiny", 8, 2, "last2", 46.3),
        ("tiny", 8, 4, "last2", 70.0),
        ("tiny", 16, 4, "last2", 117.1),
        ("tiny", 32, 4, "last2", 211.6),
        ("tiny", 8, 2, "stage", 47.4),
        ("tiny", 8, 2, "last3", 49.9),
        ("small", 4, 2, "last2", 56.1),
        ("base", 4, 2, "last2", 99.1),
    ],
)
def test_convnext_has_the_papers_parameters(size: str, experts: int, ratio: int, placement: str, millions: float) -> None:
    backbone = _meta(f"moe_convnext_{size}", num_experts=experts, mlp_ratio=float(ratio), placement=placement)
    total = _parameters(backbone) + (backbone.num_features + 1) * 1000
    assert total == _convnext_total(size, experts, ratio, placement)
    assert total / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(
    ("name", "placement", "millions"),
    [("moe_vit_small", "last2", 38.6), ("moe_vit_small", "every2", 71.7), ("moe_vit_base", "every2", 284.9)],
)
def test_sweet_spots_transformers_have_the_papers_parameters(name: str, placement: str, millions: float) -> None:
    backbone = _meta(name, placement=placement)
    width = backbone.num_features
    count = len(transformer_blocks(placement, 12))
    mlp = 8 * width * width + 5 * width
    with torch.device("meta"):
        dense = torchvision.models.VisionTransformer(224, 16, 12, width // 64, width, 4 * width)
    total = _parameters(backbone) + (width + 1) * 1000
    assert total == _parameters(dense) + count * (7 * mlp + 8 * width)
    assert total / 1e6 == pytest.approx(millions, abs=0.1)


def test_narrow_experts_have_the_papers_parameters_and_are_half_a_stage() -> None:
    dense = torchvision.models.resnet18(weights=None)
    for stage, expected in enumerate((75_023, 267_024, 1_010_400, 4_037_448), start=1):
        assert _parameters(narrow_stage(18, stage)) == expected
        assert expected / _parameters(dense.get_submodule(f"layer{stage}")) == pytest.approx(0.5, abs=0.025)


@pytest.mark.parametrize("name", ["moe_resnet18", "moe_resnet50"])
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_experts_of_a_stage_stand_where_it_stood_beside_a_shortcut(name: str, stage: int) -> None:
    backbone = _meta(name, image_size=64, placement=f"stage{stage}")
    dense = _meta(name.removeprefix("moe_"), image_size=64)
    image = torch.zeros(2, 3, 64, 64, device="meta")
    assert backbone.eval()(image).shape == dense.eval()(image).shape
    around = backbone.network.get_submodule(f"layer{stage}")
    assert isinstance(around, AroundExperts)
    assert isinstance(around.shortcut, nn.Identity) == (name == "moe_resnet18" and stage == 1)
    plain = _meta(name, image_size=64, placement=f"plain{stage}").network.get_submodule(f"layer{stage}")
    assert isinstance(plain, MoeLayer)


@pytest.mark.parametrize(
    ("name", "size", "moe"),
    [
        ("moe_resnet18", 16, {}),
        ("moe_resnet18", 16, {"placement": "conv0", "constraint": "importance"}),
        ("moe_resnet18", 16, {"placement": "conv4", "constraint": "kl", "router": "convolved"}),
        ("moe_resnet18", 16, {"placement": "stage1", "constraint": "mean", "num_experts": 10}),
        ("moe_resnet18", 16, {"placement": "plain2", "router": "soft", "constraint": "none"}),
        ("vmoe_xs4", 16, {"num_experts": 4}),
        ("vmoe_xs4", 16, {"num_experts": 4, "router": "expert_choice", "constraint": "none"}),
        ("vmoe_xs4", 16, {"num_experts": 4, "router": "soft", "dispatch": "einsum"}),
        ("vmoe_xs8", 16, {"num_experts": 4, "router": "cosine", "capacity_factor": 0.5, "priority": True}),
        ("moe_convnext_tiny", 32, {"router": "distance", "dispatch": "index"}),
    ],
)
def test_network_with_experts_trains_in_all_its_parts(name: str, size: int, moe: dict[str, Any]) -> None:
    backbone = build_backbone(name, image_size=size, seed=0, moe=MoeConfig(**moe) if moe else None).train()
    torch.manual_seed(0)
    images = torch.randn(5, 3, size, size)
    features = backbone(images)
    assert features.shape == (5, backbone.num_features)
    auxiliary = [layer.auxiliary_loss for _, layer in moe_layers(backbone) if layer.auxiliary_loss is not None]
    (features.square().mean() + sum(auxiliary)).backward()
    for layer_name, layer in moe_layers(backbone):
        for parameter_name, parameter in layer.router.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.any()), f"{layer_name} {parameter_name}"
        assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in layer.experts.parameters())
    alone = backbone.eval()(images[:1])
    if moe.get("router") != "expert_choice":
        assert torch.allclose(alone, backbone(images)[:1], atol=1e-4)


def test_weights_depend_on_the_seed_alone() -> None:
    first, again = (build_backbone("vmoe_xs8", image_size=16, seed=3, moe=MoeConfig(num_experts=2)) for _ in range(2))
    other = build_backbone("vmoe_xs8", image_size=16, seed=4, moe=MoeConfig(num_experts=2))
    state = first.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in again.state_dict().items())
    assert any(not torch.equal(state[key], tensor) for key, tensor in other.state_dict().items())


def test_convnexts_block_has_a_shortcut_around_its_experts_and_routes_pixel_by_pixel() -> None:
    backbone = build_backbone("moe_convnext_tiny", image_size=64, seed=0).eval()
    _, layer = next(iter(moe_layers(backbone)))
    maps = torch.randn(2, 4, 4, 384)
    added = layer(maps) - maps
    assert torch.allclose(added, MoeLayer.forward(layer, maps), atol=1e-6)
    order = torch.randperm(16)
    moved = maps.flatten(1, 2)[:, order].view(2, 4, 4, 384)
    assert torch.allclose(layer(moved).flatten(1, 2), layer(maps).flatten(1, 2)[:, order], atol=1e-5)


def test_dense_transformers_file_becomes_experts_that_all_are_its_mlp() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        dense = torchvision.models.VisionTransformer(16, 8, 6, 3, 192, 768)
    model = TagClassifier(build_backbone("vmoe_xs8", image_size=16, seed=0, moe=MoeConfig(num_experts=3, k=3)), 4, seed=0)
    found = fitting_weights(model, dense.state_dict(), "dense.safetensors", "vmoe_xs8")
    model.load_state_dict({**model.state_dict(), **found})
    # Their weights sum to 1 when all are asked, so the network is the dense one.
    dense.heads = nn.Identity()
    images = torch.randn(2, 3, 16, 16)
    assert torch.allclose(model.eval().backbone(images), dense.eval()(images), atol=1e-5)
    with pytest.raises(RecipeError, match=r"encoder_layer_1\.mlp\.experts\.weight1_EDF has the shape .* and not"):
        other = build_backbone("vmoe_xs8", image_size=16, seed=0, moe=MoeConfig(num_experts=3, mlp_ratio=2.0))
        fitting_weights(TagClassifier(other, 4, seed=0), dense.state_dict(), "dense.safetensors", "vmoe_xs8")


def test_dense_resnets_and_convnexts_files_become_experts_too() -> None:
    moe = MoeConfig(placement="conv4", num_experts=3)
    model = TagClassifier(build_backbone("moe_resnet18", image_size=64, seed=0, stem="imagenet", moe=moe), 4, seed=0)
    dense = torchvision.models.resnet18(weights=None).state_dict()
    found = fitting_weights(model, dense, "dense.safetensors", "moe_resnet18")
    for expert in range(3):
        key = f"backbone.network.layer4.1.conv2.experts.members.{expert}.weight"
        assert torch.equal(found[key], dense["layer4.1.conv2.weight"])
    stage = build_backbone("moe_resnet18", image_size=64, seed=0, stem="imagenet")
    with pytest.raises(RecipeError, match=r"layer4.*is missing"):
        fitting_weights(TagClassifier(stage, 4, seed=0), dense, "dense.safetensors", "moe_resnet18")
    wide = MoeConfig(mlp_ratio=4.0)
    convnext = TagClassifier(build_backbone("moe_convnext_tiny", image_size=32, seed=0, moe=wide), 4, seed=0)
    dense = torchvision.models.convnext_tiny(weights=None).state_dict()
    found = fitting_weights(convnext, dense, "dense.safetensors", "moe_convnext_tiny")
    assert torch.equal(
        found["backbone.network.features.7.2.block.3.experts.weight1_EDF"][2], dense["features.7.2.block.3.weight"].T
    )


@pytest.mark.parametrize(
    ("name", "moe", "message"),
    [
        ("resnet18", {"k": 1}, "'resnet18' has no layers of experts .*take `moe` out, or choose .*moe_resnet18"),
        ("vmoe_xs4", {"placement": "last4"}, r"moe.placement: 'last4' names no blocks of a transformer with 6; .*last3"),
        ("moe_convnext_tiny", {"placement": "last5"}, "moe.placement: 'last5' is none of a ConvNeXt; set it to every2, stage"),
        ("moe_resnet18", {"placement": "last2"}, "moe.placement: 'last2' is none of a ResNet; set it to stage1"),
        ("vmoe_xs4", {"constraint": "relative"}, "moe.constraint: relative is one for a choice per image"),
        ("moe_resnet18", {"constraint": "gshard"}, "moe.constraint: gshard is one for patches or pixels"),
        ("vmoe_xs4", {"router": "pooled"}, "moe.router: pooled decides once an image"),
        ("moe_resnet18", {"router": "cosine"}, "moe.router: cosine is one of patches or pixels"),
        ("vmoe_xs4", {"threshold": 0.3}, "moe.threshold: 0.3 means nothing to this backbone, .*importance_load; leave"),
        ("moe_convnext_tiny", {"threshold": 0.0}, "moe.threshold: 0 means nothing to this backbone"),
        ("moe_resnet18", {"k": 5}, r"moe.k: 5 is more than there are experts \(4\)"),
        ("vmoe_xs5", None, "'vmoe_xs5' cannot be built for images of 16 pixels"),
        ("vmoe_m16", None, "unknown backbone 'vmoe_m16'; did you mean vmoe"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_remedy(name: str, moe: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_backbone(name, image_size=16, seed=0, moe=MoeConfig(**moe) if moe else None)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"constraint": "kl"}, "threshold: 0.3 means nothing to constraint: kl; leave it out, or set constraint: relative or"),
        ({"constraint": "none"}, "threshold: 0.3 means nothing to constraint: none"),
        ({"router": "soft"}, "threshold: 0.3 means nothing to router: soft, which has no constraint; leave it out"),
    ],
)
def test_threshold_without_a_hard_constraint_is_refused(moe: dict[str, Any], message: str) -> None:
    """It was ignored without a word."""
    with pytest.raises(ValidationError, match=message):
        MoeConfig(threshold=0.3, **moe)


def test_threshold_reaches_the_constraint_that_is_given_and_the_backbones_own() -> None:
    for moe in (MoeConfig(threshold=0.7), MoeConfig(threshold=0.7, constraint="mean")):
        _, layer = next(iter(moe_layers(build_backbone("moe_resnet18", image_size=16, seed=0, moe=moe))))
        assert layer.router.constraint.threshold == 0.7


def test_experts_of_a_new_network_are_alike_where_they_are_mlps() -> None:
    _, layer = next(iter(moe_layers(build_backbone("vmoe_xs8", image_size=16, seed=0, moe=MoeConfig(num_experts=3)))))
    rows = torch.randn(4, 192).expand(3, -1, -1)
    outputs = layer.experts(PaddedRows(rows, torch.ones(3, 4, dtype=torch.bool)))
    assert torch.allclose(outputs[0], outputs[2], atol=1e-6)
