"""Where an expert, or the dense baseline, starts, and what of it is held as the trunk has it."""

from hardmoe.errors import RecipeError
from hardmoe.experts.config import ExpertsConfig
from hardmoe.stage import InputArtifact
from hardmoe.training.network import Architecture, Start, architecture_of, build_network, load_weights


def start_of(config: ExpertsConfig, architecture: Architecture, trunk: InputArtifact) -> Start:
    """Where a network of the recipe's experts starts.

    Args:
        config: the recipe's section.
        architecture: the expert's.
        trunk: the finished trunk.

    Raises:
        RecipeError: the network is another than the one that it is to start from, or has features of another width.
    """
    if config.init == "trunk" and architecture != architecture_of(trunk):
        raise RecipeError(
            f"experts.init is 'trunk', but experts.backbone '{config.backbone}' is another network than the trunk's "
            f"'{architecture_of(trunk).backbone}'; use the same one, or experts.init: random"
        )
    weights = load_weights(trunk) if config.init == "trunk" or config.decoder == "fixed" else {}
    if config.decoder == "fixed":
        width = build_network(architecture, seed=0).backbone.num_features
        check_decoder_fits(architecture.backbone, width, trunk.payload["num_features"])
    if config.init == "random":
        weights = {name: tensor for name, tensor in weights.items() if name.startswith("decoder.")}
    return Start(weights, holds_decoder=config.decoder == "fixed")


def check_decoder_fits(backbone: str, width: int, trunk_width: int) -> None:
    """Whether the trunk's decoder can read an expert's features.

    Raises:
        RecipeError: they have another width than the trunk's.
    """
    if width != trunk_width:
        raise RecipeError(
            f"experts.decoder is 'fixed', but '{backbone}' has features of width {width}, where the trunk's decoder reads "
            f"{trunk_width}; choose an experts.backbone of that width, or set experts.decoder: own"
        )
