"""The training of one expert, or of the dense baseline: one stage, one unit, one network."""

from collections.abc import Generator

from hardmoe.config import Json
from hardmoe.data.reading import num_tags, open_examples
from hardmoe.experts.config import ExpertsConfig
from hardmoe.experts.stages import EXTRA_COPIES, ROUND, trained_on
from hardmoe.experts.start import expert_architecture, start_of
from hardmoe.hashing import derive_seed
from hardmoe.stage import Completion, DriverContext, Finished, InputArtifact, Phase, Unit, UnitContext
from hardmoe.training.distillation import NetworkTeacher
from hardmoe.training.network import NetworkJob, architecture_of, flops_of, load_network, train_network


class ExpertWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """A single unit, named like the artifact, as costly as its part is large."""
        expert = context.stage.config["expert"]
        told = context.input("examples").payload
        equal = context.stage.section(ExpertsConfig, "experts").budget == "examples"
        cost = 1 if equal else told["sizes"]["train"] if expert is None else trained_on(told)[expert]
        unit = Unit(context.stage.name.rpartition("/")[2], cost=cost)
        (done,) = yield Phase("train", [unit])
        return Finished(done.payload)

    def run(self, context: UnitContext) -> Json:
        """Train on the part, starting where the recipe says."""
        config = context.stage.section(ExpertsConfig, "experts")
        trunk, vocabulary = context.input("trunk"), context.input("vocabulary")
        architecture = expert_architecture(config, architecture_of(trunk), num_tags(vocabulary))
        # Where it goes on, its images come in another order than before.
        order = ("round", number) if (number := context.stage.config.get(ROUND)) else ()
        job = NetworkJob(
            architecture=architecture,
            examples=open_examples(context, "examples"),
            expert=context.stage.config["expert"],
            vocabulary=vocabulary,
            config=config,
            # The dense baseline is seeded like expert 0, so that a mixture of one is the dense baseline to the bit.
            seed=derive_seed(context.stage.config["seed"], "expert", context.stage.config["expert"] or 0, *order),
            start=start_of(context, config, architecture),
            teacher=_teacher(trunk, config) if config.distill.weight else None,
            as_often_as_in=context.input(EXTRA_COPIES) if EXTRA_COPIES in context.stage.inputs else None,
            num_samples=_num_samples(context, config),
        )
        return train_network(context, job, "expert.json")


def _teacher(trunk: InputArtifact, config: ExpertsConfig) -> NetworkTeacher:
    network = load_network(trunk)
    # Two operations for each weight of a linear layer.
    decoding = 2 * sum(parameter.numel() for parameter in network.decoder.parameters())
    return NetworkTeacher(network, config.distill, flops_of(trunk) + decoding)


def _num_samples(context: UnitContext, config: ExpertsConfig) -> int | None:
    """How many samples an expert is shown where all are shown as many; None if its epochs decide.

    Counted over the examples with a label, which are those that a network sees. The remainder goes to the first experts, so that
    all of them together are shown exactly as many as the dense baseline.
    """
    if config.budget == "epochs":
        return None
    num_experts = len(context.input("examples").payload["sizes"]["train"])
    total = config.epochs * context.input("vocabulary").payload["labelled"]["train"]
    return int(total // num_experts + (context.stage.config["expert"] < total % num_experts))
