"""Distillation: the formula against its definition, and a teacher that decides the bits like everything else does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hardmoe.data.loader import ExampleSet
from hardmoe.errors import RecipeError
from hardmoe.models.backbones import Backbone, TagClassifier, normalise_images
from hardmoe.recipe import parse_recipe
from hardmoe.storage import LocalStorage
from hardmoe.training.checkpoint import Checkpoints
from hardmoe.training.config import AugmentConfig, DistillConfig, TrainingConfig
from hardmoe.training.distillation import Asked, NetworkTeacher, bernoulli_divergence, softmax_divergence
from hardmoe.training.loop import TrainingReferences, train
from hardmoe.training.reporting import TrainingProgress, TrainingSinks

CPU = torch.device("cpu")
NUM_TAGS = 5
CONFIG = TrainingConfig(epochs=2, batch_size=8, learning_rate=1.0, checkpoint_every_steps=3)


class Killed(Exception):
    """Stands for a signal."""


def make_examples(num: int = 27) -> ExampleSet:
    chance = np.random.default_rng(0)
    ids = chance.integers(0, 256, (num, 16), dtype=np.uint8)
    images = chance.integers(0, 256, (num, 3, 8, 8), dtype=np.uint8)
    return ExampleSet(ids, images, np.arange(num), chance.integers(0, NUM_TAGS, num).astype(np.int32), np.arange(num + 1))


def make_network(seed: int) -> TagClassifier:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 7))
    return TagClassifier(Backbone(network, 7), NUM_TAGS, seed=seed)


def trained(
    teacher: NetworkTeacher | None, config: TrainingConfig = CONFIG, start: int = 1, folder: Path | None = None, kill_at: int = 0
) -> dict[str, torch.Tensor]:
    def watch(progress: TrainingProgress) -> None:
        if progress.step == kill_at:
            raise Killed

    model = make_network(start)
    sinks = TrainingSinks(Checkpoints(LocalStorage(folder), "checkpoints") if folder else None, progress=watch)
    train(model, make_examples(), config, seed=0, devices=[CPU], references=TrainingReferences(teacher=teacher), sinks=sinks)
    return model.state_dict()


def asked(images_B3SS: torch.Tensor, logits_BV: torch.Tensor) -> Asked:
    features_BD = torch.zeros(len(images_B3SS), 7)
    return Asked(make_network(1), images_B3SS, torch.zeros(len(images_B3SS), dtype=torch.int64), features_BD, logits_BV)


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_divergences_are_those_of_their_definitions() -> None:
    chance = np.random.default_rng(0)
    student, teacher = chance.normal(size=(2, 3, 4)) * 3
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (teacher, student))
    found = softmax_divergence(torch.from_numpy(student), torch.from_numpy(teacher))
    assert float(found) == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), rel=1e-12)
    p, q = (1 / (1 + np.exp(-x)) for x in (teacher, student))
    each = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    found = bernoulli_divergence(torch.from_numpy(student), torch.from_numpy(teacher))
    assert float(found) == pytest.approx(each.sum(axis=1).mean(), rel=1e-12)


@pytest.mark.parametrize("loss_name", ["softmax", "sigmoid"])
def test_gradient_does_not_shrink_with_the_temperature(loss_name: str) -> None:
    """For small logits, Hinton et al.'s section 2.1: with the factor T^2 it tends to a constant; without, it falls by T^2."""
    images_B3SS = torch.zeros(2, 3, 8, 8)
    lengths = []
    for temperature in (50.0, 100.0):
        teacher = NetworkTeacher(make_network(2), DistillConfig(weight=1.0, temperature=temperature)).on(CPU)
        logits_BV = torch.tensor([[0.5, -0.5, 0, 0, 0], [0, 0, 0.2, 0, 0.3]], requires_grad=True)
        teacher.blended(torch.tensor(0.0), asked(images_B3SS, logits_BV), loss_name).backward()  # type: ignore[arg-type, no-untyped-call]
        assert logits_BV.grad is not None
        lengths.append(float(logits_BV.grad.norm()))
    assert lengths[1] == pytest.approx(lengths[0], rel=0.02)
    assert lengths[0] > 1e-3


def test_blended_loss_is_the_two_in_the_given_shares() -> None:
    images_B3SS, logits_BV = torch.rand(4, 3, 8, 8), torch.rand(4, NUM_TAGS)
    teacher = NetworkTeacher(make_network(2), DistillConfig(weight=0.3, temperature=2.0)).on(CPU)
    divergence = softmax_divergence(logits_BV / 2, teacher.network(images_B3SS)[1] / 2)
    found = teacher.blended(torch.tensor(5.0), asked(images_B3SS, logits_BV), "softmax")
    assert float(found) == pytest.approx(0.7 * 5.0 + 0.3 * 4 * float(divergence), rel=1e-6)


def test_network_that_follows_a_teacher_alone_comes_to_answer_like_it() -> None:
    config = CONFIG.model_copy(update={"epochs": 60, "weight_decay": 0.0})
    teacher = NetworkTeacher(make_network(2), DistillConfig(weight=1.0)).on(CPU)
    with torch.no_grad():
        teacher.network.decoder.weight *= 10  # a fresh network thinks all hashtags alike
    images_B3SS = normalise_images(torch.from_numpy(make_examples().storage_M3SS))

    def distance(weights: dict[str, torch.Tensor]) -> float:
        model = make_network(1)
        model.load_state_dict(weights)
        with torch.no_grad():
            return float(softmax_divergence(model.eval()(images_B3SS)[1], teacher.network(images_B3SS)[1]))

    alone, followed = trained(None, config), trained(teacher, config)
    assert distance(followed) < 0.5 * distance(make_network(1).state_dict())
    assert distance(followed) < 0.1 * distance(alone)


def test_training_leaves_every_bit_of_the_teacher() -> None:
    network = make_network(2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    trained(NetworkTeacher(network, DistillConfig(weight=0.5)))
    assert same_bits(before, network.state_dict())


@pytest.mark.parametrize("kills", [(2, 4), (7,)])
def test_killed_and_resumed_training_with_a_teacher_has_the_bits_of_an_uninterrupted_one(
    tmp_path: Path, kills: tuple[int, ...]
) -> None:
    config = CONFIG.model_copy(update={"accumulate": 2, "augment": AugmentConfig(flip=True, mixup=0.4)})
    expected = trained(NetworkTeacher(make_network(2), DistillConfig(weight=0.5, temperature=3.0)), config)
    for kill_at in (*kills, 0):
        teacher = NetworkTeacher(make_network(2), DistillConfig(weight=0.5, temperature=3.0))
        if kill_at:
            with pytest.raises(Killed):
                trained(teacher, config, folder=tmp_path, kill_at=kill_at)
        else:
            assert same_bits(trained(teacher, config, folder=tmp_path), expected)


def test_checkpoint_of_a_training_with_another_teacher_is_not_gone_on_from(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        trained(NetworkTeacher(make_network(2), DistillConfig(weight=0.5)), folder=tmp_path, kill_at=7)
    other = NetworkTeacher(make_network(3), DistillConfig(weight=0.5))
    assert same_bits(trained(other, folder=tmp_path), trained(other))


@pytest.mark.parametrize(
    ("recipe", "remedy"),
    [
        ({"experts": {"distill": {"temperature": 2.0}}}, "set weight: 0.5"),
        ({"experts": {"distill": {"weight": 1.5}}}, "experts.distill.weight must be at most 1"),
        ({"experts": {"distill": {"weight": 0.5}, "loss": "sigmoid", "init": "random"}}, "experts.distill.weight: 0"),
        ({"experts": {"distill": {"weight": 0.5}}, "trunk": {"loss": "sigmoid"}}, "set experts.loss: sigmoid"),
        ({"experts": {"decoder": "fixed", "loss": "sigmoid", "init": "random"}}, "experts.decoder: own"),
    ],
)
def test_what_cannot_be_learnt_from_the_trunk_is_refused_with_the_remedy(recipe: dict[str, Any], remedy: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(recipe, "recipe.yaml")
    assert remedy in str(refused.value)
