"""The registry of backbones: from a name in the recipe to a network that turns images into features.

A backbone is any network whose classification head was taken off; the decoder is always ours, so that trunk, experts and
dense baseline are one class. Initial weights are a function of the seed given, never of torch's global generator, which
is neither read nor advanced. Rejected: a table of builders with a dozen options each; a name says all, and whoever needs
more gives `package.module:factory`. Torchvision takes two seconds to import, and is where one of its networks is asked for.

    resnet18, convnext_tiny, vit_b_16, …   torchvision's classification models, head removed
    resnet20 … resnet110, resnet20_w8      He et al.'s networks for 32x32 images, optionally of another base width
    quicknet_w12, quicknet_w24, …          four blocks behind a stride-2 stem, for studies on a laptop
    moe_resnet18, vmoe_s32, moe_vit_small, … networks with layers of experts, see `moe.networks`
    timm/convnext_atto, timm/vit_…         timm's models, head removed (extra `timm`)
    package.module:factory                 your own: factory(image_size=…) -> nn.Module with `num_features`

Shape letters: B batch, H height, W width, D feature dim, V tags.
"""

import difflib
import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from hardmoe.errors import RecipeError
from hardmoe.models.moe.config import MoeConfig

if TYPE_CHECKING:
    from hardmoe.models.moe.networks.build import MoeRecipe

STEMS = ("auto", "small", "imagenet")
SMALL_IMAGE = 64
"""Up to this many pixels a side, `stem: auto` gives torchvision's ResNets the small stem."""

_HEADS = ("fc", "classifier", "head", "heads")
_PIXEL_MEAN, _PIXEL_DEVIATION = 0.5, 0.25
_OFFSET = torch.tensor(-_PIXEL_MEAN / _PIXEL_DEVIATION)


class Backbone(nn.Module):
    """A network without its head: `forward(images_B3HW float) -> features_BD`, with `num_features` = D."""

    def __init__(self, network: nn.Module, num_features: int) -> None:
        super().__init__()
        self.network = network
        self.num_features = num_features
        # A tuple, so that modules which are in the network already are not registered once more.
        self._held: tuple[nn.Module, ...] = ()

    def hold(self, module: nn.Module) -> None:
        """Keep a piece of the network as it is: its parameters get no gradient, its normalisation layers gather no statistics."""
        module.requires_grad_(False)
        self._held = (*self._held, module)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As every module's, but what is held stays in evaluation mode."""
        super().train(mode)
        for module in self._held:
            module.eval()
        return self

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Pooled features, float [B, D], of images that went through `normalise_images`."""
        features_BD: Tensor = self.network(images_B3HW)
        return features_BD


class TagClassifier(nn.Module):
    """A backbone and a linear decoder over the tags.

    Args:
        backbone: from `build_backbone`.
        num_tags: V, the size of the vocabulary.
        seed: decides the decoder's initial weights.
    """

    def __init__(self, backbone: Backbone, num_tags: int, *, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        with seeded_initialisation(seed):
            self.decoder = nn.Linear(backbone.num_features, num_tags)

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D] and logits [B, V] of normalised images."""
        features_BD = self.backbone(images_B3HW)
        return features_BD, self.decoder(features_BD)


def normalise_images(images_B3HW: Tensor, into_B3HW: Tensor | None = None) -> Tensor:
    """Pixels uint8 [B, 3, H, W], or any other shape, to float32: (x / 255 - 0.5) / 0.25; in fresh memory, or in the given one.

    The constants are fixed and not the dataset's mean and deviation, so a mixture needs no statistics beside its weights.
    """
    if images_B3HW.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, not {images_B3HW.dtype}: they are normalised here, once, on the device")
    floats_B3HW = images_B3HW.float() if into_B3HW is None else into_B3HW.copy_(images_B3HW)
    # One pass and one rounding: a fused multiply-add, on a CPU as on a GPU.
    return torch.add(_OFFSET, floats_B3HW, alpha=1 / (255 * _PIXEL_DEVIATION), out=floats_B3HW)


@contextmanager
def seeded_initialisation(seed: int) -> Iterator[None]:
    """Run a block whose torch randomness on the CPU depends on `seed` alone; the global generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reseed every GPU of the process too.
        torch.default_generator.manual_seed(seed)
        yield


def build_backbone(name: str, *, image_size: int, seed: int, stem: str = "auto", moe: MoeConfig | None = None) -> Backbone:
    """Build a backbone with fresh weights.

    Args:
        name: see the module's docstring.
        image_size: height and width of the images it will see, in pixels.
        seed: decides the initial weights.
        stem: for torchvision's ResNets only. `small` is a 3x3 convolution of stride 1 without pooling, `imagenet` the
            original one, `auto` is `small` up to 64 pixels.
        moe: the layers of experts, for networks that have some; None for the network's own.

    Raises:
        RecipeError: the name is unknown, or does not go with the image size, the stem or the experts.
    """
    if stem not in STEMS:
        raise RecipeError(f"unknown stem '{stem}'; it is one of {', '.join(STEMS)}")
    with seeded_initialisation(seed):
        backbone = _build(name, image_size, stem, moe)
    if stem != "auto" and (":" in name or "/" in name or not _is_torchvision_resnet(backbone.network)):
        raise RecipeError(
            f"the backbone '{name}' has no stem '{stem}'; only torchvision's ResNets have a choice, so use stem: auto"
        )
    return backbone


def _build(name: str, image_size: int, stem: str, moe: MoeConfig | None) -> Backbone:
    from hardmoe.models.moe.networks.build import moe_recipe

    if (recipe := moe_recipe(name)) is not None:
        return _with_experts(name, recipe, image_size, stem, moe)
    if moe is not None and moe != MoeConfig():
        raise RecipeError(
            f"the backbone '{name}' has no layers of experts for `moe` to describe; take `moe` out, or choose one "
            f"that has, such as "
            "moe_resnet18 or vmoe_s32"
        )
    if ":" in name:
        return _from_factory(name, image_size)
    if name.startswith("timm/"):
        return _from_timm(name, image_size)
    from hardmoe.models.resnet import CIFAR_DEPTHS, cifar_resnet, quicknet

    if match := re.fullmatch(r"resnet(\d+)(?:_w([1-9]\d*))?", name):
        depth = int(match[1])
        if depth in CIFAR_DEPTHS:
            network = cifar_resnet(depth, int(match[2] or 16))
            return Backbone(network, network.num_features)
    if match := re.fullmatch(r"quicknet_w([1-9]\d*)", name):
        network = quicknet(int(match[1]))
        return Backbone(network, network.num_features)
    import torchvision

    if name in torchvision.models.list_models(module=torchvision.models):
        return _from_torchvision(name, image_size, stem)
    raise RecipeError(f"unknown backbone '{name}'; {_suggestion(name)}")


def _is_torchvision_resnet(network: nn.Module) -> bool:
    import torchvision

    return isinstance(network, torchvision.models.ResNet)


def _suggestion(name: str) -> str:
    import torchvision

    from hardmoe.models.moe.networks.build import NAMES
    from hardmoe.models.resnet import CIFAR_DEPTHS

    known = [*NAMES, *torchvision.models.list_models(module=torchvision.models), "quicknet_w12", "quicknet_w24"]
    known += [f"resnet{depth}" for depth in CIFAR_DEPTHS] + ["resnet20_w8"]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    nearest = f"did you mean {' or '.join(close)}? " if close else ""
    families = "a torchvision model, resnet20 to resnet110, quicknet_w<width>, timm/<model>"
    return f"{nearest}Give {families}, or package.module:factory for your own"


def _from_torchvision(name: str, image_size: int, stem: str) -> Backbone:
    import torchvision

    options: dict[str, object] = {}
    if name.startswith("vit_"):
        options["image_size"] = image_size
    elif name.startswith("maxvit"):
        options["input_size"] = (image_size, image_size)
    elif name in ("googlenet", "inception_v3"):
        options.update(aux_logits=False, init_weights=True)
    try:
        network = torchvision.models.get_model(name, weights=None, **options)
    except (AssertionError, ValueError) as error:
        raise _does_not_fit(name, image_size, error) from error
    _fit_stem(network, image_size, stem)
    return Backbone(network, _remove_head(name, network))


def _with_experts(name: str, recipe: "MoeRecipe", image_size: int, stem: str, moe: MoeConfig | None) -> Backbone:
    try:
        network = recipe.dense(image_size)
    except (AssertionError, ValueError) as error:
        raise _does_not_fit(name, image_size, error) from error
    _fit_stem(network, image_size, stem)
    recipe.put_experts(network, moe)
    return Backbone(network, _remove_head(name, network))


def _fit_stem(network: nn.Module, image_size: int, stem: str) -> None:
    """Give one of torchvision's ResNets the stem that it is to have."""
    if _is_torchvision_resnet(network) and (stem == "small" or (stem == "auto" and image_size <= SMALL_IMAGE)):
        dense = network.get_submodule("conv1")
        assert isinstance(dense, nn.Conv2d)
        convolution = nn.Conv2d(3, dense.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        network.add_module("conv1", convolution)
        network.add_module("maxpool", nn.Identity())


def _does_not_fit(name: str, image_size: int, error: Exception) -> RecipeError:
    return RecipeError(
        f"the backbone '{name}' cannot be built for images of {image_size} pixels ({error}); "
        "set another trunk.image_size or choose another backbone"
    )


def _remove_head(name: str, network: nn.Module) -> int:
    """Replace the last linear layer of the head by the identity; its inputs are the features."""
    for head_name in _HEADS:
        head = getattr(network, head_name, None)
        if isinstance(head, nn.Linear):
            setattr(network, head_name, nn.Identity())
            return head.in_features
        if isinstance(head, nn.Sequential) and len(head) and isinstance(last := head[-1], nn.Linear):
            head[-1] = nn.Identity()
            return last.in_features
    raise RecipeError(f"the backbone '{name}' has no linear head to take off; choose another one, such as resnet18")


def _from_timm(name: str, image_size: int) -> Backbone:
    try:
        import timm
    except ImportError as error:
        raise RecipeError(f"the backbone '{name}' needs the package timm; pip install 'hardmoe[timm]'") from error
    model = name.removeprefix("timm/")
    if not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models(), n=3, cutoff=0.5)
        nearest = f"; did you mean timm/{' or timm/'.join(close)}?" if close else ""
        raise RecipeError(f"timm has no model '{model}'{nearest}; timm.list_models() names them all")
    try:
        try:
            network = timm.create_model(model, pretrained=False, num_classes=0, img_size=image_size)
        except TypeError:
            # Convolutional networks take images of any size and know no such argument.
            network = timm.create_model(model, pretrained=False, num_classes=0)
        # What `num_features` says is not what all of them return.
        with torch.no_grad():
            shape = list(network.eval()(torch.zeros(2, 3, image_size, image_size)).shape)
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        raise RecipeError(
            f"the backbone '{name}' cannot be built for images of {image_size} pixels ({str(error).splitlines()[0]}); "
            "set another trunk.image_size or choose another backbone"
        ) from error
    if len(shape) != 2:
        raise RecipeError(
            f"the backbone '{name}' gives features of shape {shape} for 2 images; choose a model for classification"
        )
    return Backbone(network.train(), shape[1])


def _from_factory(name: str, image_size: int) -> Backbone:
    module_name, _, factory_name = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"cannot load the backbone '{name}': {error}; give an importable package.module:factory (installed, or on PYTHONPATH)"
        ) from error
    try:
        network = factory(image_size=image_size)
    except Exception as error:
        # The user's own code may raise anything; which call it was is what we add.
        raise RecipeError(
            f"the backbone '{name}', called with image_size={image_size}, raised {type(error).__name__}: {error}; "
            "correct the factory (--debug shows where)"
        ) from error
    num_features = getattr(network, "num_features", None)
    if not isinstance(network, nn.Module) or not isinstance(num_features, int):
        found = type(network).__name__
        raise RecipeError(f"the backbone '{name}' returned {found}; it must return an nn.Module with an int num_features")
    network.eval()
    with torch.no_grad():
        shape = list(network(torch.zeros(2, 3, image_size, image_size)).shape)
    network.train()
    if shape != [2, num_features]:
        raise RecipeError(
            f"the backbone '{name}' gives features of shape {shape} for 2 images, not [2, num_features={num_features}]"
        )
    return Backbone(network, num_features)
