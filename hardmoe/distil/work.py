"""The distilled stage: one unit that trains one network of all images, with the mixture as its teacher."""

from collections.abc import Generator
from dataclasses import replace

from hardmoe.artifacts.names import expert_name
from hardmoe.config import Json
from hardmoe.data.reading import num_tags, open_examples
from hardmoe.distil.config import StudentConfig
from hardmoe.distil.stage import EXTRA_COPIES
from hardmoe.distil.teacher import MixtureTeacher
from hardmoe.hashing import derive_seed
from hardmoe.models.moe.config import MoeConfig
from hardmoe.stage import Completion, DriverContext, Finished, Phase, Unit, UnitContext
from hardmoe.training.config import TrainingConfig
from hardmoe.training.network import Architecture, NetworkJob, Start, architecture_of, load_weights, train_network


class DistilledWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """A single unit."""
        (done,) = yield Phase("train", [Unit(context.stage.name.rpartition("/")[2])])
        return Finished(done.payload)

    def run(self, context: UnitContext) -> Json:
        """Train, in the order and with the seed of the control."""
        student, seed = context.stage.section(StudentConfig, "student"), context.stage.config["seed"]
        trunk, vocabulary = context.input("trunk"), context.input("vocabulary")
        from_trunk = student.init == "trunk"
        job = NetworkJob(
            architecture=student_architecture(student, architecture_of(trunk), num_tags(vocabulary)),
            examples=open_examples(context, "dataset"),
            expert=None,
            vocabulary=vocabulary,
            config=context.stage.section(TrainingConfig, "training"),
            seed=derive_seed(seed, "expert", 0) if from_trunk else derive_seed(seed, "trunk"),
            start=Start(load_weights(trunk)) if from_trunk else Start(),
            teacher=_teacher(context, student),
            as_often_as_in=context.input(EXTRA_COPIES) if EXTRA_COPIES in context.stage.inputs else None,
        )
        return train_network(context, job, "distilled.json")


def student_architecture(student: StudentConfig, trunk: Architecture, num_tags: int) -> Architecture:
    """The trunk's own network, or another for the same images."""
    if student.backbone is None:
        return replace(trunk, num_tags=num_tags)
    moe = trunk.moe if student.backbone == trunk.backbone else MoeConfig()
    return Architecture(student.backbone, student.stem, trunk.image_size, num_tags, trunk.decode, moe)


def _teacher(context: UnitContext, student: StudentConfig) -> MixtureTeacher:
    embeddings = context.input("embeddings")
    count: int = embeddings.payload["experts"]
    live = expert_name(0) in context.stage.inputs
    experts = [context.input(expert_name(expert)) for expert in range(count)] if live else []
    return MixtureTeacher.of(student, embeddings, context.input("decoder"), experts)
