"""What the training section accepts, and what of it bears identity."""

from typing import Any

import pytest
from pydantic import ValidationError

from hardmoe.training.config import AugmentConfig, TrainingConfig


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0},
        {"momentum": 1},
        {"warmup_fraction": 1},
        {"checkpoint_every_steps": 0},
        {"accumulate": 0},
        {"ema_decay": 1.0},
        {"max_grad_norm": 0},
        {"label_smoothing": 1.0},
        {"augment": {"crop": 0}},
        {"augment": {"crop": 1.5}},
        {"augment": {"magnitude": 31}},
        {"augment": {"unknown": 1}},
    ],
)
def test_training_config_refuses_what_cannot_train(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrainingConfig(**values)


def test_training_config_refuses_nesterov_without_momentum_and_says_how_to_mend_it() -> None:
    with pytest.raises(ValidationError, match="nesterov: false"):
        TrainingConfig(momentum=0)
    assert TrainingConfig(momentum=0, nesterov=False).momentum == 0


def test_training_config_keeps_checkpoints_and_threads_out_of_the_identity() -> None:
    assert TrainingConfig(checkpoint_every_steps=None, num_threads=4).identity() == TrainingConfig().identity()
    assert TrainingConfig(epochs=3).identity() != TrainingConfig().identity()


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ({"loss": "one_tag", "augment": {"mixup": 0.2}}, "augment.mixup: 0 or loss: softmax"),
        ({"loss": "one_tag", "augment": {"cutmix": 1.0}}, "augment.cutmix: 0 or loss: softmax"),
        ({"accumulate": 9, "batch_size": 8}, "accumulate: 8 or less"),
        ({"optimizer": "adamw"}, "learning_rate: 0.001"),
        ({"optimizer": "lamb", "learning_rate": 0.05}, "learning_rate: 0.005"),
        ({"beta2": 0.99}, "optimizer: adamw"),
        ({"augment": {"crop_ratio": 2.0}}, "crop: 0.35"),
        ({"augment": {"magnitude": 5}}, "randaugment: 2"),
    ],
)
def test_training_config_refuses_what_does_not_go_together_and_says_how_to_mend_it(values: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValidationError) as refused:
        TrainingConfig.model_validate(values)
    (problem,) = refused.value.errors()
    assert remedy in problem["msg"]


def test_training_config_takes_adamw_without_momentum() -> None:
    assert TrainingConfig(optimizer="adamw", learning_rate=0.001, momentum=0).nesterov


def test_identity_of_a_training_names_of_augmentation_what_is_on() -> None:
    plain = TrainingConfig()
    assert "augment" not in plain.identity()
    assert TrainingConfig(augment=AugmentConfig(flip=False)).identity() == plain.identity()
    flipped = TrainingConfig(augment=AugmentConfig(flip=True, crop=0.5))
    assert flipped.identity() == {**plain.identity(), "augment": {"crop": 0.5, "flip": True}}
    assert TrainingConfig.model_validate({**flipped.identity(), **flipped.operational_values()}) == flipped
