"""The dispatch that can be read: products with one-hot tensors, as in GShard and in V-MoE's own code.

Shape letters: G groups, S items of a group, k choices, E experts, C slots, Z = E * C, X shape of an item, Y shape of an output.
"""

import torch
from torch import Tensor
from torch.nn import functional

from hardmoe.models.moe.dispatch.base import RunExperts
from hardmoe.models.moe.experts.base import PaddedRows
from hardmoe.models.moe.routing import Routing


class EinsumDispatch:
    """2 * S * E * C * D operations each way, about 2 * k * capacity factor * S^2 * D: quadratic in the group's size."""

    def __call__(self, items_GSX: Tensor, routing: Routing, experts: RunExperts) -> Tensor:
        """See `Dispatch`."""
        groups, size = items_GSX.shape[:2]
        num_experts, capacity = routing.num_experts, routing.capacity
        positions_GSk = torch.where(routing.kept_GSk, routing.experts_GSk * capacity + routing.slots_GSk, num_experts * capacity)
        chosen_GSkZ = functional.one_hot(positions_GSk, num_experts * capacity + 1)[..., :-1]
        sent_GSZ = chosen_GSkZ.sum(2)
        flat_GSX = items_GSX.reshape(groups, size, -1)
        slots_GZX = torch.einsum("gsz,gsx->gzx", sent_GSZ.to(flat_GSX.dtype), flat_GSX)
        rows_ENX = _by_expert(slots_GZX, num_experts).view(num_experts, groups * capacity, *items_GSX.shape[2:])
        filled_EN = _by_expert(sent_GSZ.sum(1)[..., None], num_experts)[..., 0] > 0
        outputs_ENY = experts(PaddedRows(rows_ENX, filled_EN))
        shape_Y = outputs_ENY.shape[2:]
        outputs_GZY = outputs_ENY.reshape(num_experts, groups, capacity, -1).transpose(0, 1).flatten(1, 2)
        combine_GSZ = torch.einsum("gskz,gsk->gsz", chosen_GSkZ.to(routing.weights_GSk.dtype), routing.weights_GSk)
        mixed_GSY = torch.einsum("gsz,gzy->gsy", combine_GSZ, outputs_GZY.to(combine_GSZ.dtype))
        return mixed_GSY.view(groups, size, *shape_Y).to(items_GSX.dtype)


def _by_expert(slots_GZX: Tensor, num_experts: int) -> Tensor:
    """[G, E * C, X] to [E, G * C, X]."""
    return slots_GZX.view(len(slots_GZX), num_experts, -1, slots_GZX.shape[-1]).transpose(0, 1).flatten(1, 2)
