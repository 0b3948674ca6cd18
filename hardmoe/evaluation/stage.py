"""Declaration of the `evaluation` stage: which systems, where each one's embeddings and decoder are, and what it is made of."""

from collections.abc import Mapping
from dataclasses import dataclass

from hardmoe.artifacts.names import LIMITS
from hardmoe.evaluation.config import EvaluationConfig
from hardmoe.stage import Stage


@dataclass(frozen=True)
class System:
    """One system to be judged, by the names of artifacts."""

    embeddings: str
    """Artifact with the system's features of every test example."""
    column: str
    """Their column: `feature` in the trunk's table, `embedding` in the experts'."""
    decoders: tuple[str, ...]
    """One artifact with a decoder of its own per expert; or a single shared one."""
    shared: bool
    """Whether the decoder is a shared one, with alignment."""
    networks: tuple[str, ...]
    """What images go through: one network, or one of several experts."""
    starts: tuple[str, ...] = ()
    """Networks that those started from, whose training is a part of the system's."""
    gate: str | None = None
    """The network that says which of them an image goes through; None where there is one only."""
    branch_at: str | None = None
    """The stage up to which gate and experts are one; None for none."""
    passes: int = 1
    """How many of its networks an image goes through."""
    temperature: str | None = None
    """Artifact with the temperature of a mixture of several experts per image, whose embeddings are those of all of them."""
    chosen_by: str | None = None
    """Of systems that choose one of several experts per image whose embeddings there are: `validation`, always the one with the
    smallest loss on that split, or `labels`, the best for each image. They say what routing is worth, and have no cost."""
    losses: str | None = None
    """Artifact with every expert's loss on the validation split, for `validation`."""
    teacher: str | None = None
    """Name of another system that its network learnt from, and whose training is therefore a part of its own."""


COMPARED = "mixture"
"""Every other system's metrics are also given as a paired difference from this one's."""
ABSTENTION = "abstention"
"""Role in which the evaluation reads what the mixture is worth if it refuses images."""
OWN_IMAGES, SECOND_DATASET = "own_images", "second_dataset"
"""Roles in which the evaluation reads what probes say of this run's images and of those of a second dataset."""
_OF_PROBES = ("probe_sample", "retrieval_sample", "bootstrap_replicates")
"""Keys that probes depend on."""


def evaluation_stage(config: EvaluationConfig, systems: Mapping[str, System], further: Mapping[str, str] | None = None) -> Stage:
    """Metrics with intervals of all systems over the test split, and what each of them costs.

    Args:
        config: the recipe's section.
        systems: by name.
        further: artifacts of `probe_stage` and `abstention_stage` by role, whose results become a part of the evaluation's.
    """
    inputs = {"vocabulary": "vocabulary", **(further or {})}
    described = {}
    for name, system in systems.items():
        inputs[f"{name}:embeddings"] = system.embeddings
        for index, decoder in enumerate(system.decoders):
            inputs[f"{name}:decoder-{index:04d}"] = decoder
        for index, network in enumerate(system.networks):
            inputs[f"{name}:network-{index:04d}"] = network
        for index, start in enumerate(system.starts):
            inputs[f"{name}:start-{index:04d}"] = start
        described[name] = {"column": system.column, "decoders": len(system.decoders), "shared": system.shared}
        described[name] |= {"networks": len(system.networks), "starts": len(system.starts), "passes": system.passes}
        if system.gate is not None:
            inputs[f"{name}:gate"] = system.gate
            described[name] |= {"gate": True, "branch_at": system.branch_at}
        if system.temperature is not None:
            inputs[f"{name}:temperature"] = system.temperature
            described[name]["topk"] = True
        if system.chosen_by is not None:
            described[name] |= {"topk": True, "chosen_by": system.chosen_by}
        if system.teacher is not None:
            described[name]["teacher"] = system.teacher
        if system.losses is not None:
            inputs[f"{name}:losses"] = system.losses
    return Stage(
        name="evaluation",
        kind="evaluation",
        version=2,
        config={"evaluation": config.identity(), "systems": described},
        inputs=inputs,
        work="hardmoe.evaluation.work:EvaluationWork",
    )


def probe_stage(name: str, config: EvaluationConfig, systems: Mapping[str, System], place: str = "") -> Stage:
    """What a linear probe and the nearest neighbours make of the systems' spaces.

    Args:
        name: of the artifact.
        config: the recipe's section.
        systems: those that give an image one place, by name, with the embeddings of the images that are asked about.
        place: directory of a second dataset and its vocabulary; empty for the run's own, of which the evaluation has the
            nearest neighbours.
    """
    inputs = {"vocabulary": f"{place}vocabulary", "dataset": f"{place}dataset"}
    described = {}
    for system, told in systems.items():
        inputs[f"{system}:embeddings"] = told.embeddings
        if told.shared:
            inputs[f"{system}:decoder-0000"] = told.decoders[0]
        described[system] = {"column": told.column, "shared": told.shared}
    keys = {key: getattr(config, key) for key in _OF_PROBES}
    return Stage(
        name=name,
        kind="probe",
        version=1,
        config={"evaluation": keys, "systems": described, "retrieve": bool(place) and config.retrieval_sample > 0},
        inputs=inputs,
        work="hardmoe.evaluation.probe_work:ProbeWork",
    )


def abstention_stage(config: EvaluationConfig, mixture: System, nearest: str) -> Stage:
    """What the mixture is worth if it refuses images, by the distances that `nearest` has of held-out images."""
    return Stage(
        name=LIMITS,
        kind="abstention",
        version=1,
        config={
            "evaluation": {"bootstrap_replicates": config.bootstrap_replicates},
            "systems": {COMPARED: {"column": mixture.column, "shared": mixture.shared}},
        },
        inputs={
            "vocabulary": "vocabulary",
            "dataset": "dataset",
            "nearest": nearest,
            f"{COMPARED}:embeddings": mixture.embeddings,
            f"{COMPARED}:decoder-0000": mixture.decoders[0],
        },
        work="hardmoe.evaluation.abstention:AbstentionWork",
    )


def temperature_stage(name: str, embeddings: str, decoder: str) -> Stage:
    """T, fitted on the validation split."""
    return Stage(
        name=name,
        kind="topk-temperature",
        version=1,
        config={},
        inputs={"embeddings": embeddings, "decoder": decoder, "vocabulary": "vocabulary"},
        work="hardmoe.evaluation.topk:TemperatureWork",
    )


def losses_stage(name: str, embeddings: str, decoder: str) -> Stage:
    """Every expert's loss on the whole validation split."""
    return Stage(
        name=name,
        kind="expert-losses",
        version=1,
        config={},
        inputs={"embeddings": embeddings, "decoder": decoder, "vocabulary": "vocabulary"},
        work="hardmoe.evaluation.chosen:LossesWork",
    )
