"""Experts that begin as a trained dense network (Komatsuzaki et al. 2022, arXiv 2212.05055): each a copy of the piece it
replaces.

Routers, which a dense network has none of, begin fresh.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from hardmoe.models.moe.experts.mlp import MlpExperts
from hardmoe.models.moe.layer import MoeLayer, moe_layers


def upcycled(network: nn.Module, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network's layers of experts that a dense network's file has instead, by the network's names.

    Args:
        network: with layers of experts.
        dense: tensors of a file; of a layer whose own tensors it has, or whose dense ones it has not, nothing is made.
    """
    found: dict[str, Tensor] = {}
    for name, layer in moe_layers(network):
        parent = name.rpartition(".")[0]
        sources = [f"{parent}.{each}" for each in layer.dense_names]
        has_own = any(key.startswith(f"{name}.experts.") for key in dense)
        if has_own or not sources or any(f"{source}.weight" not in dense for source in sources):
            continue
        found |= {f"{name}.{key}": tensor.detach().clone() for key, tensor in layer.state_dict().items()}
        found |= {f"{name}.experts.{key}": tensor for key, tensor in _copies(layer, dense, sources).items()}
    return found


def _copies(layer: MoeLayer, dense: Mapping[str, Tensor], sources: list[str]) -> dict[str, Tensor]:
    if isinstance(layer.experts, MlpExperts):
        return MlpExperts.upcycled(dense, sources[0], sources[1], layer.experts.num_experts)
    (source,) = sources
    tensors = {key.removeprefix(f"{source}."): tensor for key, tensor in dense.items() if key.startswith(f"{source}.")}
    numbers = range(layer.experts.num_experts)
    return {f"members.{number}.{key}": tensor.clone() for number in numbers for key, tensor in tensors.items()}
