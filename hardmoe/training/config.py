"""How a network is trained: the fields that the trunk's and the experts' sections of the recipe share.

What came after the first runs is declared with `added(...)` and off by default. The optimiser's own constants take the names
that are there already (`momentum` is the first beta of Adam). Rejected: a section per optimiser, which would make the
comparison of two of them a change of structure.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from hardmoe.config import Config, added, operational
from hardmoe.stage import Resources


def _whole_above_one(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(
            f"{gpus:g} GPUs: a network trains on a share of one or on several whole ones; set 1 or {math.ceil(gpus)}"
        )
    return gpus


Gpus = Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)] | Literal["auto"]
"""How many GPUs a unit takes, a fraction to share one, a whole number to divide every batch among several; `auto` is one where
there are any, else none."""


def training_resources(num_threads: int, gpus: float | Literal["auto"]) -> Resources:
    """What a training occupies: every device's process has its own threads."""
    if gpus == "auto":
        return Resources(num_threads, None)
    return Resources(num_threads * max(1, int(gpus)), gpus)


LossName = Literal["softmax", "one_tag", "sigmoid"]

_ADAPTIVE_RATE_LIMIT = 0.05
"""The defaults of SGD, 0.1 and 0.05, are no rates for a step whose size does not depend on the gradient's."""
_BETA2 = 0.999


class AugmentConfig(Config):
    """Random changes of the training images, drawn anew for every image at every step; all are off by default."""

    crop: float | None = added(None, gt=0, le=1)
    """Random resized crop: the smallest share of the image's area that is cut out and enlarged, such as 0.35; null for none."""

    crop_ratio: float = added(1.3333, ge=1, le=4)
    """Width to height of a crop is between 1 / crop_ratio and crop_ratio."""

    flip: bool = added(False)
    """Mirror half of the images, left to right."""

    jitter: float = added(0.0, ge=0, le=1)
    """Colour jitter: brightness, contrast and saturation are each multiplied by 1 - jitter to 1 + jitter, in this order."""

    randaugment: int = added(0, ge=0, le=10)
    """RandAugment (Cubuk et al. 2020): so many of its 14 operations on each image, after crop, flip and jitter."""

    magnitude: int = added(9, ge=0, le=30)
    """Strength of RandAugment's operations."""

    mixup: float = added(0.0, ge=0)
    """Mixup (Zhang et al. 2018): each batch is blended with itself moved by one image, its targets likewise, by a share from
    Beta(mixup, mixup); 0 for none."""

    cutmix: float = added(0.0, ge=0)
    """CutMix (Yun et al. 2019): a rectangle comes from the image before, its area's share from Beta(cutmix, cutmix); 0 for
    none. With mixup as well, a fair coin decides for each batch."""

    @model_validator(mode="after")
    def _settings_need_what_they_set(self) -> Self:
        if self.crop is None and self.crop_ratio != type(self).model_fields["crop_ratio"].default:
            raise ValueError(f"crop_ratio: {self.crop_ratio:g} changes nothing without crop; set crop: 0.35, or take it out")
        if self.randaugment == 0 and self.magnitude != type(self).model_fields["magnitude"].default:
            raise ValueError(
                f"magnitude: {self.magnitude} changes nothing without randaugment; set randaugment: 2, or take it out"
            )
        return self


class DistillConfig(Config):
    """Learning from the trunk's outputs beside the hashtags; off by default."""

    weight: float = added(0.0, ge=0, le=1)
    """Share of the loss that is the distance to the trunk's outputs on the same augmented images; the hashtags have the rest. A
    step then costs a forward pass of the trunk more, a quarter of itself where both are of one size; 0 for none."""

    temperature: float = added(1.0, gt=0, le=100)
    """What both networks' outputs are divided by before they are compared; above 1 the trunk's second thoughts count more."""

    @model_validator(mode="after")
    def _temperature_needs_a_weight(self) -> Self:
        if self.weight == 0 and self.temperature != type(self).model_fields["temperature"].default:
            raise ValueError(f"temperature: {self.temperature:g} changes nothing without weight; set weight: 0.5, or take it out")
        return self


class TrainingConfig(Config):
    """Stochastic gradient descent, by default with momentum, a linear warm-up and a cosine to zero."""

    epochs: int = Field(2, ge=1)
    """Passes over the examples; each pass sees every example exactly once, or as often as `repeat_threshold` says."""

    batch_size: int = Field(256, ge=1)
    """Examples per step at most; the batches of an epoch differ by at most one example."""

    accumulate: int = added(1, ge=1)
    """Pieces that a batch goes through the network in, to need less memory; the step is that of the whole batch up to rounding,
    but batch normalisation sees a piece at a time."""

    repeat_threshold: float | None = Field(None, gt=0, le=1)
    """Repeat examples of rare hashtags: a hashtag on a share f of the examples counts sqrt(threshold / f) times where that is
    more than once, an example as often as its rarest hashtag, fractions by lot in each epoch; null repeats none."""

    optimizer: Literal["sgd", "adamw", "lamb"] = added("sgd")
    """`sgd`, `adamw` (Loshchilov and Hutter 2019) or `lamb` (You et al. 2020, for large batches)."""

    learning_rate: float = Field(0.1, gt=0)
    """Peak learning rate for a batch of 256; it is scaled in proportion to `batch_size` with sgd (Goyal et al. 2017), to its
    square root with adamw and lamb (You et al. 2020)."""

    schedule: Literal["cosine", "linear", "constant"] = added("cosine")
    """How the learning rate goes on after the warm-up, over the examples seen: to zero along half a cosine or a line, or not."""

    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of the descent; the first beta of adamw and lamb."""

    nesterov: bool = True
    """Nesterov's form of the momentum; sgd only."""

    beta2: float = added(_BETA2, gt=0, lt=1)
    """Second beta of adamw and lamb: how long they remember the squares of the gradients."""

    weight_decay: float = Field(5e-4, ge=0)
    """L2 penalty on weights of two or more dimensions, with adamw and lamb decoupled decay; biases and normalisation layers are
    left out."""

    max_grad_norm: float | None = added(None, gt=0)
    """Scale the gradient of all parameters together down to this length where it is longer; null never does."""

    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of all steps over which the learning rate rises linearly."""

    ema_decay: float | None = added(None, gt=0, lt=1)
    """Keep an exponential moving average of the weights, such as 0.999, and validate and finish with it; after t steps its decay
    is at most (1 + t) / (10 + t), so that a short training forgets where it started; null keeps none."""

    loss: LossName = added("softmax")
    """`softmax`: cross-entropy with 1/k on each of an image's k hashtags; `one_tag`: with 1 on one of them, drawn anew at every
    step; `sigmoid`: binary cross-entropy, summed over the hashtags."""

    class_weights: Literal["none", "inverse_sqrt"] = added("none")
    """`inverse_sqrt` weighs each hashtag's term of the loss by 1 / sqrt(its training images), 1 on average over all labels."""

    label_smoothing: float = added(0.0, ge=0, lt=1)
    """Share of every target that is spread evenly over the vocabulary."""

    augment: AugmentConfig = added(AugmentConfig())
    """Random changes of the training images."""

    early_stop: int | None = added(None, ge=1)
    """End after so many epochs in a row without a better validation precision@1; the schedule is not shortened by it, so
    `schedule: constant` goes with it best; null trains all epochs. A part without validation images is trained to the end."""

    keep: Literal["last", "best"] = added("last")
    """Which weights are the result: those after the last step, or those after the epoch with the best validation precision@1."""

    checkpoint_every_steps: int | None = operational(200, ge=1)
    """Steps between checkpoints; null for none by steps."""

    checkpoint_every_seconds: float | None = operational(120.0, gt=0)
    """Seconds between checkpoints, whichever comes first; null for none by time. Where they fall changes no result."""

    num_threads: int = operational(1, ge=1)
    """CPU threads of one unit. Results are the same bytes only for the same number."""

    def training(self, epochs: int) -> "TrainingConfig":
        """The same training of so many epochs, without what a section says of its networks besides."""
        fields = {name: getattr(self, name) for name in TrainingConfig.model_fields}
        return TrainingConfig.model_validate({**fields, "epochs": epochs})

    @model_validator(mode="after")
    def _optimizer_fits(self) -> Self:
        if self.optimizer == "sgd":
            if self.nesterov and self.momentum == 0:
                raise ValueError("nesterov needs a momentum above 0; set nesterov: false or momentum: 0.9")
            if self.beta2 != _BETA2:
                raise ValueError(f"beta2: {self.beta2:g} is read by adamw and lamb only; take it out, or set optimizer: adamw")
        elif self.learning_rate >= _ADAPTIVE_RATE_LIMIT:
            raise ValueError(
                f"learning_rate: {self.learning_rate:g} is one for sgd; give {self.optimizer} its own, below "
                f"{_ADAPTIVE_RATE_LIMIT:g}, such as learning_rate: {0.001 if self.optimizer == 'adamw' else 0.005}"
            )
        return self

    @model_validator(mode="after")
    def _batch_fits(self) -> Self:
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate: {self.accumulate} pieces of a batch of {self.batch_size} would be empty; "
                f"set accumulate: {self.batch_size} or less"
            )
        if self.loss == "one_tag" and (self.augment.mixup or self.augment.cutmix):
            name = "mixup" if self.augment.mixup else "cutmix"
            raise ValueError(
                f"augment.{name} gives an image the hashtags of two, where loss: one_tag learns exactly one; "
                f"set augment.{name}: 0 or loss: softmax"
            )
        return self
