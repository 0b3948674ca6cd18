"""Declarations of the `router` and `partition` stages."""

from hardmoe.partitioning.config import PartitionConfig
from hardmoe.stage import Stage


def router_stage(config: PartitionConfig, seed: int) -> Stage:
    """Feature transform and centroids, fitted on all training features."""
    return Stage(
        name="router",
        kind="router",
        version=3,
        config={"partition": config.identity(), "seed": seed},
        inputs={"features": "features"},
        work="hardmoe.partitioning.fit:RouterWork",
    )


def partition_stage(config: PartitionConfig, seed: int, name: str = "partition") -> Stage:
    """The dataset regrouped by expert."""
    routed = {"router": "router"} if config.method == "kmeans" else {}
    return Stage(
        name=name,
        kind="partition",
        version=2,
        config={"partition": {"experts": config.experts, "method": config.method}, "seed": seed},
        inputs={"dataset": "dataset", "features": "features", **routed},
        work="hardmoe.partitioning.regroup:PartitionWork",
    )
