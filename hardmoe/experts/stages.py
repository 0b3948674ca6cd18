"""Declarations of the expert, dense baseline and embedding stages."""

from collections.abc import Mapping
from dataclasses import replace

from hardmoe.artifacts.names import DENSE, expert_name
from hardmoe.config import Json
from hardmoe.experts.config import ExpertsConfig
from hardmoe.stage import Resources, Stage
from hardmoe.training.config import training_resources

EXTRA_COPIES = "extra_copies"
"""Role in which the dense baseline reads a partition whose experts train on copies of other parts' examples."""


MATCHES = "matches"
"""Role in which an expert reads which one of another run it starts from."""
BEFORE, HELD = "before", "held"
"""Roles in which an expert that goes on reads what it was before, and the alignment and decoder that it is trained against."""
ROUND = "round"
"""Key of a stage's config: which time the expert goes on, from 1."""
START = "start"
"""Key of a stage's config: the identity of what its network starts from, where that lies outside the root."""


def expert_stage(
    config: ExpertsConfig,
    expert: int,
    seed: int,
    partition: str = "partition",
    place: str = "experts",
    start: Json = None,
    matches: str | None = None,
) -> Stage:
    """One expert: a network trained on one part of a partition.

    Args:
        config: the recipe's section.
        expert: its number.
        seed: the recipe's.
        partition: name of the partition.
        place: directory of the experts.
        start: the identity of what `experts.init` names outside the root; None where it names nothing.
        matches: artifact that says which of another run's experts they start from; None where they do not.
    """
    stage = _network_stage(f"{place}/{expert_name(expert)}", config, seed, expert, partition, start)
    return stage if matches is None else replace(stage, inputs={**stage.inputs, MATCHES: matches})


def further_stage(stage: Stage, number: int, before: str, held: str) -> Stage:
    """An expert that goes on against a decoder that is held.

    Args:
        stage: from `expert_stage`, with the epochs of this round; what its `init` names is not read.
        number: which round, from 1.
        before: the expert's artifact before it.
        held: the shared decoder that was fitted to it.
    """
    inputs = {role: name for role, name in stage.inputs.items() if role != MATCHES}
    config = {key: value for key, value in stage.config.items() if key != START}
    return replace(stage, config={**config, ROUND: number}, inputs={**inputs, BEFORE: before, HELD: held})


def dense_stage(config: ExpertsConfig, seed: int, overlapping: str | None = None, start: Json = None) -> Stage:
    """The dense baseline: the same training on all examples; seeded like the expert of a mixture of one.

    Args:
        config: the recipe's section.
        seed: the recipe's.
        overlapping: the partition, if several of its experts train on one example: the baseline then shows every example as
            often as they do together, so that it sees the same examples equally often, at the same cost. Rejected: as many
            more epochs, which need not be a whole number and would show other examples than the experts see more often.
        start: as for `expert_stage`.
    """
    stage = _network_stage(DENSE, config, seed, None, "dataset", start)
    return stage if overlapping is None else replace(stage, inputs={**stage.inputs, EXTRA_COPIES: overlapping})


def trained_on(partition: Json) -> list[int]:
    """How many examples each expert of a partition trains on, copies of other parts' included, by what its record says."""
    counts = [partition["sizes"]["train"], *partition.get("extra", {}).values()]
    return [sum(of_one) for of_one in zip(*counts, strict=True)]


def match_name(place: str) -> str:
    """The artifact that says which of another run's experts those in this directory start from: `experts` has `matches`."""
    return f"{place.removesuffix('experts')}matches"


def _network_stage(name: str, config: ExpertsConfig, seed: int, expert: int | None, examples: str, start: Json) -> Stage:
    if expert is None:
        # The one network of all examples is shown as many either way, so it is the same artifact.
        config = config.model_copy(update={"budget": "epochs"})
    return Stage(
        name=name,
        kind="expert",
        version=3,
        config={"experts": config.identity(), "expert": expert, "seed": seed, **({} if start is None else {START: start})},
        operational={"experts": config.operational_values()},
        inputs={"examples": examples, "vocabulary": "vocabulary", "trunk": "trunk"},
        work="hardmoe.experts.train:ExpertWork",
        resources=training_resources(config.num_threads, config.gpus),
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


def nearest_embeddings_stage(name: str, nearest: str, networks: Mapping[int, str], dataset: str = "dataset") -> Stage:
    """The embeddings of the pairs that `nearest` lists, of images of a dataset."""
    return Stage(
        name=name,
        kind="nearest-embeddings",
        version=1,
        config={"experts": len(networks)},
        inputs={"dataset": dataset, "nearest": nearest, **{expert_name(e): network for e, network in networks.items()}},
        work="hardmoe.experts.nearest:NearestEmbeddingsWork",
        resources=Resources(num_cpus=1, num_gpus=None),
    )
