"""Declarations of the expert, dense baseline and embedding stages."""

from collections.abc import Mapping
from dataclasses import replace

from hardmoe.experts.config import ExpertsConfig
from hardmoe.stage import Resources, Stage

EXTRA_COPIES = "extra_copies"
"""Role in which the dense baseline reads a partition whose experts train on copies of other parts' examples."""


def expert_name(expert: int) -> str:
    """`expert-0007`."""
    return f"expert-{expert:04d}"


def expert_stage(config: ExpertsConfig, expert: int, seed: int, partition: str = "partition", place: str = "experts") -> Stage:
    """One expert: a network trained on one part of a partition."""
    return _network_stage(f"{place}/{expert_name(expert)}", config, seed, expert, partition)


def dense_stage(config: ExpertsConfig, seed: int, overlapping: str | None = None) -> Stage:
    """The dense baseline: the same training on all examples; seeded like the expert of a mixture of one.

    Args:
        config: the recipe's section.
        seed: the recipe's.
        overlapping: the partition, if several of its experts train on one example: the baseline then shows every example as
            often as they do together, so that it sees the same examples equally often, at the same cost. Rejected: as many
            more epochs, which need not be a whole number and would show other examples than the experts see more often.
    """
    stage = _network_stage("baselines/dense", config, seed, None, "dataset")
    return stage if overlapping is None else replace(stage, inputs={**stage.inputs, EXTRA_COPIES: overlapping})


def _network_stage(name: str, config: ExpertsConfig, seed: int, expert: int | None, examples: str) -> Stage:
    if expert is None:
        # The one network of all examples is shown as many either way, so it is the same artifact.
        config = config.model_copy(update={"budget": "epochs"})
    return Stage(
        name=name,
        kind="expert",
        version=3,
        config={"experts": config.identity(), "expert": expert, "seed": seed},
        operational={"experts": config.operational_values()},
        inputs={"examples": examples, "vocabulary": "vocabulary", "trunk": "trunk"},
        work="hardmoe.experts.train:ExpertWork",
        resources=Resources(config.num_threads, None if config.gpus == "auto" else config.gpus),
    )


def embeddings_stage(name: str, examples: str, networks: Mapping[int, str], partitioned: bool) -> Stage:
    """What every example's own expert says of it. Not partitioned: one network for all examples."""
    return Stage(
        name=name,
        kind="embeddings",
        version=3,
        config={"experts": len(networks), "partitioned": partitioned},
        inputs={"examples": examples, **{expert_name(expert): network for expert, network in networks.items()}},
        work="hardmoe.experts.embed:EmbeddingsWork",
        resources=Resources(num_cpus=1, num_gpus=None),
    )


def nearest_embeddings_stage(name: str, nearest: str, networks: Mapping[int, str]) -> Stage:
    """The embeddings of the pairs that `nearest` lists."""
    return Stage(
        name=name,
        kind="nearest-embeddings",
        version=1,
        config={"experts": len(networks)},
        inputs={"dataset": "dataset", "nearest": nearest, **{expert_name(e): network for e, network in networks.items()}},
        work="hardmoe.experts.nearest:NearestEmbeddingsWork",
        resources=Resources(num_cpus=1, num_gpus=None),
    )
