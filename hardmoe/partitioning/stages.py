"""Declarations of the `router`, `partition` and `matches` stages."""

from hardmoe.config import Json
from hardmoe.partitioning.config import PartitionConfig
from hardmoe.stage import Stage

_EXTRA_COPIES = ("overlap", "out_of_part_fraction")
"""Keys that come into play once every example has its part."""
_AFTER_THE_FIT = ("slack", *_EXTRA_COPIES)
"""Keys that no centroid depends on."""
_OF_GIVEN_PARTS = ("experts", "method", "transform", "components")
"""Keys that the means of given parts depend on."""


def router_stage(config: PartitionConfig, seed: int) -> Stage:
    """Feature transform and centroids, fitted on all training features, the same for `kmeans` and `balanced`, several of a part
    for `two_level`; or, of given parts, their means."""
    if config.method == "given":
        return Stage(
            name="router",
            kind="given-router",
            version=1,
            config={"partition": {name: value for name, value in config.identity().items() if name in _OF_GIVEN_PARTS}},
            inputs={"dataset": "dataset", "features": "features"},
            work="hardmoe.partitioning.given:GivenRouterWork",
        )
    fitted = {name: value for name, value in config.identity().items() if name not in _AFTER_THE_FIT}
    if config.method == "two_level":
        fitted["fine_clusters"] = config.num_clusters  # so that null is the number it stands for
    else:
        fitted["method"] = "kmeans"
    fitted["restarts"] = config.num_starts
    return Stage(
        name="router",
        kind="router",
        version=5,
        config={"partition": fitted, "seed": seed},
        inputs={"features": "features"},
        work="hardmoe.partitioning.fit:RouterWork",
    )


def partition_stage(config: PartitionConfig, seed: int, name: str = "partition") -> Stage:
    """The dataset regrouped by expert."""
    routed = {"router": "router"} if config.is_routed else {}
    balanced = {"slack": config.slack} if config.method == "balanced" else {}
    extra = {name: value for name, value in config.identity().items() if name in _EXTRA_COPIES}
    return Stage(
        name=name,
        kind="partition",
        version=2,
        config={"partition": {"experts": config.experts, "method": config.method, **balanced, **extra}, "seed": seed},
        inputs={"dataset": "dataset", "features": "features", **routed},
        work="hardmoe.partitioning.regroup:PartitionWork",
    )


def match_stage(name: str, partition: str, root: str, identity: Json, seed: int) -> Stage:
    """Every part's expert in another run.

    Args:
        name: of the artifact.
        partition: name of this run's partition.
        root: the other run's.
        identity: what it is, from `OtherRun.identity`.
        seed: the recipe's; decides the sample.
    """
    return Stage(
        name=name,
        kind="match",
        version=1,
        config={"start": identity, "seed": seed},
        operational={"root": root},
        inputs={"partition": partition},
        work="hardmoe.partitioning.match:MatchWork",
    )


def nearest_stage(top_k: int, name: str, features: str = "features", *, training: bool = False) -> Stage:
    """The k nearest experts of the validation and the test split, and of the training split if asked.

    Args:
        top_k: how many.
        name: of the artifact.
        features: the artifact with the trunk's features of the images.
        training: whether to route training images as well.
    """
    return Stage(
        name=name,
        kind="nearest",
        version=1,
        config={"top_k": top_k} | ({"training": True} if training else {}),
        inputs={"features": features, "router": "router"},
        work="hardmoe.partitioning.nearest:NearestWork",
    )
