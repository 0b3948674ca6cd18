"""What experts learn on four clusters, each with a rule of its own: a soft constraint ends a collapse and finds the clusters."""

import math
from dataclasses import dataclass

import torch
from sklearn.metrics import mutual_info_score
from torch import Tensor, nn

from hardmoe.models.moe.experts.modules import ModuleExperts
from hardmoe.models.moe.layer import MoeLayer, Plan
from hardmoe.models.moe.routers.sparse_gate import SparseGateRouter
from hardmoe.models.moe.statistics import observed

NUM_EXPERTS = NUM_CLUSTERS = 4
COLLAPSED = [6.0, 5.0, 0.0, 0.0]
"""Scores from which two experts of four get nearly everything."""
STEPS, BATCH, NUM_TEST = 300, 64, 2000


@dataclass(frozen=True)
class Learned:
    """What came of a training, on test items."""

    usage_entropy: float
    """Of the experts' shares of all weights, nats: log 4 where all are used alike, log 2 where two are."""
    information: float
    """Of the best expert about the cluster, nats."""
    chance: float
    """The same, of clusters dealt out by lot."""
    accuracy: float


def _items(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Items [N, 8], their clusters and their classes: the sign of one of two values, which one and which sign by the cluster."""
    cluster_N = torch.randint(NUM_CLUSTERS, (count,), generator=generator)
    place_N4 = 2 * nn.functional.one_hot(cluster_N, NUM_CLUSTERS) + 0.3 * torch.randn(count, 4, generator=generator)
    value_N4 = torch.randn(count, 4, generator=generator)
    rules_44 = torch.tensor([[1.0, 0, 0, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, -1, 0, 0]])
    return torch.cat([place_N4, value_N4], 1), cluster_N, ((value_N4 * rules_44[cluster_N]).sum(1) > 0).long()


def _learn(losses: dict[str, float]) -> Learned:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(100)
        scores, noise = nn.Linear(8, NUM_EXPERTS), nn.Linear(8, NUM_EXPERTS, bias=False)
        with torch.no_grad():
            scores.weight.mul_(0.3)
            scores.bias.copy_(torch.tensor(COLLAPSED))
            noise.weight.zero_()
        router = SparseGateRouter(scores, NUM_EXPERTS, noise)
        layer = MoeLayer(router, ModuleExperts(lambda: nn.Linear(8, 2), NUM_EXPERTS), Plan(k=2), losses).train()
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
        for _ in range(STEPS):
            items_N8, _, classes_N = _items(BATCH, generator)
            loss = nn.functional.cross_entropy(layer(items_N8[:, None])[:, 0], classes_N)
            if layer.auxiliary_loss is not None:
                loss = loss + layer.auxiliary_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        items_N8, cluster_N, classes_N = _items(NUM_TEST, generator)
        with torch.no_grad(), observed(layer.eval()) as usages:
            predicted_N = layer(items_N8[:, None])[:, 0].argmax(1)
        (usage,) = usages.values()
        shares_E = usage.importance_E / usage.importance_E.sum()
        expert_N = scores(items_N8).argmax(1)
        dealt_N = cluster_N[torch.randperm(NUM_TEST, generator=generator)]
        return Learned(
            float(-torch.special.xlogy(shares_E, shares_E).sum()),
            mutual_info_score(cluster_N, expert_N),
            mutual_info_score(dealt_N, expert_N),
            float((predicted_N == classes_N).double().mean()),
        )


def test_soft_constraint_ends_a_collapse_that_lasts_without_one_and_finds_the_clusters() -> None:
    free, held = _learn({}), _learn({"kl": 0.5})
    assert free.usage_entropy < 0.75 * math.log(NUM_EXPERTS)
    assert held.usage_entropy > 0.97 * math.log(NUM_EXPERTS)
    assert held.information > 20 * held.chance and held.information > 0.3
    assert held.information > 2 * free.information
    assert held.accuracy > free.accuracy + 0.05, "each cluster has a rule of its own, so it takes more than two experts"
