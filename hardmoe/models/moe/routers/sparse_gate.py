"""The image-level gate of Pavlitskaya et al. (arXiv 2204.10598): the k best first, then a softmax over those.

The weights of an item sum to 1. What keeps the experts evenly used is either a soft constraint, an auxiliary loss on the chosen
weights with learned noise on the scores, or a hard one, which takes experts out of a whole batch (see `constraints/`) and needs
neither noise nor loss. In evaluation mode neither plays a part.

Shape letters: G groups, S items of a group, E experts, k choices.
"""

import torch
from torch import Tensor, nn

from hardmoe.models.moe.constraints.base import Constraint
from hardmoe.models.moe.losses import divergence_loss, unbiased_importance_loss
from hardmoe.models.moe.routing import Choices, Limits, Routing

_OFFSET = 0.01


class SparseGateRouter(nn.Module):
    """The k best, then a softmax; losses `unbiased` and `kl`.

    Args:
        scores: one of `scores/`.
        num_experts: E.
        noise_scores: gives the noise's deviations before a softplus; None for no noise.
        constraint: a hard one; None for none.
    """

    def __init__(
        self, scores: nn.Module, num_experts: int, noise_scores: nn.Module | None = None, constraint: Constraint | None = None
    ) -> None:
        super().__init__()
        self.scores = scores
        self.num_experts = num_experts
        self.noise_scores = noise_scores
        self.constraint = constraint

    def forward(self, items_GSX: Tensor, valid_GS: Tensor, limits: Limits) -> Routing:
        """Route; in training the hard constraint is told what came of it."""
        scores_GSE = self.scores(items_GSX)
        if self.training and self.noise_scores is not None:
            deviations_GSE = nn.functional.softplus(self.noise_scores(items_GSX) + _OFFSET)
            scores_GSE = scores_GSE + torch.randn_like(scores_GSE) * deviations_GSE
        if self.training and self.constraint is not None:
            scores_GSE = scores_GSE.masked_fill(~self.constraint.live_E(), -torch.inf)
        best_GSk, experts_GSk = scores_GSE.topk(limits.k, dim=-1)
        weights_GSk = torch.softmax(best_GSk, dim=-1)
        # With fewer experts left than k, the surplus choices have a weight of exactly 0 and are not run.
        wanted_GSk = valid_GS[..., None] & (best_GSk > -torch.inf)
        chosen_GSE = torch.zeros_like(scores_GSE).scatter(-1, experts_GSk, weights_GSk * wanted_GSk)
        losses = {}
        if self.training and self.constraint is not None:
            self.constraint.update(chosen_GSE.detach().sum((0, 1)), valid_GS.sum())
        elif self.training:
            losses = {"unbiased": unbiased_importance_loss(chosen_GSE), "kl": divergence_loss(chosen_GSE)}
        gates_GSE = torch.softmax(scores_GSE, dim=-1)
        return Choices(experts_GSk, wanted_GSk, weights_GSk, gates_GSE).routed(valid_GS, limits, losses)
