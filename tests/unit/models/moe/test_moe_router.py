"""V-MoE's router and losses against upstream's test vectors and what follows from their definitions."""

import math

import pytest
import torch
from moe_parts import GATES, mlp_layer
from torch import Tensor, nn

from hardmoe.models.moe.layer import Plan
from hardmoe.models.moe.losses import (
    divergence_loss,
    gshard_loss,
    importance_loss,
    load_loss,
    unbiased_importance_loss,
    weighted_sum,
)
from hardmoe.models.moe.routers.expert_choice import ExpertChoiceRouter, choose
from hardmoe.models.moe.routers.noisy_topk import NoisyTopKRouter
from hardmoe.models.moe.routers.soft import SoftRouter
from hardmoe.models.moe.routing import Limits
from hardmoe.models.moe.scores.cosine import CosineScores
from hardmoe.models.moe.scores.distance import DistanceScores
from hardmoe.models.moe.scores.linear import LinearScores


def _all(tensor: Tensor) -> Tensor:
    return torch.ones(tensor.shape[:2], dtype=torch.bool)


def test_losses_are_upstreams_to_the_last_digit() -> None:
    gates = torch.tensor([[[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0]]])
    # Upstream prints 0.03874999, in float32; the exact value is 0.03875.
    assert float(importance_loss(gates, _all(gates))) == pytest.approx(0.03874999, abs=1.1e-8)
    assert float(gshard_loss(gates, _all(gates))) == pytest.approx(1.0875, abs=5e-7)
    clean = torch.tensor([[[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]]])
    noise = torch.tensor([[[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]]])
    assert float(load_loss(clean, clean + noise, 0.1, 2, _all(clean))) == pytest.approx(0.48573865, abs=5e-7)


def test_importance_is_zero_for_equal_sums_and_at_most_one_less_than_experts() -> None:
    even = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.7, 0.2], [0.2, 0.1, 0.7]]])
    assert float(importance_loss(even, _all(even))) == pytest.approx(0, abs=1e-12)
    for num_experts in (2, 4, 10):
        collapsed = nn.functional.one_hot(torch.zeros(1, 6, dtype=torch.int64), num_experts).double()
        assert float(importance_loss(collapsed, _all(collapsed))) == pytest.approx(num_experts - 1)
        assert float(unbiased_importance_loss(collapsed)) == pytest.approx(num_experts)
        assert float(divergence_loss(collapsed)) == pytest.approx(math.log(num_experts))


def test_divergence_is_zero_when_even_and_half_the_squared_variation_near_it() -> None:
    even = torch.full((1, 8, 5), 0.2, dtype=torch.float64)
    assert float(divergence_loss(even)) == pytest.approx(0, abs=1e-12)
    near = even * (1 + 0.01 * torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0], dtype=torch.float64))
    shares = near.sum(1)[0]
    half = float(shares.var(unbiased=False) / shares.mean() ** 2) / 2
    assert float(divergence_loss(near)) == pytest.approx(half, rel=1e-3)


def test_load_is_zero_for_equal_logits_and_absent_without_noise() -> None:
    equal = torch.zeros(1, 9, 4, dtype=torch.float64)
    noisy = equal + torch.randn(1, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 4
    assert float(load_loss(equal, noisy, 0.25, 2, _all(equal))) == pytest.approx(0, abs=1e-12)
    items, limits = torch.randn(1, 9, 5), Limits(2, 9)
    quiet = NoisyTopKRouter(LinearScores(5, 4), 4, noise=0.0).train()
    assert set(quiet(items, _all(items), limits).losses) == {"importance", "gshard"}
    assert quiet.eval()(items, _all(items), limits).losses == {}


def test_loss_of_weight_zero_cannot_spoil_the_gradient() -> None:
    logits = torch.zeros(3, requires_grad=True)
    losses = {"importance": logits.sum(), "load": (logits / 0).sum()}
    total = weighted_sum(losses, {"importance": 1.0, "load": 0.0})
    assert total is not None
    total.backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())
    assert weighted_sum(losses, {"load": 0.0}) is None


def test_importance_does_not_depend_on_the_noise_where_load_and_gates_do() -> None:
    router = NoisyTopKRouter(LinearScores(6, 4), 4).train()
    items, found = torch.randn(2, 12, 6), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(router(items, _all(items), Limits(2, 12)))
    one, other = found
    assert torch.equal(one.losses["importance"], other.losses["importance"])
    assert not torch.equal(one.losses["load"], other.losses["load"])
    assert not torch.equal(one.gates_GSE, other.gates_GSE)
    router.eval()
    torch.manual_seed(2)
    quiet = router(items, _all(items), Limits(2, 12))
    torch.manual_seed(3)
    assert torch.equal(quiet.gates_GSE, router(items, _all(items), Limits(2, 12)).gates_GSE)


def test_noise_has_the_deviation_of_one_by_the_number_of_experts() -> None:
    router = NoisyTopKRouter(LinearScores(3, 8), 8, noise=2.0).train()
    with torch.no_grad():
        router.scores.weight_ED.zero_()
    torch.manual_seed(0)
    items = torch.zeros(1, 20_000, 3)
    gates = router(items, _all(items), Limits(1, 20_000)).gates_GSE.detach()
    logits = gates.log() - gates.log().mean(-1, keepdim=True)
    # Of eight draws less their mean the deviation is smaller by sqrt(7 / 8).
    assert float(logits.std()) == pytest.approx(2 / 8 * math.sqrt(7 / 8), rel=0.01)


def test_weights_are_not_renormalised_and_one_expert_still_has_a_gradient() -> None:
    layer = mlp_layer(Plan(k=1)).train()
    items = torch.randn(3, 4, 5, dtype=torch.float64)
    routing = layer.router(items, _all(items), Limits(2, 4))
    assert bool((routing.weights_GSk.sum(-1) < 1).all())
    layer(items).square().sum().backward()
    assert float(layer.router.scores.weight_ED.grad.abs().sum()) > 0
    # Choosing first: the weight is 1 and the gradient exactly 0.
    scores = LinearScores(5, 4)
    torch.softmax(scores(items.float()).topk(1, dim=-1).values, dim=-1).square().sum().backward()
    assert float(scores.weight_ED.grad.abs().sum()) == 0


def test_router_learns_from_the_task_through_the_weights_only() -> None:
    layer = mlp_layer(Plan(k=2)).train()
    items = torch.randn(3, 4, 5, dtype=torch.float64)
    routing = layer.router(items, _all(items), Limits(2, 4))
    detached = routing.__class__(**{**routing.__dict__, "weights_GSk": routing.weights_GSk.detach()})
    layer.dispatch(items, detached, layer.experts).sum().backward()
    assert layer.router.scores.weight_ED.grad is None
    assert float(layer.experts.weight1_EDF.grad.abs().sum()) > 0


def test_linear_scores_of_pixels_are_a_convolution_and_go_with_the_pixels() -> None:
    scores, maps = LinearScores(6, 3), torch.randn(2, 6, 4, 5)
    as_convolution = nn.functional.conv2d(maps, scores.weight_ED[..., None, None]).flatten(2).transpose(1, 2)
    flat = maps.flatten(2).transpose(1, 2)
    assert torch.allclose(scores(flat), as_convolution, atol=1e-6)
    order = torch.randperm(20)
    assert torch.equal(scores(flat[:, order]), scores(flat)[:, order])


@pytest.mark.parametrize("kind", [LinearScores, CosineScores, DistanceScores])
def test_scores_are_those_of_their_formula_and_have_gradients(kind: type[nn.Module]) -> None:
    scores, items = kind(6, 3).double(), torch.randn(2, 7, 6, dtype=torch.float64)
    found = scores(items)
    if kind is CosineScores:
        projected = scores.project(items)
        cosines = torch.stack([torch.cosine_similarity(projected, code, dim=-1) for code in scores.codes_EP], dim=-1)
        expected = cosines / 0.07
    elif kind is DistanceScores:
        expected = -torch.cdist(scores.project(items), scores.codes_EP.expand(2, -1, -1))
    else:
        expected = items @ scores.weight_ED.T
    assert torch.allclose(found, expected, atol=1e-6)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in scores.parameters())


def test_experts_that_choose_take_upstreams_items() -> None:
    gates = torch.tensor(GATES)[None]
    routing = choose(gates, _all(gates), 2)
    per_item, weights = routing.kept_GSk.sum(-1), routing.weights_GSk[routing.kept_GSk]
    assert (int(per_item.min()), int(per_item.max())) == (1, 3)
    assert (float(weights.min()), float(weights.max())) == (pytest.approx(0.1), pytest.approx(0.6))


def test_experts_that_choose_fill_all_slots_with_their_best_items() -> None:
    router, items = ExpertChoiceRouter(LinearScores(5, 3), 3), torch.randn(2, 8, 5)
    valid = torch.arange(8).expand(2, -1) < 7
    routing = router(items, valid, Limits(1, 4))
    assert routing.kept_GSk.sum(1).tolist() == [[4, 4, 4]] * 2
    for group in range(2):
        for expert in range(3):
            best = torch.softmax(router.scores(items[group]), -1)[:7, expert].argsort(descending=True)[:4]
            assert set(best.tolist()) == set(routing.kept_GSk[group, :, expert].nonzero()[:, 0].tolist())


def test_soft_mixture_of_an_image_knows_nothing_of_the_others_where_one_over_the_batch_does() -> None:
    items = torch.randn(1, 4, 5, dtype=torch.float64)
    other = items.clone()
    other[0, 1] += 1
    layer = mlp_layer(Plan(k=4)).eval()
    layer.router = SoftRouter(layer.router.scores, 4)
    found = [layer(given.transpose(0, 1))[:, 0] for given in (items, other)]
    assert torch.equal(found[0][0], found[1][0])
    gates_E = torch.softmax(layer.router.scores(items)[0, 0], -1)
    w1, w2 = layer.experts.weight1_EDF, layer.experts.weight2_EFO
    b1, b2 = layer.experts.bias1.view(4, -1), layer.experts.bias2.view(4, -1)
    by_hand = sum(gates_E[e] * (nn.functional.gelu(items[0, 0] @ w1[e] + b1[e]) @ w2[e] + b2[e]) for e in range(4))
    assert torch.allclose(found[0][0], by_hand, atol=1e-12)

    def over_the_batch(images: Tensor) -> Tensor:
        logits_SE = layer.router.scores(images)[0]
        slots_ED = torch.softmax(logits_SE, 0).T @ images[0]
        outputs = torch.stack([nn.functional.gelu(slots_ED[e] @ w1[e] + b1[e]) @ w2[e] + b2[e] for e in range(4)])
        return torch.softmax(logits_SE, 1) @ outputs

    assert not torch.allclose(over_the_batch(items)[0], over_the_batch(other)[0])
