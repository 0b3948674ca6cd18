"""A router by distance to a learned code of each expert: the form with `L2` that Videau et al. compare (arXiv 2411.18322)."""

import torch
from torch import Tensor, nn

from hardmoe.models.moe.precision import at_least_float32, full_precision
from hardmoe.models.moe.scores.cosine import WIDTH

_LEAST = 1e-12


class DistanceScores(nn.Module):
    """-|P x - c_e|, with a learned projection and learned codes; a softmax of it prefers what is near."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, min(dim, WIDTH), bias=False)
        self.codes_EP = nn.Parameter(nn.init.normal_(torch.empty(num_experts, min(dim, WIDTH))))

    def forward(self, items_GSD: Tensor) -> Tensor:
        """Scores [G, S, E]."""
        with full_precision(items_GSD):
            projected_GSP = self.project(at_least_float32(items_GSD))
            squared_GSE = (projected_GSP[..., None, :] - self.codes_EP).square().sum(-1)
            # The root has no gradient at 0.
            distances_GSE: Tensor = (squared_GSE + _LEAST).sqrt()
            return -distances_GSE
