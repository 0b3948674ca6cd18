"""Declarations of the `router` and `partition` stages."""

from hardmoe.partitioning.config import PartitionConfig
from hardmoe.stage import Stage

_EXTRA_COPIES = ("overlap", "out_of_part_fraction")
"""Keys that come into play once every example has its part."""


def router_stage(config: PartitionConfig, seed: int) -> Stage:
    """Feature transform and centroids, fitted on all training features; of given parts, their means."""
    if config.method == "given":
        return Stage(
            name="router",
            kind="given-router",
            version=1,
            config={"partition": {name: config.identity()[name] for name in ("experts", "method", "transform")}},
            inputs={"dataset": "dataset", "features": "features"},
            work="hardmoe.partitioning.given:GivenRouterWork",
        )
    return Stage(
        name="router",
        kind="router",
        version=3,
        config={"partition": {k: v for k, v in config.identity().items() if k not in _EXTRA_COPIES}, "seed": seed},
        inputs={"features": "features"},
        work="hardmoe.partitioning.fit:RouterWork",
    )


def partition_stage(config: PartitionConfig, seed: int, name: str = "partition") -> Stage:
    """The dataset regrouped by expert."""
    routed = {} if config.method == "random" else {"router": "router"}
    extra = {name: value for name, value in config.identity().items() if name in _EXTRA_COPIES}
    return Stage(
        name=name,
        kind="partition",
        version=2,
        config={"partition": {"experts": config.experts, "method": config.method, **extra}, "seed": seed},
        inputs={"dataset": "dataset", "features": "features", **routed},
        work="hardmoe.partitioning.regroup:PartitionWork",
    )
