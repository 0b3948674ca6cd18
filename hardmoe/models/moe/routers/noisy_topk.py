"""The k best experts of each item: V-MoE's router, and, over other scores, the sweet spot's.

The softmax is over all experts and comes before the choice, so that the weights of the k best sum to less than 1 and a router
with k = 1 has a gradient; choosing first gives a weight of 1, whatever the router thinks. In training, noise is added.

Shape letters: G groups, S items of a group, E experts, k choices.
"""

import torch
from torch import Tensor, nn

from hardmoe.models.moe.losses import gshard_loss, importance_loss, load_loss
from hardmoe.models.moe.routing import Choices, Limits, Routing


class NoisyTopKRouter(nn.Module):
    """Softmax, then the k best (Riquelme et al., arXiv 2106.05974, section 2.2); losses `importance`, `load` and `gshard`.

    Args:
        scores: one of `scores/`.
        num_experts: E.
        noise: deviation of the noise, times 1 / E; 0 for none, and then there is no load loss.
    """

    def __init__(self, scores: nn.Module, num_experts: int, noise: float = 1.0) -> None:
        super().__init__()
        self.scores = scores
        self.num_experts = num_experts
        self.deviation = noise / num_experts

    def forward(self, items_GSX: Tensor, valid_GS: Tensor, limits: Limits) -> Routing:
        """Route; in evaluation mode without noise."""
        clean_GSE = self.scores(items_GSX)
        noisy = self.training and self.deviation > 0
        noisy_GSE = clean_GSE + torch.randn_like(clean_GSE) * self.deviation if noisy else clean_GSE
        gates_GSE = torch.softmax(noisy_GSE, dim=-1)
        weights_GSk, experts_GSk = gates_GSE.topk(limits.k, dim=-1)
        wanted_GSk = valid_GS[..., None].expand_as(experts_GSk)
        losses = {}
        if self.training:
            clean_gates_GSE = torch.softmax(clean_GSE, dim=-1)
            losses = {"importance": importance_loss(clean_gates_GSE, valid_GS), "gshard": gshard_loss(gates_GSE, valid_GS)}
            if noisy:
                losses["load"] = load_loss(clean_GSE, noisy_GSE, self.deviation, limits.k, valid_GS)
        return Choices(experts_GSk, wanted_GSk, weights_GSk, gates_GSE).routed(valid_GS, limits, losses)
