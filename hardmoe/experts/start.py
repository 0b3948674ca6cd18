"""Where an expert, or the dense baseline, starts, and what of it is held as the trunk has it."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hardmoe.artifacts.other_run import OtherRun
from hardmoe.config import Json
from hardmoe.data.reading import tag_names
from hardmoe.errors import RecipeError
from hardmoe.experts.config import ExpertsConfig
from hardmoe.experts.origin import KEY
from hardmoe.experts.stages import BEFORE, HELD, MATCHES, ROUND, START
from hardmoe.hashing import derive_seed
from hardmoe.models.shared_decoder import load_shared_decoder
from hardmoe.stage import UnitContext
from hardmoe.training.network import Architecture, Start, architecture_of, build_network, load_weights
from hardmoe.training.pretrained import fitting_weights, read_weights, translated_decoder


def expert_architecture(config: ExpertsConfig, trunk: Architecture, num_tags: int) -> Architecture:
    """The network of every expert: the trunk's own, or another for the same images."""
    if config.backbone is None:
        return replace(trunk, num_tags=num_tags)
    return Architecture(config.backbone, config.stem, trunk.image_size, num_tags, trunk.decode, config.moe)


def start_of(context: UnitContext, config: ExpertsConfig, architecture: Architecture) -> Start:
    """Where a network of the recipe's experts starts.

    Args:
        context: of the unit that trains it.
        config: the recipe's section.
        architecture: the expert's.

    Raises:
        RecipeError: the network is another than the one that it is to start from, or has features of another width.
        DataError: a file of weights cannot be read, or is not what it was.
    """
    trunk, origin = context.input("trunk"), context.stage.config.get(START)
    if ROUND in context.stage.config:
        return _against_held(context, config)
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
    elif config.init_root is not None:
        weights = _from_run(context, OtherRun.open_same(config.init_root, origin), config, architecture)
    if config.decoder == "own":
        return Start(weights, holds_until=config.shared_stage)
    width = build_network(architecture, seed=0).backbone.num_features
    check_decoder_fits(architecture.backbone, width, trunk.payload["num_features"])
    decoder = {name: tensor for name, tensor in load_weights(trunk).items() if name.startswith("decoder.")}
    return Start({**weights, **decoder}, holds_decoder=True, holds_until=config.shared_stage)


def _against_held(context: UnitContext, config: ExpertsConfig) -> Start:
    """Where the expert was before, its decoder replaced by its own alignment and the shared decoder, as one layer, and held.

    Of z = A h + b and logits = D z + d that layer is D A and D b + d, from where the alignment sends zero and the unit vectors.
    """
    weights, shared = load_weights(context.input(BEFORE)), load_shared_decoder(context.input(HELD))
    width = weights["decoder.weight"].shape[1]
    probes_PE = torch.cat([torch.zeros(1, width), torch.eye(width)])
    with torch.inference_mode():
        sent_PZ = shared.align(probes_PE, torch.full((len(probes_PE),), context.stage.config["expert"])).double()
        decoder_VZ, bias_V = shared.decoder.weight.double(), shared.decoder.bias.double()
        layer_VE = decoder_VZ @ (sent_PZ[1:] - sent_PZ[0]).T
        offset_V = decoder_VZ @ sent_PZ[0] + bias_V
    held = {"decoder.weight": layer_VE.float().clone(), "decoder.bias": offset_V.float().clone()}
    return Start({**weights, **held}, holds_decoder=True, holds_until=config.shared_stage)


def _from_file(place: str, architecture: Architecture, origin: Json) -> dict[str, Tensor]:
    told: str = origin["sha256"]
    tensors = read_weights(place, KEY, None if told.startswith("etag:") else told)
    return fitting_weights(build_network(architecture, seed=0), tensors, place, architecture.backbone)


def _from_run(context: UnitContext, run: OtherRun, config: ExpertsConfig, architecture: Architecture) -> dict[str, Tensor]:
    """The weights of the other run's expert that this one was matched with, or of its dense baseline for this run's."""
    check_run(run, config, architecture)
    expert = context.stage.config["expert"]
    if expert is None:
        assert run.dense is not None
        source = run.dense
    else:
        source = run.experts[context.input(MATCHES).payload["experts"][expert]]
    fresh = build_network(architecture, seed=derive_seed(context.stage.config["seed"], "new hashtags")).decoder
    return translated_decoder(load_weights(source), tag_names(run.vocabulary), fresh, tag_names(context.input("vocabulary")))


def check_run(run: OtherRun, config: ExpertsConfig, architecture: Architecture) -> None:
    """Whether another run's experts are networks like this run's, but for the vocabulary.

    Raises:
        RecipeError: they are not.
    """
    there = replace(architecture_of(run.experts[0]), num_tags=architecture.num_tags)
    if there != architecture:
        theirs, ours = (f"'{a.backbone}' (stem {a.stem}, {a.image_size} px, decode {a.decode})" for a in (there, architecture))
        raise RecipeError(
            f"the experts of the run {run.root} are {theirs} where this run's are {ours}; set experts.backbone and "
            "trunk.image_size to theirs, or choose another experts.init"
        )
    loss = run.experts[0].record.config["experts"].get("loss", "softmax")
    if (loss == "sigmoid") != (config.loss == "sigmoid"):
        raise RecipeError(
            f"the experts of the run {run.root} were trained with loss '{loss}', whose outputs mean something else than those of "
            f"experts.loss '{config.loss}'; set experts.loss: {loss}, or choose another experts.init"
        )


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
