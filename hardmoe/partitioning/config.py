"""The `partition` section of the recipe: how many experts, and which rule sends an image to which."""

from typing import Literal, Self

from pydantic import Field, model_validator

from hardmoe.config import Config

_SLACK = 0.05


class PartitionConfig(Config):
    """How the images are divided among the experts."""

    experts: int = Field(8, ge=1)
    """Number of experts, hence of parts. 1 makes the mixture the dense baseline."""

    method: Literal["kmeans", "balanced", "random"] = "kmeans"
    """`kmeans` over the trunk's features, `balanced`, the same with training parts of limited size, or `random`, by the hash of
    the example id: the control."""

    slack: float = Field(_SLACK, ge=0.0)
    """With `balanced`, a training part has at most 1 + slack times the mean number of examples; with 0, the mean rounded up."""

    transform: Literal["none", "l2"] = "l2"
    """What is done to a feature before distances are measured: `l2` scales it to length 1, so that distance means angle."""

    sample_size: int = Field(262_144, ge=1)
    """How many features, drawn by hash, choose the first centroids. Every feature takes part in every later pass."""

    max_passes: int = Field(50, ge=1)
    """At most this many passes over the features."""

    tolerance: float = Field(1e-4, ge=0.0, lt=1.0)
    """Stop when a pass lowers the sum of squared distances by no more than this share of it. 0 goes on to a standstill."""

    @property
    def is_routed(self) -> bool:
        """Whether a router's centroids decide, so that there is a router."""
        return self.method != "random"

    @model_validator(mode="after")
    def _slack_counts(self) -> Self:
        if self.method != "balanced" and self.slack != _SLACK:
            raise ValueError(
                f"slack {self.slack:g} does nothing with method '{self.method}': set method: balanced, or leave slack out"
            )
        return self

    @model_validator(mode="after")
    def _enough_to_seed(self) -> Self:
        if self.is_routed and self.sample_size < self.experts:
            raise ValueError(
                f"sample_size {self.sample_size} cannot seed {self.experts} experts: raise it to {self.experts} or more"
            )
        return self
