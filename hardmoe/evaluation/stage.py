"""Declaration of the `evaluation` stage: which systems, where each one's embeddings and decoder are, and what it is made of."""

from collections.abc import Mapping
from dataclasses import dataclass

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


def evaluation_stage(config: EvaluationConfig, systems: Mapping[str, System]) -> Stage:
    """Metrics with intervals of all systems over the test split, and what each of them costs."""
    inputs = {"vocabulary": "vocabulary"}
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
