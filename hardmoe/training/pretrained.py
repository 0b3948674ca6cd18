"""Weights from elsewhere: which of a file's tensors belong to a network, and another run's in this run's vocabulary.

A file is one that hardmoe wrote (`backbone.network.…` and `decoder.…`), or holds a network's own tensors under its own names, as
torchvision, timm and most others write them. Every tensor of the backbone must be there; a head that the file has and the
backbone has not is left. The decoder is taken where it has the network's shape, and begins fresh where it has not: a file does
not say which hashtags its rows stand for, and a start is not more than that. Rejected: taking whatever happens to fit,
which trains a half empty network without a word; and `.pt` files, which execute code when they are read.
"""

import hashlib
from collections.abc import Mapping, Sequence

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from hardmoe.data.places import read_place
from hardmoe.errors import DataError, RecipeError
from hardmoe.models.backbones import TagClassifier
from hardmoe.models.moe.upcycling import upcycled

_BACKBONE, _WEIGHT, _BIAS = "backbone.network.", "decoder.weight", "decoder.bias"
_COUNTER = "num_batches_tracked"
"""Batch normalisation's counter, which older files lack and no forward pass reads."""


def translated_decoder(
    weights: Mapping[str, Tensor], names: Sequence[str], fresh: nn.Linear, wanted: Sequence[str]
) -> dict[str, Tensor]:
    """A network's weights with its decoder in another vocabulary: rows of known hashtags where they belong, fresh ones for new.

    Args:
        weights: of a `TagClassifier`.
        names: its hashtags, by index.
        fresh: the decoder of the network that is to be.
        wanted: that one's hashtags.
    """
    position = {name: index for index, name in enumerate(names)}
    known = [(new, position[name]) for new, name in enumerate(wanted) if name in position]
    weight, bias = fresh.weight.detach().clone(), torch.full_like(fresh.bias, float(weights[_BIAS].min()))
    # A new hashtag begins as the rarest of the old ones: what nothing was said of yet is no likely answer.
    for new, old in known:
        weight[new], bias[new] = weights[_WEIGHT][old], weights[_BIAS][old]
    return {**weights, _WEIGHT: weight, _BIAS: bias}


def read_weights(place: str, key: str, sha256: str | None) -> dict[str, Tensor]:
    """The tensors of a file.

    Args:
        place: its path or URI.
        key: the recipe's key that names it.
        sha256: what its content was when the run was planned; None if only the object store knows.

    Raises:
        DataError: it cannot be read, or is another by now.
        RecipeError: it is no file of tensors.
    """
    data = read_place(place, "the weights", key)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"the weights {place} changed since the run was begun; put the file back, or run again with a new root")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise RecipeError(
            f"{key}: {place} is not a file of safetensors ({error}); convert it with safetensors.torch.save_file"
        ) from error
    return tensors


def fitting_weights(model: TagClassifier, tensors: Mapping[str, Tensor], place: str, backbone: str) -> dict[str, Tensor]:
    """The tensors of a file that a network starts from, by the network's names.

    Args:
        model: the network.
        tensors: the file's.
        place: the file, for messages.
        backbone: the network's name, for messages.

    Raises:
        RecipeError: the backbone's are not all there, or have other shapes; names the first.
    """
    if not any(name.startswith(_BACKBONE) for name in tensors):
        tensors = {_BACKBONE + name: tensor for name, tensor in tensors.items()}
    tensors = {**tensors, **upcycled(model, tensors)}
    wanted = model.state_dict()
    found: dict[str, Tensor] = {}
    for name, tensor in wanted.items():
        given = tensors.get(name)
        if given is not None and given.shape == tensor.shape:
            found[name] = given
        elif name.startswith(_BACKBONE) and not (given is None and name.endswith(_COUNTER)):
            what = "is missing" if given is None else f"has the shape {list(given.shape)} and not {list(tensor.shape)}"
            raise RecipeError(
                f"{place} does not hold the weights of the backbone '{backbone}': {name.removeprefix(_BACKBONE)} {what}; "
                "give a file of this network, or set experts.backbone (and experts.stem) to the file's"
            )
    return found
