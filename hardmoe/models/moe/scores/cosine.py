"""A router by cosine to a learned code of each expert (X-MoE, Chi et al. 2022, arXiv 2204.09179)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from hardmoe.models.moe.precision import at_least_float32, full_precision

WIDTH = 256
"""Widest space in which items are compared with codes."""
_TEMPERATURE, _LEAST_TEMPERATURE = 0.07, 0.01


class CosineScores(nn.Module):
    """cos(P x, c_e) / temperature, with a learned projection, codes and temperature."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, min(dim, WIDTH), bias=False)
        self.codes_EP = nn.Parameter(nn.init.normal_(torch.empty(num_experts, min(dim, WIDTH))))
        self.log_temperature = nn.Parameter(torch.full((), math.log(_TEMPERATURE)))

    def forward(self, items_GSD: Tensor) -> Tensor:
        """Scores [G, S, E]."""
        with full_precision(items_GSD):
            projected_GSP = functional.normalize(self.project(at_least_float32(items_GSD)), dim=-1)
            cosines_GSE = functional.linear(projected_GSP, functional.normalize(self.codes_EP, dim=-1))
            return cosines_GSE / self.log_temperature.exp().clamp(min=_LEAST_TEMPERATURE)
