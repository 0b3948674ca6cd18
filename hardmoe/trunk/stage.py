"""Declaration of the `trunk` stage."""

from hardmoe.stage import Resources, Stage
from hardmoe.trunk.config import TrunkConfig


def trunk_stage(config: TrunkConfig, seed: int) -> Stage:
    """One network trained on everything."""
    return Stage(
        name="trunk",
        kind="trunk",
        version=3,
        config={"trunk": config.identity(), "seed": seed},
        operational={"trunk": config.operational_values()},
        inputs={"dataset": "dataset", "vocabulary": "vocabulary"},
        work="hardmoe.trunk.work:TrunkWork",
        resources=Resources(config.num_threads, None if config.gpus == "auto" else config.gpus),
    )
