"""Declaration of the training of the distilled network."""

from collections.abc import Sequence
from dataclasses import dataclass

from hardmoe.artifacts.names import expert_name
from hardmoe.distil.config import StudentConfig
from hardmoe.stage import Stage
from hardmoe.training.config import AugmentConfig, Gpus, TrainingConfig, training_resources

NETWORK = "distilled/network"
EMBEDDINGS = "distilled/embeddings"
DECODER = "distilled/decoder"
EXTRA_COPIES = "extra_copies"
"""Role in which it reads a partition whose experts train on copies of other parts' examples, as the dense baseline does."""


@dataclass(frozen=True)
class TaughtBy:
    """A finished mixture, by the names of artifacts."""

    embeddings: str
    decoder: str
    experts: Sequence[str]


@dataclass(frozen=True)
class TrainedLike:
    """The training of the control."""

    config: TrainingConfig
    gpus: Gpus
    overlapping: str | None = None
    """The partition, if several of its experts train on one example and the control shows it as often as they do together."""


def distilled_stage(student: StudentConfig, training: TrainedLike, mixture: TaughtBy, seed: int) -> Stage:
    """One network of all images that follows the mixture; the experts are read only if images are augmented (see `teacher`)."""
    inputs = {"dataset": "dataset", "vocabulary": "vocabulary", "trunk": "trunk"}
    inputs |= {"embeddings": mixture.embeddings, "decoder": mixture.decoder}
    if training.config.augment != AugmentConfig():
        inputs |= {expert_name(expert): name for expert, name in enumerate(mixture.experts)}
    if training.overlapping is not None:
        inputs[EXTRA_COPIES] = training.overlapping
    return Stage(
        name=NETWORK,
        kind="distilled",
        version=1,
        config={"student": student.identity(), "training": training.config.identity(), "seed": seed},
        operational={"student": student.operational_values(), "training": training.config.operational_values()},
        inputs=inputs,
        work="hardmoe.distil.work:DistilledWork",
        resources=training_resources(training.config.num_threads, training.gpus),
    )
