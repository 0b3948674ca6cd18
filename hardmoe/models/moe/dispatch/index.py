"""The dispatch that copies: every item that is kept to its slot, and back; linear in the group's size.

Shape letters: G groups, S items of a group, k choices, E experts, C slots, N = G * C, X shape of an item.
"""

import torch
from torch import Tensor

from hardmoe.models.moe.dispatch.base import RunExperts, combine
from hardmoe.models.moe.experts.base import PaddedRows
from hardmoe.models.moe.routing import Routing


class IndexDispatch:
    """A copy per kept choice into [E, N, X], and a gather back."""

    def __call__(self, items_GSX: Tensor, routing: Routing, experts: RunExperts) -> Tensor:
        """See `Dispatch`."""
        groups, _, k = routing.experts_GSk.shape
        num_experts, capacity = routing.num_experts, routing.capacity
        slots = groups * capacity
        group_G11 = torch.arange(groups, device=items_GSX.device)[:, None, None]
        positions_GSk = routing.experts_GSk * slots + group_G11 * capacity + routing.slots_GSk
        # One place more, for those that are not kept.
        positions_GSk = torch.where(routing.kept_GSk, positions_GSk, num_experts * slots)
        flat_TX = items_GSX.flatten(0, 1).flatten(1)
        copies_PX = flat_TX.repeat_interleave(k, 0) if k > 1 else flat_TX
        rows_MX = flat_TX.new_zeros(num_experts * slots + 1, flat_TX.shape[1]).index_copy(0, positions_GSk.flatten(), copies_PX)
        filled_M = torch.zeros(num_experts * slots + 1, dtype=torch.bool, device=items_GSX.device)
        filled_M = filled_M.index_fill(0, positions_GSk.flatten(), True)
        rows_ENX = rows_MX[:-1].view(num_experts, slots, *items_GSX.shape[2:])
        outputs_ENY = experts(PaddedRows(rows_ENX, filled_M[:-1].view(num_experts, slots)))
        mixed_GSY = combine(outputs_ENY.flatten(0, 1), positions_GSk.clamp(max=num_experts * slots - 1), routing)
        return mixed_GSY.to(items_GSX.dtype)
