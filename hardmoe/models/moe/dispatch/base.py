"""What a dispatch is to a layer, and how outputs come back in two of them.

Shape letters: G groups, S items of a group, k choices, E experts, M positions, X shape of an item, Y shape of an output.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from hardmoe.models.moe.experts.base import PaddedRows, SortedRows
from hardmoe.models.moe.routing import Routing

RunExperts = Callable[[PaddedRows | SortedRows], Tensor]


class Dispatch(Protocol):
    """Sends items to their experts and mixes what comes back."""

    def __call__(self, items_GSX: Tensor, routing: Routing, experts: RunExperts) -> Tensor:
        """Mixed outputs [G, S, Y], in the items' dtype; 0 for an item that no expert took."""
        ...


def combine(outputs_MY: Tensor, positions_GSk: Tensor, routing: Routing) -> Tensor:
    """Gather every choice's output and mix an item's by their weights; [G, S, Y] in the precision of the weights.

    Args:
        outputs_MY: outputs at positions.
        positions_GSk: int64, where each choice's is; of a choice that is not kept, any.
        routing: the weights.
    """
    groups, size, k = positions_GSk.shape
    gathered_PY = outputs_MY.flatten(1).index_select(0, positions_GSk.flatten())
    weights_GSk = torch.where(routing.kept_GSk, routing.weights_GSk, 0)
    mixed_GSY = (gathered_PY.view(groups, size, k, -1) * weights_GSk[..., None]).sum(2)
    return mixed_GSY.view(groups, size, *outputs_MY.shape[1:])
