"""All experts for every item, mixed by its own softmax: the remedy of arXiv 2605.15484 for soft mixtures of whole images.

Soft MoE (Puigcerver et al. 2023) mixes items into slots by a softmax over the items; where items are images, an image's output
then depends on its batch, and a batch of one degenerates. Here nothing passes between items, and all experts run.

Shape letters: G groups, S items of a group, E experts.
"""

import torch
from torch import Tensor, nn

from hardmoe.models.moe.routing import Limits, Routing


class SoftRouter(nn.Module):
    """y = sum over e of softmax(scores)_e times what expert e makes of the item.

    Args:
        scores: one of `scores/`.
        num_experts: E.
    """

    def __init__(self, scores: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.scores = scores
        self.num_experts = num_experts

    def forward(self, items_GSX: Tensor, valid_GS: Tensor, limits: Limits) -> Routing:
        """Route; every item has a slot in every expert, whatever the limits say."""
        gates_GSE = torch.softmax(self.scores(items_GSX), dim=-1)
        size = gates_GSE.shape[1]
        experts_GSE = torch.arange(self.num_experts, device=gates_GSE.device).expand(gates_GSE.shape)
        slots_GSE = torch.arange(size, device=gates_GSE.device)[:, None].expand(gates_GSE.shape)
        kept_GSE = valid_GS[..., None].expand(gates_GSE.shape)
        return Routing(experts_GSE, slots_GSE, kept_GSE, gates_GSE, gates_GSE, valid_GS, self.num_experts, size)
