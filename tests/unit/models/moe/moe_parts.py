"""What the tests of layers of experts share: small layers, and a router that does as it is told."""

import torch
from torch import Tensor, nn

from hardmoe.models.moe.experts.mlp import MlpExperts
from hardmoe.models.moe.layer import MoeLayer, Plan
from hardmoe.models.moe.routers.noisy_topk import NoisyTopKRouter
from hardmoe.models.moe.routing import Routing, give_slots
from hardmoe.models.moe.scores.linear import LinearScores

GATES = [[0.4, 0.0, 0.2], [0.5, 0.1, 0.4], [0.3, 0.2, 0.6]]
"""Upstream's example for capacity and priority: three items, three experts."""


def route_gates(gates_SE: Tensor, k: int, capacity: int, priority: bool) -> Routing:
    """A routing of one group by given gates, as `NoisyTopKRouter` makes it behind its softmax."""
    weights_GSk, experts_GSk = gates_SE[None].topk(k, dim=-1)
    wanted_GSk = torch.ones_like(experts_GSk, dtype=torch.bool)
    num_experts = gates_SE.shape[1]
    slots = give_slots(experts_GSk, wanted_GSk, num_experts, capacity, weights_GSk[..., 0] if priority else None)
    valid_GS = wanted_GSk[..., 0]
    return Routing(experts_GSk, slots.slots_GSk, slots.kept_GSk, weights_GSk, gates_SE[None], valid_GS, num_experts, capacity)


def mlp_experts(dim: int, hidden: int, num_experts: int, *, alike: bool = False) -> MlpExperts:
    """Experts in float64 that, unless asked to be alike, differ from each other in all weights."""
    experts = MlpExperts(nn.Linear(dim, hidden), nn.Linear(hidden, dim), num_experts).double()
    if not alike:
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.5)
    return experts


def mlp_layer(plan: Plan, *, dim: int = 5, num_experts: int = 4, noise: float = 0.0, alike: bool = False) -> MoeLayer:
    """A layer of MLPs in float64 behind V-MoE's router."""
    scores = LinearScores(dim, num_experts).double()
    nn.init.normal_(scores.weight_ED)
    return MoeLayer(NoisyTopKRouter(scores, num_experts, noise), mlp_experts(dim, 7, num_experts, alike=alike), plan)
