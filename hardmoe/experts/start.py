"""Where an expert, or the dense baseline, starts, and what of it is held as the trunk has it."""

from collections.abc import Mapping

from torch import Tensor

from hardmoe.config import Json
from hardmoe.errors import RecipeError
from hardmoe.experts.config import ExpertsConfig
from hardmoe.experts.origin import KEY
from hardmoe.stage import InputArtifact
from hardmoe.training.network import Architecture, Start, architecture_of, build_network, load_weights
from hardmoe.training.pretrained import fitting_weights, read_weights


def expert_architecture(config: ExpertsConfig, trunk: Architecture, num_tags: int) -> Architecture:
    """The network of every expert: the trunk's own, or another for the same images."""
    if config.backbone is None:
        return Architecture(trunk.backbone, trunk.stem, trunk.image_size, num_tags, trunk.decode)
    return Architecture(config.backbone, config.stem, trunk.image_size, num_tags, trunk.decode)


def start_of(config: ExpertsConfig, architecture: Architecture, trunk: InputArtifact, origin: Json) -> Start:
    """Where a network of the recipe's experts starts.

    Args:
        config: the recipe's section.
        architecture: the expert's.
        trunk: the finished trunk.
        origin: identity of what lies outside the root, from `start_identity`.

    Raises:
        RecipeError: the network is another than the one that it is to start from, or has features of another width.
        DataError: a file of weights cannot be read, or is not what it was.
    """
    if config.init == "trunk" and architecture != architecture_of(trunk):
        raise RecipeError(
            f"experts.init is 'trunk', but experts.backbone '{config.backbone}' is another network than the trunk's "
            f"'{architecture_of(trunk).backbone}'; use the same one, or experts.init: random"
        )
    weights: Mapping[str, Tensor] = {}
    if config.init == "trunk":
        weights = load_weights(trunk)
    elif config.init_path is not None:
        weights = _from_file(config.init_path, architecture, origin)
    if config.decoder == "own":
        return Start(weights, holds_until=config.shared_stage)
    width = build_network(architecture, seed=0).backbone.num_features
    check_decoder_fits(architecture.backbone, width, trunk.payload["num_features"])
    decoder = {name: tensor for name, tensor in load_weights(trunk).items() if name.startswith("decoder.")}
    return Start({**weights, **decoder}, holds_decoder=True, holds_until=config.shared_stage)


def _from_file(place: str, architecture: Architecture, origin: Json) -> dict[str, Tensor]:
    told: str = origin["sha256"]
    tensors = read_weights(place, KEY, None if told.startswith("etag:") else told)
    return fitting_weights(build_network(architecture, seed=0), tensors, place, architecture.backbone)


def check_file(place: str, architecture: Architecture) -> None:
    """Whether a file of weights is one of this network, but for its decoder.

    Raises:
        RecipeError: it is not.
        DataError: it cannot be read.
    """
    fitting_weights(build_network(architecture, seed=0), read_weights(place, KEY, None), place, architecture.backbone)


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
