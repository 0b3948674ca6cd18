"""The `experts` section of the recipe."""

from typing import Literal

from pydantic import Field

from hardmoe.config import operational
from hardmoe.training.config import Gpus, TrainingConfig


class ExpertsConfig(TrainingConfig):
    """Every expert, and the dense baseline, is trained like this; each sees its own part `epochs` times."""

    backbone: str | None = None
    """As `trunk.backbone`; null for the trunk's own."""
    stem: Literal["auto", "small", "imagenet"] = "auto"
    """As `trunk.stem`; the trunk's own where `backbone` is null."""
    init: Literal["trunk", "random"] = "trunk"
    """Where an expert starts: from the trunk's weights, or from fresh ones."""
    learning_rate: float = Field(0.05, gt=0)
    """Peak learning rate for a batch of 256; half the trunk's default, since the experts start from a trained network."""
    gpus: Gpus = operational("auto")
    """GPUs per expert; a fraction packs several onto one; `auto` takes one where there are any, else none."""
