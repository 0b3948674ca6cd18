"""Networks cut in two: the first stages, which a gate and all its experts share, and the rest, of which each has its own.

An expert that branches off behind a stage has everything up to there as the trunk has it, so an image costs the shared stages
once and then two short rests. Only residual networks can be cut, torchvision's and our small ones: they are a chain of stages. An
expert is stored whole all the same, so that whatever reads one needs to know nothing of branches. Rejected: files without the
shared tensors, which are the smallest part of a network, as it widens with its depth.

Shape letters: B batch, C channels, H height, W width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from hardmoe.errors import RecipeError
from hardmoe.models.backbones import Backbone


@dataclass(frozen=True)
class Branch:
    """A backbone's two pieces, made of its own modules: `rest(shared(images))` is the backbone, to the bit."""

    shared: nn.Sequential
    """From images to maps, [B, C, H, W]."""
    rest: nn.Sequential
    """From maps to features."""


def split(backbone: Backbone, stage: str, name: str) -> Branch:
    """Cut a backbone behind a stage.

    Args:
        backbone: the network.
        stage: `stem`, `layer1`, `layer2` and so on, but not the last.
        name: the backbone's, for messages.

    Raises:
        RecipeError: it has no stages, or no such.
    """
    stages = dict(_stages(backbone.network))
    names = list(stages)
    if stage not in names[:-1]:
        has = (
            f"it can branch at {', '.join(['image', *names[:-1]])}"
            if names
            else "it has none, as only residual networks have; set it to image"
        )
        raise RecipeError(
            f"experts.branch_at: '{stage}' is no stage of the backbone '{name}' that leaves something to train; {has}"
        )
    cut = names.index(stage) + 1
    pieces = list(stages.values())
    return Branch(nn.Sequential(*pieces[:cut]), nn.Sequential(*pieces[cut:], *_end(backbone.network)))


def _stages(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The stages of a residual network in their order; nothing of another one."""
    import torchvision

    from hardmoe.models.resnet import SmallResNet

    if isinstance(network, torchvision.models.ResNet):
        yield "stem", nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
        yield from ((name, network.get_submodule(name)) for name in ("layer1", "layer2", "layer3", "layer4"))
    elif isinstance(network, SmallResNet):
        yield "stem", network.stem
        size = network.blocks_per_stage
        for index in range(len(network.blocks) // size):
            yield f"layer{index + 1}", network.blocks[index * size : (index + 1) * size]


def _end(network: nn.Module) -> list[nn.Module]:
    """What follows the last stage."""
    names = [name for name in ("avgpool", "pool") if hasattr(network, name)]
    head = [network.get_submodule("fc")] if hasattr(network, "fc") else []
    return [*map(network.get_submodule, names), nn.Flatten(1), *head]
