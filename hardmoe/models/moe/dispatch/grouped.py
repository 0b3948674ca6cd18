"""The dispatch that sorts: rows in the order of their experts, so that only what was kept is computed.

Shape letters: G groups, S items of a group, k choices, E experts, P = G * S * k choices, R rows, X shape of an item.
"""

import torch
from torch import Tensor

from hardmoe.models.moe.dispatch.base import RunExperts, combine
from hardmoe.models.moe.experts.base import SortedRows
from hardmoe.models.moe.routing import Routing


class GroupedDispatch:
    """A stable sort by expert, one gather there and one back."""

    def __call__(self, items_GSX: Tensor, routing: Routing, experts: RunExperts) -> Tensor:
        """See `Dispatch`."""
        groups, size, k = routing.experts_GSk.shape
        num_experts = routing.num_experts
        # Those that are not kept come last; of the rest there are at most as many as there are slots.
        keys_P = torch.where(routing.kept_GSk, routing.experts_GSk, num_experts).flatten()
        sorted_P, order_P = torch.sort(keys_P, stable=True)
        num_rows = min(groups * size * k, num_experts * groups * routing.capacity)
        ends_E = torch.searchsorted(sorted_P, torch.arange(num_experts, device=keys_P.device), right=True)
        rows_RX = items_GSX.flatten(0, 1).index_select(0, torch.div(order_P[:num_rows], k, rounding_mode="floor"))
        experts_R = sorted_P[:num_rows].clamp(max=num_experts - 1)
        outputs_RY = experts(SortedRows(rows_RX, experts_R, ends_E))
        places_P = torch.empty_like(order_P).scatter(0, order_P, torch.arange(len(order_P), device=order_P.device))
        positions_GSk = places_P.clamp(max=num_rows - 1).view(groups, size, k)
        return combine(outputs_RY, positions_GSk, routing).to(items_GSX.dtype)
