"""The file of `hardmoe detection`: which canvases, which detector, how it is trained, which heads get experts.

A file of its own and no section of the recipe: nothing here is of the mixture, and nothing of the mixture is needed. Everything
that is not declared operational decides what comes out.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from hardmoe.config import Config, operational
from hardmoe.data.config import DatasetConfig
from hardmoe.execution.config import ExecutionConfig
from hardmoe.models.moe.config import MoeConfig

HeadsName = Literal["regression", "classification", "both"]
RANGES = ("small", "medium", "large")
BASELINE, DENSE = "baseline", "dense"
HEADS_WITH_EXPERTS: dict[str, tuple[str, ...]] = {
    "regression": ("regression",),
    "classification": ("classification",),
    "both": ("regression", "classification"),
}
"""Names of the systems beside `baseline` and `dense`, and which of their heads have experts."""
_STRIDE = 32


class CanvasesConfig(Config):
    """The detection set: a source's images pasted on canvases; of each the box and the hashtag are known."""

    size: int = Field(128, ge=64, le=1024)
    """Side of the square canvases in pixels, a multiple of 32."""
    num_train: int = Field(2000, ge=1)
    """Canvases to train on."""
    num_test: int = Field(400, ge=1)
    """Canvases to judge by, of images that no training canvas has."""
    num_classes: int = Field(8, ge=1, le=1000)
    """The commonest hashtags are the classes; an image with exactly one of them is an object of that class."""
    skip: list[str] = Field(default_factory=list)
    """Hashtags that are no classes, such as those that say how something is drawn."""
    max_objects: int = Field(4, ge=1, le=64)
    """A canvas has from one to so many objects, that do not overlap."""
    sizes: list[list[int]] = Field(default_factory=lambda: [[14, 22], [28, 44], [56, 88]])
    """The longer side of small, medium and large objects in pixels: from, to; in ascending order."""
    test_fraction: float = Field(0.2, gt=0.0, lt=1.0)
    """Share of the images that are on test canvases."""
    max_images: int = Field(20_000, ge=1)
    """At most so many images are read, equally many from every shard of the source."""
    shard_canvases: int = Field(500, ge=1)
    """Canvases that one unit draws."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.size % _STRIDE:
            raise ValueError(f"size: {self.size} is no multiple of {_STRIDE}; set it to {self.size // _STRIDE * _STRIDE}")
        flat = [value for pair in self.sizes for value in pair]
        if len(self.sizes) != len(RANGES) or any(len(pair) != 2 for pair in self.sizes) or flat != sorted(flat) or flat[0] < 4:
            raise ValueError(
                f"sizes: {self.sizes} are not three ascending ranges from 4 on; write them like [[14, 22], [28, 44], [56, 88]]"
            )
        if flat[-1] > self.size:
            raise ValueError(f"sizes: {flat[-1]} pixels do not fit on a canvas of {self.size}; set size higher, or sizes lower")
        return self


class DetectorConfig(Config):
    """The shape of the detector, a small RetinaNet on three levels."""

    width: int = Field(12, ge=1, le=512)
    """Channels of the backbone's first stage; every stage after it has twice as many."""
    channels: int = Field(32, ge=1, le=1024)
    """Channels of the pyramid and the heads."""
    depth: int = Field(2, ge=0, le=8)
    """Convolutions of a head before its last."""


class FitConfig(Config):
    """How a detector is trained: AdamW with a cosine, after a linear rise over the first twentieth of the steps."""

    epochs: int = Field(2, ge=1)
    """Times that every training canvas is seen."""
    batch_size: int = Field(16, ge=1)
    """Canvases in a step."""
    learning_rate: float = Field(2e-3, gt=0)
    """At its peak."""
    weight_decay: float = Field(1e-4, ge=0)
    """Of weights; not of biases and scales."""
    max_grad_norm: float = Field(10.0, gt=0)
    """Longer gradients are shortened to this."""
    num_threads: int = operational(1, ge=1)
    """CPU threads."""
    checkpoint_every_steps: int = operational(50, ge=1)
    """Steps between two checkpoints."""


class HeadsConfig(FitConfig):
    """How heads are trained on the backbone of the baseline, which is frozen; they start as the baseline's."""

    systems: list[HeadsName] = Field(["regression", "classification"], min_length=1)
    """Which heads get experts, a system each; beside them `dense` is trained as long without."""
    moe: MoeConfig = Field(default_factory=MoeConfig)
    """The experts; what is null is as in the paper: four, two of them for a map, relative importance of at most 0.3."""

    @model_validator(mode="after")
    def _of_heads(self) -> Self:
        if self.moe.placement is not None or self.moe.mlp_ratio is not None:
            raise ValueError(
                "moe.placement and moe.mlp_ratio mean nothing in heads, whose experts are whole heads; leave them out"
            )
        if len(set(self.systems)) < len(self.systems):
            raise ValueError(f"systems: {self.systems} names one twice; leave it out")
        return self


class DetectionConfig(Config):
    """A file of `hardmoe detection`."""

    root: str = operational("runs/detection", min_length=1)
    """Directory or URI of the run."""
    seed: int = Field(0, ge=0)
    """Of canvases, weights, noise and order."""
    dataset: DatasetConfig = Field(default_factory=DatasetConfig)
    """Where the images come from; its splits and what it stores play no part."""
    canvases: CanvasesConfig = Field(default_factory=CanvasesConfig)
    """The detection set."""
    detector: DetectorConfig = Field(default_factory=DetectorConfig)
    """The network."""
    baseline: FitConfig = Field(default_factory=FitConfig)
    """How the first, dense detector is trained, backbone and all."""
    heads: HeadsConfig = Field(default_factory=HeadsConfig)
    """Heads with experts, and their control."""
    bootstrap_replicates: int = Field(200, ge=2)
    """Draws of the test canvases behind an interval."""
    execution: ExecutionConfig = operational(default_factory=ExecutionConfig)
    """Where and how to compute."""

    @property
    def systems(self) -> list[str]:
        """All detectors in their order."""
        return [BASELINE, DENSE, *self.heads.systems]
