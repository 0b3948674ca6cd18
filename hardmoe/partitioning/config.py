"""The `partition` section of the recipe: how many experts, and which rule sends an image to which."""

from typing import Literal, Self

from pydantic import Field, model_validator

from hardmoe.config import Config, added

_SLACK = 0.05
_FINE_PER_EXPERT, _MOST_FINE = 16, 16_384
_MOST_STARTS, _LEAST_STARTS = 8, 2


def default_starts(num_clusters: int) -> int:
    """How many starts k-means compares where nobody says: with few clusters one is often unlucky, with many chance evens out."""
    return min(_MOST_STARTS, max(_LEAST_STARTS, 256 // num_clusters))


class PartitionConfig(Config):
    """How the images are divided among the experts."""

    experts: int = Field(8, ge=1)
    """Number of experts, hence of parts. 1 makes the mixture the dense baseline."""

    method: Literal["kmeans", "balanced", "two_level", "given", "random"] = "kmeans"
    """`kmeans` over the trunk's features; `balanced`, the same with training parts of limited size; `two_level`, many fine
    clusters grouped into parts of any shape; `given`, by the dataset's own column `dataset.part_column`; or `random`, by the hash
    of the example id: the control."""

    fine_clusters: int | None = added(None, ge=1)
    """With `two_level`, how many clusters k-means finds before they are grouped; null: 16 times as many as experts."""

    slack: float = added(_SLACK, ge=0.0)
    """With `balanced`, a training part has at most 1 + slack times the mean number of examples; with 0, the mean rounded up."""

    overlap: float | None = added(None, ge=1.0)
    """A training image whose second nearest centroid is at most so many times as far away as that of its part, such as 1.1,
    trains the second one's expert as well; null: none does."""

    out_of_part_fraction: float = added(0.0, ge=0.0, lt=1.0)
    """Share of every expert's training images that are drawn, by hash, from the other parts, such as 0.02."""

    transform: Literal["none", "l2", "pca", "whiten"] = "l2"
    """What is done to a feature before distances are measured: `l2` scales it to length 1, so that distance means angle; `pca`
    does so with what its distance from the mean is along principal directions; `whiten`, with directions of equal variance."""

    components: int | None = added(None, ge=1)
    """With `pca` and `whiten`, so many principal directions, such as 64; null: all whose variance is not lost in rounding."""

    spherical: bool = added(False)
    """Whether k-means scales its centroids to length 1, so that a part is those images whose direction is nearest to its own."""

    sample_size: int = Field(262_144, ge=1)
    """At most so many features, drawn by hash, choose the first centroids. Every feature takes part in every later pass."""

    restarts: int | None = Field(None, ge=1, le=99)
    """So many starts are tried on the sample, and the one with the smallest sum of squared distances is taken; null: eight for up
    to 32 experts, fewer for more, two from 128 on."""

    max_share: float = Field(0.9, gt=0.0, le=1.0)
    """A fit whose largest part holds more than this share of the examples is refused as collapsed."""

    max_passes: int = Field(50, ge=1)
    """At most this many passes over the features."""

    tolerance: float = Field(1e-4, ge=0.0, lt=1.0)
    """Stop when a pass lowers the sum of squared distances by no more than this share of it. 0 goes on to a standstill."""

    @property
    def is_routed(self) -> bool:
        """Whether there is a router, which knows of any image where it belongs."""
        return self.method != "random"

    @property
    def is_fitted(self) -> bool:
        """Whether k-means finds the router's centroids."""
        return self.method in ("kmeans", "balanced", "two_level")

    @property
    def num_clusters(self) -> int:
        """How many clusters k-means looks for: one per expert, or the fine ones."""
        if self.method != "two_level":
            return self.experts
        return self.fine_clusters or _FINE_PER_EXPERT * self.experts

    @property
    def num_starts(self) -> int:
        """How many starts are tried."""
        return self.restarts or default_starts(self.num_clusters)

    @model_validator(mode="after")
    def _slack_counts(self) -> Self:
        if self.method != "balanced" and self.slack != _SLACK:
            raise ValueError(
                f"slack {self.slack:g} does nothing with method '{self.method}': set method: balanced, or leave slack out"
            )
        return self

    @model_validator(mode="after")
    def _components_have_directions(self) -> Self:
        if self.components is not None and self.transform in ("none", "l2"):
            raise ValueError(
                f"components {self.components} does nothing with transform '{self.transform}', which has no principal "
                "directions: set transform: pca or whiten, or leave components out"
            )
        return self

    @model_validator(mode="after")
    def _sphere_has_points(self) -> Self:
        if self.spherical and not self.is_fitted:
            raise ValueError(
                f"spherical k-means needs a fit, and method '{self.method}' makes none: set method: kmeans, balanced or "
                "two_level, or leave spherical out"
            )
        if self.spherical and self.transform == "none":
            raise ValueError(
                "spherical k-means needs features of length 1, and transform 'none' leaves them as they are: "
                "set transform: l2, pca or whiten, or leave spherical out"
            )
        return self

    @model_validator(mode="after")
    def _fine_clusters_can_be_grouped(self) -> Self:
        asked = self.fine_clusters
        if asked is not None and self.method != "two_level":
            raise ValueError(
                f"fine_clusters {asked} does nothing with method '{self.method}': set method: two_level, or leave it out"
            )
        if asked is not None and asked < self.experts:
            raise ValueError(
                f"fine_clusters {asked} cannot be grouped into {self.experts} parts: raise it to {self.experts} or more"
            )
        if self.method == "two_level" and self.num_clusters > _MOST_FINE:
            raise ValueError(
                f"{self.num_clusters} fine clusters are too many to be compared pair by pair: "
                f"set fine_clusters to {_MOST_FINE} or less, or ask for fewer experts"
            )
        return self

    @model_validator(mode="after")
    def _enough_to_seed(self) -> Self:
        wanted = self.num_clusters
        if self.is_fitted and self.sample_size < wanted:
            what = "fine clusters" if self.method == "two_level" else "experts"
            raise ValueError(f"sample_size {self.sample_size} cannot seed {wanted} {what}: raise it to {wanted} or more")
        return self

    @model_validator(mode="after")
    def _extra_copies_have_somewhere_to_go(self) -> Self:
        asked = "overlap" if self.overlap is not None else "out_of_part_fraction"
        if self.has_extra_copies and self.experts == 1:
            raise ValueError(f"{asked} {getattr(self, asked)} needs other parts, and experts is 1; take it out, or raise experts")
        if self.overlap is not None and self.method == "random":
            raise ValueError(
                f"overlap {self.overlap} goes by distances to centroids, and method 'random' has none; "
                "take it out, or set out_of_part_fraction"
            )
        return self

    @property
    def has_extra_copies(self) -> bool:
        """Whether experts train on examples of other parts as well."""
        return self.overlap is not None or self.out_of_part_fraction > 0.0
