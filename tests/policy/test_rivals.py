"""The rival recipes cost what they say, in training and in use, and every network of a recipe with layers of experts trains."""

import re
from pathlib import Path

import pytest
import torch

from hardmoe.cli.study import read_study
from hardmoe.evaluation.costs import Cost, SharedLayer, TrainedNetwork, total_cost
from hardmoe.models.backbones import TagClassifier, build_backbone
from hardmoe.models.flops import BackboneSize, measure_backbone
from hardmoe.models.moe.config import MoeConfig
from hardmoe.recipe import Recipe, load_recipe
from hardmoe.training.auxiliary import take_auxiliary_loss

PIPELINES = Path(__file__).parents[2] / "pipelines"
HARD = PIPELINES / "rivals" / "hard.yaml"
RIVALS = {"dense.yaml": "wide", "moe.yaml": "sparse"}
STUDY = PIPELINES / "evidence" / "moe.yaml"
IMAGES, TAGS, WIDTH = 12_400, 700, 192
"""Of the demo's icons about; what they cancel out of."""


def size_of(backbone: str, stem: str, moe: MoeConfig, image_size: int) -> BackboneSize:
    return measure_backbone(backbone, image_size=image_size, stem=stem, moe=moe)


def trained(size: BackboneSize, images_seen: int) -> TrainedNetwork:
    return TrainedNetwork(size, (WIDTH + 1) * TAGS, images_seen)


def shared_layer(recipe: Recipe, experts: int) -> SharedLayer:
    decoder = (WIDTH + 1) * TAGS
    return SharedLayer(experts * (WIDTH + 1) * WIDTH + decoder, decoder, experts, recipe.decoder.epochs * IMAGES)


def cost_of_mixture(recipe: Recipe) -> Cost:
    trunk, count = recipe.trunk, recipe.partition.experts
    size = size_of(trunk.backbone, trunk.stem, trunk.moe, trunk.image_size)
    assert recipe.experts.backbone is None, "experts are of the trunk's kind"
    gate = trained(size, trunk.epochs * IMAGES)
    experts = [trained(size, recipe.experts.epochs * IMAGES // count)] * count
    return total_cost(experts, [gate], gate, shared_layer(recipe, count), 1, IMAGES)


def cost_of_rival(recipe: Recipe, name: str) -> Cost:
    rival = recipe.evaluation.rivals[name]
    epochs = rival.epochs or recipe.trunk.epochs + recipe.experts.epochs
    network = trained(size_of(rival.backbone, rival.stem, rival.moe, recipe.trunk.image_size), epochs * IMAGES)
    return total_cost([network], [], None, shared_layer(recipe, 1), 1, IMAGES)


@pytest.mark.parametrize(("file", "rival"), RIVALS.items())
def test_rivals_cost_what_the_hard_mixture_costs(file: str, rival: str) -> None:
    recipe = load_recipe(PIPELINES / "rivals" / file)
    hard, other = cost_of_mixture(load_recipe(HARD)), cost_of_rival(recipe, rival)
    assert other.flops == pytest.approx(hard.flops, rel=0.05)
    assert other.training_flops == pytest.approx(hard.training_flops, rel=0.05)
    assert cost_of_mixture(recipe) == hard, "beside its rival stands the same mixture"
    assert recipe.reuse == [load_recipe(HARD).root], "which is taken over"
    # What is said to be sparse is, and the dense one is not.
    assert (other.routed_flops > 0, other.active_parameters < other.parameters) == (rival == "sparse", rival == "sparse")


def test_arithmetic_in_the_head_is_that_of_the_networks() -> None:
    recipe = load_recipe(HARD)
    told = [float(number) for number in re.findall(r"([\d.]+) MFLOP$", HARD.read_text(), re.MULTILINE)]
    one = size_of(recipe.trunk.backbone, "auto", recipe.trunk.moe, recipe.trunk.image_size).flops
    others = []
    for file, name in RIVALS.items():
        rival = load_recipe(PIPELINES / "rivals" / file).evaluation.rivals[name]
        others.append(size_of(rival.backbone, rival.stem, rival.moe, recipe.trunk.image_size).flops)
    assert told == [round(flops / 1e6, 1) for flops in (one, 2 * one, *others)]


def networks() -> list[tuple[str, Recipe]]:
    """Every network with layers of experts that these recipes train, each once."""
    study, runs = read_study(STUDY)
    lines = {run.line: load_recipe(STUDY.parent / study.recipe, run.overrides) for run in runs if run.seed == study.seeds[0]}
    return [(name, load_recipe(PIPELINES / "rivals" / name)) for name in RIVALS] + list(lines.items())


@pytest.mark.parametrize(("name", "recipe"), networks(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_network_takes_a_step(name: str, recipe: Recipe) -> None:
    (rival,) = recipe.evaluation.rivals.values()
    size = recipe.trunk.image_size
    backbone = build_backbone(rival.backbone, image_size=size, seed=0, stem=rival.stem, moe=rival.moe)
    model = TagClassifier(backbone, 5, seed=0).train()
    images_B3HW = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(model(images_B3HW)[1], torch.arange(8) % 5)
    extra = take_auxiliary_loss(model)
    (loss if extra is None else loss + extra).backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
