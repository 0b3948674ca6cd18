"""What the training section accepts, and what of it bears identity."""

import pytest
from pydantic import ValidationError

from hardmoe.training.config import TrainingConfig


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0},
        {"momentum": 1},
        {"warmup_fraction": 1},
        {"checkpoint_every_steps": 0},
    ],
)
def test_training_config_refuses_what_cannot_train(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        TrainingConfig(**values)


def test_training_config_refuses_nesterov_without_momentum_and_says_how_to_mend_it() -> None:
    with pytest.raises(ValidationError, match="nesterov: false"):
        TrainingConfig(momentum=0)
    assert TrainingConfig(momentum=0, nesterov=False).momentum == 0


def test_training_config_keeps_checkpoints_and_threads_out_of_the_identity() -> None:
    assert TrainingConfig(checkpoint_every_steps=None, num_threads=4).identity() == TrainingConfig().identity()
    assert TrainingConfig(epochs=3).identity() != TrainingConfig().identity()
