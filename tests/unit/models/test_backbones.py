"""The registry of backbones."""

import sys
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from hardmoe.errors import RecipeError
from hardmoe.models.backbones import Backbone, TagClassifier, build_backbone, normalise_images


@pytest.mark.parametrize(
    ("name", "image_size", "num_features"),
    [
        ("quicknet_w12", 32, 96),
        ("resnet20", 32, 64),
        ("resnet20_w8", 32, 32),
        ("resnet18", 32, 512),
        ("resnext50_32x4d", 64, 2048),
        ("mobilenet_v3_small", 32, 1024),
        ("efficientnet_b0", 32, 1280),
        ("convnext_tiny", 32, 768),
        ("shufflenet_v2_x0_5", 32, 1024),
        ("densenet121", 32, 1024),
        ("vgg11", 32, 4096),
        ("swin_t", 32, 768),
        ("vit_b_32", 32, 768),
        ("timm/resnet10t", 32, 512),
        ("timm/mobilenetv3_small_050", 32, 1024),
        ("timm/vit_tiny_patch16_224", 64, 192),
    ],
)
def test_build_backbone_gives_pooled_features_of_the_width_it_states(name: str, image_size: int, num_features: int) -> None:
    with torch.device("meta"):  # shapes alone, without memory or arithmetic
        backbone = build_backbone(name, image_size=image_size, seed=0).eval()
        features = backbone(torch.zeros(2, 3, image_size, image_size))
    assert features.shape == (2, num_features)
    assert backbone.num_features == num_features


def test_build_backbone_depends_on_the_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_backbone("quicknet_w4", image_size=32, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = build_backbone("quicknet_w4", image_size=32, seed=5).state_dict()
    other = build_backbone("quicknet_w4", image_size=32, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_tag_classifier_depends_on_the_seed_and_leaves_the_global_generator_alone() -> None:
    backbone = build_backbone("quicknet_w4", image_size=32, seed=0)
    before = torch.get_rng_state()
    first, second = TagClassifier(backbone, 7, seed=1), TagClassifier(backbone, 7, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.decoder.weight, second.decoder.weight)
    assert not torch.equal(first.decoder.weight, TagClassifier(backbone, 7, seed=2).decoder.weight)


def test_tag_classifier_returns_features_and_their_decoding() -> None:
    classifier = TagClassifier(build_backbone("quicknet_w4", image_size=32, seed=0), 7, seed=0).eval()
    features, logits = classifier(torch.ones(3, 3, 32, 32))
    expected = features.detach().numpy() @ classifier.decoder.weight.detach().numpy().T + classifier.decoder.bias.detach().numpy()
    np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_resnet18_with_the_imagenet_stem_computes_what_torchvisions_does_before_its_head() -> None:
    backbone = build_backbone("resnet18", image_size=64, seed=0, stem="imagenet").eval()
    oracle = torchvision.models.resnet18(weights=None).eval()
    oracle.load_state_dict(
        backbone.network.state_dict() | {"fc.weight": torch.eye(512)[:1].repeat(1000, 1), "fc.bias": torch.zeros(1000)}
    )
    images = torch.linspace(-2, 2, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(backbone(images)[:, 0], oracle(images)[:, 0], rtol=1e-4)


@pytest.mark.parametrize(
    ("image_size", "stem", "stride"), [(32, "auto", 1), (96, "auto", 2), (96, "small", 1), (32, "imagenet", 2)]
)
def test_stem_is_small_for_small_images_unless_the_recipe_says_otherwise(image_size: int, stem: str, stride: int) -> None:
    network = build_backbone("resnet18", image_size=image_size, seed=0, stem=stem).network
    assert network.conv1.stride == (stride, stride)
    assert isinstance(network.maxpool, nn.Identity) == (stride == 1)


@pytest.mark.parametrize("name", ["quicknet_w4", "resnet20", "mobilenet_v3_small"])
def test_stem_is_refused_where_there_is_no_choice(name: str) -> None:
    with pytest.raises(RecipeError, match=f"'{name}' has no stem 'small'.*stem: auto"):
        build_backbone(name, image_size=32, seed=0, stem="small")


def test_unknown_stem_is_refused_with_the_choices() -> None:
    with pytest.raises(RecipeError, match=r"'tiny'.*auto, small, imagenet"):
        build_backbone("resnet18", image_size=32, seed=0, stem="tiny")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("restnet18", "resnet18"), ("quiknet_w12", "quicknet_w12"), ("resnet21", "resnet20"), ("quicknet_w0", "quicknet_w12")],
)
def test_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown backbone '{name}'; did you mean .*{nearest}"):
        build_backbone(name, image_size=32, seed=0)


def test_image_size_that_a_transformer_cannot_tile_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'vit_b_32'.*40 pixels"):
        build_backbone("vit_b_32", image_size=40, seed=0)


def test_network_without_a_linear_head_is_refused() -> None:
    with pytest.raises(RecipeError, match="'squeezenet1_0' has no linear head"):
        build_backbone("squeezenet1_0", image_size=32, seed=0)


class Mean(nn.Module):
    """Someone's own network: the mean colour, through a random matrix."""

    def __init__(self, image_size: int, num_features: int = 5) -> None:
        super().__init__()
        self.num_features, self.image_size = num_features, image_size
        self.linear = nn.Linear(3, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.mean(dim=(2, 3)))


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("their_package")
    module.mean = Mean
    module.wrong = lambda image_size: Mean(image_size, num_features=6)
    module.bare = lambda image_size: nn.Flatten()
    monkeypatch.setitem(sys.modules, "their_package", module)
    return module


@pytest.mark.usefixtures("own_module")
def test_own_factory_is_called_with_the_image_size_under_the_seed() -> None:
    first, second = (build_backbone("their_package:mean", image_size=16, seed=3) for _ in range(2))
    assert isinstance(first, Backbone)
    assert (first.num_features, first.network.image_size) == (5, 16)
    assert torch.equal(first.network.linear.weight, second.network.linear.weight)
    assert first(torch.zeros(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("their_package:wrong", r"shape \[2, 5\].*num_features=6"),
        ("their_package:bare", "returned Flatten.*num_features"),
        ("their_package:absent", "cannot load.*absent"),
        ("no_such_package:mean", "cannot load.*no_such_package"),
    ],
)
def test_own_factory_that_does_not_fit_is_refused(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_backbone(name, image_size=16, seed=0)


def test_normalise_images_equals_the_formula_and_refuses_floats() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    expected = (np.arange(256) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(normalise_images(pixels).numpy().ravel(), expected, atol=1e-6)
    with pytest.raises(ValueError, match="uint8"):
        normalise_images(pixels.float())


@pytest.mark.parametrize("side", [1, 3, 5, 17, 32])
def test_a_normalised_pixel_has_the_same_bits_wherever_it_lies(side: int) -> None:
    """A vector's remainder must be rounded as the vectors are: once, after a fused multiply-add, which float64 can follow."""
    pixels = torch.randint(0, 256, (7, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(side))
    expected = (pixels.numpy() * np.float64(np.float32(1 / (255 * 0.25))) - 2.0).astype(np.float32)
    np.testing.assert_array_equal(normalise_images(pixels).numpy(), expected)
    into = torch.empty(pixels.numel())
    np.testing.assert_array_equal(normalise_images(pixels.flatten(), into).numpy(), expected.ravel())


def test_timms_networks_begin_by_the_seed_and_compute_what_timm_computes() -> None:
    first, second = (build_backbone("timm/resnet10t", image_size=32, seed=5) for _ in range(2))
    assert all(torch.equal(first.network.state_dict()[name], tensor) for name, tensor in second.network.state_dict().items())
    assert first.training
    oracle = timm.create_model("resnet10t", pretrained=False, num_classes=0).eval()
    oracle.load_state_dict(first.network.state_dict())
    images_B3SS = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(first.eval()(images_B3SS), oracle(images_B3SS))


@pytest.mark.parametrize(
    ("name", "image_size", "sentence"),
    [
        ("timm/convnext_ato", 32, r"timm has no model 'convnext_ato'; did you mean timm/convnext_atto"),
        ("timm/vit_tiny_patch16_224", 8, r"cannot be built for images of 8 pixels"),
    ],
)
def test_what_timm_cannot_build_is_refused_with_the_remedy(name: str, image_size: int, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        build_backbone(name, image_size=image_size, seed=0)


def test_timm_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RecipeError, match=r"needs the package timm; pip install 'hardmoe\[timm\]'"):
        build_backbone("timm/resnet10t", image_size=32, seed=0)
