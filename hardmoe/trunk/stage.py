"""Declaration of the `trunk` stage: a network that is trained on all examples from fresh weights."""

from hardmoe.stage import Stage
from hardmoe.training.config import training_resources
from hardmoe.trunk.config import TrunkConfig


def trunk_stage(config: TrunkConfig, seed: int, name: str = "trunk") -> Stage:
    """One network trained on everything: the run's trunk, or under another name a rival of its mixture."""
    return Stage(
        name=name,
        kind="trunk",
        version=3,
        config={"trunk": config.identity(), "seed": seed},
        operational={"trunk": config.operational_values()},
        inputs={"dataset": "dataset", "vocabulary": "vocabulary"},
        work="hardmoe.trunk.work:TrunkWork",
        resources=training_resources(config.num_threads, config.gpus),
    )
