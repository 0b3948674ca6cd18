"""One step of a training: pieces, clipping, and what it shares with nothing else."""

import numpy as np
import pytest
import torch
from torch import nn

from hardmoe.data.loader import ExampleSet
from hardmoe.models.backbones import Backbone, TagClassifier
from hardmoe.training.config import AugmentConfig, TrainingConfig
from hardmoe.training.loop import train

CPU = torch.device("cpu")
PLAIN = TrainingConfig(epochs=2, batch_size=8, learning_rate=1.0, checkpoint_every_steps=None)


def make_examples(num: int = 27) -> ExampleSet:
    chance = np.random.default_rng(0)
    ids = chance.integers(0, 256, (num, 16), dtype=np.uint8)
    images = chance.integers(0, 256, (num, 3, 8, 8), dtype=np.uint8)
    labels = [sorted(chance.choice(5, int(size), replace=False).tolist()) for size in chance.integers(1, 4, num)]
    offsets = np.cumsum([0, *map(len, labels)])
    return ExampleSet(ids, images, np.arange(num), np.array([tag for tags in labels for tag in tags], np.int32), offsets)


def make_model() -> TagClassifier:
    """No batch normalisation: an image's gradient does not depend on its neighbours."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(54, 7))
    return TagClassifier(Backbone(network, 7), 5, seed=0)


def trained(config: TrainingConfig) -> tuple[float, dict[str, torch.Tensor]]:
    model = make_model()
    result = train(model, make_examples(), config, seed=0, devices=[CPU])
    assert result.final_loss is not None
    return result.final_loss, model.state_dict()


@pytest.mark.parametrize("accumulate", [2, 3, 8])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"optimizer": "adamw", "learning_rate": 0.01, "max_grad_norm": 0.1},
        {"loss": "sigmoid", "class_weights": "inverse_sqrt", "label_smoothing": 0.1},
        {"augment": AugmentConfig(crop=0.5, flip=True, mixup=0.4, cutmix=1.0)},
    ],
    ids=["plain", "clipped", "sigmoid", "augmented"],
)
def test_accumulated_training_is_the_whole_batchs_up_to_rounding(change: dict[str, object], accumulate: int) -> None:
    """27 examples in batches of 6 and 7, so the pieces are of unequal size and must count by their rows."""
    config = PLAIN.model_copy(update=change)
    loss, weights = trained(config)
    pieces_loss, pieces_weights = trained(config.model_copy(update={"accumulate": accumulate}))
    assert pieces_loss == pytest.approx(loss, rel=1e-4)
    for name, tensor in weights.items():
        torch.testing.assert_close(pieces_weights[name], tensor, rtol=1e-3, atol=1e-4)


def test_gradient_is_clipped_to_its_length_over_all_parameters() -> None:
    """One step of plain descent at a known rate: the weights move by rate times the clipped gradient's length."""
    config = TrainingConfig(
        epochs=1, batch_size=27, momentum=0, nesterov=False, weight_decay=0, warmup_fraction=0, learning_rate=256 / 27
    )
    start = make_model().state_dict()

    def length(limit: float | None) -> float:
        _, weights = trained(config.model_copy(update={"max_grad_norm": limit}))
        return float(torch.sqrt(sum(((weights[name] - start[name]).double() ** 2).sum() for name in start)))

    free = length(None)
    assert length(free / 3) == pytest.approx(free / 3, rel=1e-3)
    assert length(free * 3) == pytest.approx(free, rel=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "one_tag", "sigmoid"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
def test_every_loss_falls_with_every_optimiser(loss: str, optimizer: str) -> None:
    rate = {"sgd": 0.5, "adamw": 0.02, "lamb": 0.04}[optimizer]
    config = TrainingConfig(
        epochs=100, batch_size=27, optimizer=optimizer, loss=loss, learning_rate=rate, weight_decay=0, ema_decay=0.5
    )
    first, _ = trained(config.model_copy(update={"epochs": 1}))
    last, _ = trained(config)
    assert last < 0.85 * first
