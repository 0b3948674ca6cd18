"""The trunk stage: one network trained on the hashtags of all training examples."""

from collections.abc import Generator

from hardmoe.config import Json
from hardmoe.data.reading import num_tags, open_examples
from hardmoe.hashing import derive_seed
from hardmoe.stage import Completion, DriverContext, Finished, Phase, Unit, UnitContext
from hardmoe.training.network import Architecture, NetworkJob, train_network
from hardmoe.trunk.config import TrunkConfig


class TrunkWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """A single unit."""
        (done,) = yield Phase("train", [Unit(context.stage.name.rpartition("/")[2])])
        return Finished(done.payload)

    def run(self, context: UnitContext) -> Json:
        """Train."""
        config = context.stage.section(TrunkConfig, "trunk")
        vocabulary = context.input("vocabulary")
        job = NetworkJob(
            architecture=Architecture(
                config.backbone, config.stem, config.image_size, num_tags(vocabulary), config.decode, config.moe
            ),
            examples=open_examples(context, "dataset"),
            expert=None,
            vocabulary=vocabulary,
            config=config,
            seed=derive_seed(context.stage.config["seed"], "trunk"),
        )
        return train_network(context, job, "trunk.json")
