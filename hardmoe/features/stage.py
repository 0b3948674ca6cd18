"""Declaration of the `features` stage: the trunk's features, or features that were computed elsewhere."""

from hardmoe.features.config import FeaturesConfig
from hardmoe.stage import Resources, Stage


def features_stage(config: FeaturesConfig) -> Stage:
    """One float16 vector per example, shard by shard."""
    return Stage(
        name="features",
        kind="features",
        version=3,
        config={},
        operational={"features": config.operational_values()},
        inputs={"dataset": "dataset", "trunk": "trunk"},
        work="hardmoe.features.work:FeaturesWork",
        resources=Resources(num_cpus=config.num_threads, num_gpus=None),
    )


def external_features_stage(config: FeaturesConfig, sha256: str, named_by_key: bool) -> Stage:
    """The same tables, from files.

    Args:
        config: says where the files are.
        sha256: the digest of their names, sizes and contents.
        named_by_key: whether the user names examples by keys of their own (`dataset.id_column`), as the files then do.
    """
    return Stage(
        name="features",
        kind="features",
        version=2,
        config={"external": {"sha256": sha256, "named_by_key": named_by_key}},
        operational={"features": config.operational_values()},
        inputs={"dataset": "dataset"},
        work="hardmoe.features.external:ExternalFeaturesWork",
    )
