"""How a network is trained: the fields that the trunk's and the experts' sections of the recipe share."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hardmoe.config import Config, operational

Gpus = Annotated[float, Field(ge=0)] | Literal["auto"]
"""How many GPUs a unit takes, a fraction to share one; `auto` is one where there are any, else none."""


class TrainingConfig(Config):
    """Stochastic gradient descent with momentum, a linear warm-up and a cosine to zero."""

    epochs: int = Field(2, ge=1)
    """Passes over the examples; each pass sees every example exactly once, or as often as `repeat_threshold` says."""

    batch_size: int = Field(256, ge=1)
    """Examples per step at most; the batches of an epoch differ by at most one example."""

    repeat_threshold: float | None = Field(None, gt=0, le=1)
    """Repeat examples of rare hashtags: a hashtag on a share f of the examples counts sqrt(threshold / f) times where that is
    more than once, an example as often as its rarest hashtag, fractions by lot in each epoch; null repeats none."""

    learning_rate: float = Field(0.1, gt=0)
    """Peak learning rate for a batch of 256; it is scaled in proportion to `batch_size` (Goyal et al. 2017)."""

    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of the descent."""

    nesterov: bool = True
    """Nesterov's form of the momentum."""

    weight_decay: float = Field(5e-4, ge=0)
    """L2 penalty on weights of two or more dimensions; biases and normalisation layers are left out."""

    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of all steps over which the learning rate rises linearly."""

    checkpoint_every_steps: int | None = operational(200, ge=1)
    """Steps between checkpoints; null for none by steps."""

    checkpoint_every_seconds: float | None = operational(120.0, gt=0)
    """Seconds between checkpoints, whichever comes first; null for none by time. Where they fall changes no result."""

    num_threads: int = operational(1, ge=1)
    """CPU threads of one unit. Results are the same bytes only for the same number."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0; set nesterov: false or momentum: 0.9")
        return self
