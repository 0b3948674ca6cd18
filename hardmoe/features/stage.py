"""Declaration of the `features` stage."""

from hardmoe.stage import Resources, Stage


def features_stage() -> Stage:
    """One float16 vector per example, shard by shard."""
    return Stage(
        name="features",
        kind="features",
        version=1,
        config={},
        inputs={"dataset": "dataset", "trunk": "trunk"},
        work="hardmoe.features.work:FeaturesWork",
        resources=Resources(num_cpus=1, num_gpus=None),
    )
