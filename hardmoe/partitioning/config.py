"""The `partition` section of the recipe: how many experts, and which rule sends an image to which."""

from typing import Literal, Self

from pydantic import Field, model_validator

from hardmoe.config import Config


class PartitionConfig(Config):
    """How the images are divided among the experts."""

    experts: int = Field(8, ge=1)
    """Number of experts, hence of parts. 1 makes the mixture the dense baseline."""

    method: Literal["kmeans", "random"] = "kmeans"
    """`kmeans` over the trunk's features, or `random`, by the hash of the example id: the control."""

    transform: Literal["none", "l2"] = "l2"
    """What is done to a feature before distances are measured: `l2` scales it to length 1, so that distance means angle."""

    sample_size: int = Field(262_144, ge=1)
    """At most so many features, drawn by hash, choose the first centroids. Every feature takes part in every later pass."""

    restarts: int = Field(3, ge=1, le=99)
    """So many starts are tried on the sample, and the one with the smallest sum of squared distances is taken."""

    max_share: float = Field(0.9, gt=0.0, le=1.0)
    """A fit whose largest part holds more than this share of the examples is refused as collapsed."""

    max_passes: int = Field(50, ge=1)
    """At most this many passes over the features."""

    tolerance: float = Field(1e-4, ge=0.0, lt=1.0)
    """Stop when a pass lowers the sum of squared distances by no more than this share of it. 0 goes on to a standstill."""

    @model_validator(mode="after")
    def _enough_to_seed(self) -> Self:
        if self.method == "kmeans" and self.sample_size < self.experts:
            raise ValueError(
                f"sample_size {self.sample_size} cannot seed {self.experts} experts: raise it to {self.experts} or more"
            )
        return self
