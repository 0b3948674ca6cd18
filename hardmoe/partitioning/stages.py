"""Declarations of the `router` and `partition` stages."""

from hardmoe.partitioning.config import PartitionConfig
from hardmoe.stage import Stage

_ROUTER_KEYS = ("experts", "transform", "sample_size", "max_passes", "tolerance")


def router_stage(config: PartitionConfig, seed: int) -> Stage:
    """Feature transform and centroids, fitted on all training features; the same ones for every method that routes."""
    identity = config.identity()
    fitted = {"method": "kmeans", **{key: identity[key] for key in _ROUTER_KEYS}}
    return Stage(
        name="router",
        kind="router",
        version=2,
        config={"partition": fitted, "seed": seed},
        inputs={"features": "features"},
        work="hardmoe.partitioning.fit:RouterWork",
    )


def partition_stage(config: PartitionConfig, seed: int, name: str = "partition") -> Stage:
    """The dataset regrouped by expert."""
    routed = {"router": "router"} if config.is_routed else {}
    balanced = {"slack": config.slack} if config.method == "balanced" else {}
    return Stage(
        name=name,
        kind="partition",
        version=2,
        config={"partition": {"experts": config.experts, "method": config.method, **balanced}, "seed": seed},
        inputs={"dataset": "dataset", "features": "features", **routed},
        work="hardmoe.partitioning.regroup:PartitionWork",
    )
