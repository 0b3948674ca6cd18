"""The recipe's `evaluation` section."""

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from hardmoe.config import Config, added
from hardmoe.data.config import DatasetConfig, HashtagsConfig
from hardmoe.models.moe.config import MoeConfig

SYSTEMS = (
    "trunk",
    "dense",
    "dense_refit",
    "experts_own_decoder",
    "mixture",
    "distilled",
    "mixture_topk",
    "best_single_expert",
    "oracle_expert",
    "random_partition",
)
"""Names that a rival cannot have."""
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


class RivalConfig(Config):
    """One network of all images that the mixture is held against, trained from fresh weights by the trunk's rules."""

    backbone: str = Field(min_length=1)
    """As `trunk.backbone`."""
    stem: Literal["auto", "small", "imagenet"] = "auto"
    """As `trunk.stem`."""
    moe: MoeConfig = added(MoeConfig())
    """As `trunk.moe`."""
    epochs: int | None = Field(None, ge=1)
    """How often it sees every image; null for as often as trunk and experts together."""


class TransferConfig(DatasetConfig):
    """A second, labelled dataset, read as `dataset` is, with hashtags of its own."""

    min_count: int = Field(5, ge=1)
    """As `hashtags.min_count`, of this dataset."""
    max_tags: int = Field(2000, ge=1)
    """As `hashtags.max_tags`, of this dataset."""

    @model_validator(mode="after")
    def _has_images_to_choose_by(self) -> Self:
        if self.validation_fraction == 0 and self.split_column is None:
            raise ValueError(
                "validation_fraction: 0 leaves no image to choose the probe's penalty by; set it to 0.05, or name a split_column"
            )
        return self

    def dataset(self) -> DatasetConfig:
        """The images, as a section of a recipe."""
        return DatasetConfig.model_validate(self.model_dump(exclude={"min_count", "max_tags"}))

    def hashtags(self) -> HashtagsConfig:
        """Which of their hashtags are asked for."""
        return HashtagsConfig(min_count=self.min_count, max_tags=self.max_tags)


class EvaluationConfig(Config):
    """Which controls are trained, and how finely the intervals are estimated."""

    dense_baseline: bool = True
    """Train one network on all the data with the same number of examples seen, and refit its decoder: the controls."""

    random_partition: bool = False
    """Also train a mixture on a random partition: what the clustering itself is worth. Costs as much as the mixture."""

    top_k: int | None = added(None, ge=2)
    """Also judge `mixture_topk`: every image through so many of its nearest experts, mixed by distance, with the sharpness fitted
    on the validation split. Costs as many expert passes an image, where the mixture costs one; null for not."""

    all_experts: bool = added(False)
    """Also send every held-out image through all experts: `best_single_expert` is the one with the smallest loss on the whole
    validation split, `oracle_expert` the best for each test image, told by its hashtags. Routing is worth what lies above the
    first, and cannot have a smaller loss than the second. Costs as many passes a held-out image as there are experts."""

    rivals: dict[str, RivalConfig] = added({})
    """Further controls by name, each one network of all images with its decoder refitted: `dense_2x: {backbone: quicknet_w17}`
    costs an image what a mixture of `quicknet_w12` does, gate and expert, and another may have its parameters."""

    retrieval_sample: int = added(20_000, ge=0)
    """Test images among which every image's nearest neighbours in each system's space are looked for; 0 for not."""

    probe: bool = added(False)
    """Also say what others could read off each system's space: a linear probe (logistic regression) and the votes of the nearest
    neighbours, fitted to frozen features of training images, chosen on validation and judged on test. Takes minutes a
    system where there are thousands of hashtags."""

    transfer: TransferConfig | None = added(None)
    """A second, labelled dataset that no network was trained on, with the same keys as `dataset` and `min_count` and `max_tags`:
    probes as above, and nearest neighbours among its test images, by its own hashtags; null for none. Its images go through
    trunk, gate, experts and controls once each."""

    probe_sample: int = added(20_000, ge=1)
    """Training images that probes are fitted to, and validation images that they are chosen on, at most about so many of each."""

    abstention: bool = added(False)
    """Also say how right the mixture is if it refuses the images farthest from every centroid, or those it is least sure of; and
    keep the distances by which it can refuse in use. Costs a look at the held-out images' features."""

    bootstrap_replicates: int = Field(default=1000, ge=1)
    """Poisson bootstrap replicates behind the 95 % intervals of the ranking metrics."""

    map_replicates: int = Field(default=100, ge=1)
    """Replicates behind the interval of `map`, which costs a pass over all scores for each of them."""

    def check_can_route(self, is_routed: bool, num_experts: int, features_from_elsewhere: bool) -> None:
        """Whether the partition can say what is asked of it.

        Raises:
            ValueError: it cannot, since its parts are random, its experts too few, or its features computed elsewhere.
        """
        by_distance = next((key for key in ("top_k", "all_experts", "abstention") if getattr(self, key)), None)
        if by_distance is not None and not is_routed:
            value = str(getattr(self, by_distance)).lower()
            raise ValueError(
                f"evaluation.{by_distance}: {value} goes by the distance to the experts' centroids, which random parts have none "
                f"of; set partition.method: kmeans, or leave evaluation.{by_distance} out"
            )
        if self.top_k is not None and self.top_k > num_experts:
            raise ValueError(
                f"evaluation.top_k is {self.top_k}, but there are {num_experts} experts (partition.experts); set it to as many "
                "at most"
            )
        if self.transfer is not None and (features_from_elsewhere or not is_routed):
            why = "features that were computed elsewhere (features.path)" if is_routed else "random parts"
            raise ValueError(
                f"evaluation.transfer sends other images to the experts by the trunk's features, which {why} cannot do; "
                "set partition.method: kmeans without features.path, or leave evaluation.transfer out"
            )

    @model_validator(mode="after")
    def _rivals_have_names_of_their_own(self) -> Self:
        for name in self.rivals:
            if name in SYSTEMS:
                raise ValueError(f"rivals: '{name}' is the name of a system that there is anyway; choose another")
            if _NAME.fullmatch(name) is None:
                raise ValueError(f"rivals: '{name}' is no name; use at most 40 of a to z, 0 to 9 and _, a letter first")
        return self
