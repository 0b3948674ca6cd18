"""Experts that choose their items (Zhou et al. 2022, arXiv 2202.09368): every slot is filled, and no loss is needed.

An item may have no expert, or all. Who is chosen depends on all items of the group, in use as in training.

Shape letters: G groups, S items of a group, E experts, C slots.
"""

import torch
from torch import Tensor, nn

from hardmoe.models.moe.routing import Limits, Routing


class ExpertChoiceRouter(nn.Module):
    """Softmax over the experts, then each expert's C items with the largest gates.

    Args:
        scores: one of `scores/`.
        num_experts: E.
    """

    def __init__(self, scores: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.scores = scores
        self.num_experts = num_experts

    def forward(self, items_GSX: Tensor, valid_GS: Tensor, limits: Limits) -> Routing:
        """Route; `limits.k` counts only through the capacity."""
        gates_GSE = torch.softmax(self.scores(items_GSX), dim=-1)
        return choose(gates_GSE, valid_GS, limits.capacity)


def choose(gates_GSE: Tensor, valid_GS: Tensor, capacity: int) -> Routing:
    """Every expert's `capacity` items with the largest gates, equal ones by position."""
    ranked_GSE = torch.where(valid_GS[..., None], gates_GSE, -1.0)
    order_GSE = torch.argsort(ranked_GSE.detach(), dim=1, descending=True, stable=True)
    places_GSE = torch.arange(gates_GSE.shape[1], device=order_GSE.device)[None, :, None].expand_as(order_GSE)
    slots_GSE = torch.empty_like(order_GSE).scatter(1, order_GSE, places_GSE)
    num_experts = gates_GSE.shape[-1]
    experts_GSE = torch.arange(num_experts, device=order_GSE.device).expand_as(slots_GSE)
    kept_GSE = (slots_GSE < capacity) & valid_GS[..., None]
    return Routing(experts_GSE, slots_GSE, kept_GSE, gates_GSE, gates_GSE, valid_GS, num_experts, capacity)
