"""The image-level gate with its soft and hard constraints: what follows from their definitions, in adversarial runs."""

import copy

import pytest
import torch
from torch import Tensor, nn

from hardmoe.models.moe.constraints.base import Constraint
from hardmoe.models.moe.constraints.mean import MeanImportance
from hardmoe.models.moe.constraints.relative import RelativeImportance
from hardmoe.models.moe.experts.modules import ModuleExperts
from hardmoe.models.moe.layer import MoeLayer, Plan
from hardmoe.models.moe.routers.sparse_gate import SparseGateRouter
from hardmoe.models.moe.routing import Limits
from hardmoe.models.moe.scores.convolved import ConvolvedScores
from hardmoe.models.moe.scores.pooled import PooledScores

BATCH = 16


class Told(nn.Module):
    """Scores that are the items themselves."""

    def forward(self, items_GSE: Tensor) -> Tensor:
        return items_GSE


def _run(constraint: Constraint, logits_E: Tensor, k: int, steps: int) -> tuple[Tensor, list[list[bool]]]:
    """Shares of all weights in a run whose logits never change, and who was live at each step."""
    router = SparseGateRouter(Told(), len(logits_E), constraint=constraint).train()
    shares_E, live = torch.zeros(len(logits_E), dtype=torch.float64), []
    items, valid = logits_E.expand(1, BATCH, -1), torch.ones(1, BATCH, dtype=torch.bool)
    for _ in range(steps):
        live.append(constraint.live_E().tolist())
        routing = router(items, valid, Limits(k, BATCH))
        shares_E.index_add_(0, routing.experts_GSk.flatten(), (routing.weights_GSk * routing.kept_GSk).flatten().double())
        assert routing.losses == {}, "a hard constraint adds no loss"
        assert bool(routing.weights_GSk.isfinite().all())
    return shares_E / shares_E.sum(), live


def test_relative_importance_takes_an_expert_out_on_the_step_after_and_back_in_one_by_one() -> None:
    constraint, logits = RelativeImportance(4, 0.5), torch.tensor([5.0, 1.0, 0.0, -5.0])
    router = SparseGateRouter(Told(), 4, constraint=constraint).train()
    items, valid = logits.expand(1, BATCH, -1), torch.ones(1, BATCH, dtype=torch.bool)
    assert constraint.live_E().all()
    router(items, valid, Limits(1, BATCH))
    # Everything went to the first: it has (B - B/4) / (B/4) = 3, the others -1 each.
    assert constraint.relative_E.tolist() == [3, -1, -1, -1]
    assert constraint.live_E().tolist() == [False, True, True, True]
    for left in (2, 1, 0):
        before = constraint.relative_E[0].clone()
        router(items, valid, Limits(1, BATCH))
        assert float(before - constraint.relative_E[0]) == 1
        assert float(constraint.relative_E[0]) == left
        assert float(constraint.relative_E.sum()) == 0
    assert bool(constraint.live_E()[0]), "0 is not above the threshold"


def test_relative_importance_drives_every_share_to_one_by_n_whatever_the_logits() -> None:
    for logits in (torch.tensor([9.0, 3.0, 0.0, -9.0]), torch.tensor([0.1, 0.0, 0.0, 0.0])):
        shares, live = _run(RelativeImportance(4, 0.5), logits, 2, 1000)
        assert shares.tolist() == pytest.approx([0.25] * 4, abs=2e-3)
        assert all(any(step) for step in live), "one expert at least is always live"


@pytest.mark.parametrize("num_experts", [4, 10])
def test_mean_importance_caps_a_share_and_lets_experts_die(num_experts: int) -> None:
    logits = torch.linspace(20, -20, num_experts)
    shares, live = _run(MeanImportance(num_experts, 0.3), logits, 1, 1000)
    assert float(shares.max()) == pytest.approx(1 / num_experts + 0.3, abs=2e-3)
    assert float(shares.min()) < 0.01
    assert all(any(step) for step in live)


def test_experts_beyond_the_live_ones_have_weight_zero_and_are_not_run() -> None:
    constraint = RelativeImportance(3, 0.0)
    constraint.relative_E.copy_(torch.tensor([1.0, 2.0, -3.0]))
    router = SparseGateRouter(Told(), 3, constraint=constraint).train()
    routing = router(torch.zeros(1, 5, 3), torch.ones(1, 5, dtype=torch.bool), Limits(2, 5))
    assert routing.experts_GSk[0, :, 0].tolist() == [2] * 5
    assert routing.weights_GSk[0].tolist() == [[1.0, 0.0]] * 5
    assert routing.kept_GSk[0].tolist() == [[True, False]] * 5


@pytest.mark.parametrize("constraint", [RelativeImportance(4), MeanImportance(4)])
def test_evaluation_ignores_the_constraint_and_the_state_is_saved(constraint: Constraint) -> None:
    """Upstream keeps it in a plain attribute, which a checkpoint loses."""
    router = SparseGateRouter(PooledScores(6, 4), 4, constraint=constraint).train()
    maps, valid = torch.randn(1, BATCH, 6, 3, 3), torch.ones(1, BATCH, dtype=torch.bool)
    for _ in range(3):
        router(maps, valid, Limits(2, BATCH))
    state = copy.deepcopy(router.state_dict())
    assert any(key.startswith("constraint.") and bool(tensor.any()) for key, tensor in state.items())
    fresh = SparseGateRouter(PooledScores(6, 4), 4, constraint=type(constraint)(4)).train()
    fresh.load_state_dict(state)
    going_on, again = (each(maps, valid, Limits(2, BATCH)) for each in (router, fresh))
    assert torch.equal(going_on.kept_GSk, again.kept_GSk)
    for key, tensor in router.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[key])
    router.eval()
    before = copy.deepcopy(router.state_dict())
    found = router(maps, valid, Limits(2, BATCH))
    expected = router.scores(maps).topk(2, dim=-1)
    assert torch.equal(found.experts_GSk, expected.indices)
    assert torch.allclose(found.weights_GSk, torch.softmax(expected.values, -1))
    assert all(torch.equal(tensor, before[key]) for key, tensor in router.state_dict().items())


def test_soft_constraints_go_by_the_chosen_weights_behind_learned_noise() -> None:
    router = SparseGateRouter(PooledScores(6, 4), 4, noise_scores=PooledScores(6, 4, bias=False)).train()
    maps, valid = torch.randn(1, BATCH, 6, 3, 3), torch.ones(1, BATCH, dtype=torch.bool)
    torch.manual_seed(0)
    routing = router(maps, valid, Limits(2, BATCH))
    assert set(routing.losses) == {"unbiased", "kl"}
    importance = torch.zeros(4).index_add(0, routing.experts_GSk.flatten(), routing.weights_GSk.flatten().detach())
    expected = importance.var() / importance.mean() ** 2
    assert float(routing.losses["unbiased"].detach()) == pytest.approx(float(expected), rel=1e-5)
    shares = importance / BATCH
    assert float(routing.losses["kl"].detach()) == pytest.approx(float((shares * (shares * 4).log()).sum()), rel=1e-5)
    sum(routing.losses.values()).backward()  # type: ignore[union-attr]
    assert router.noise_scores.linear.weight.grad.abs().sum() > 0  # type: ignore[union-attr]
    assert torch.allclose(routing.weights_GSk.sum(-1), torch.ones(1, BATCH))


@pytest.mark.parametrize("side", [1, 2, 5])
def test_convolved_scores_are_a_convolution_pooled_and_take_maps_of_any_size(side: int) -> None:
    scores, maps = ConvolvedScores(6, 4), torch.randn(2, 3, 6, side, side)
    found = scores(maps)
    assert found.shape == (2, 3, 4)
    if side >= 3:
        pooled = nn.functional.conv2d(maps.flatten(0, 1), scores.convolution.weight, scores.convolution.bias).mean((2, 3))
        assert torch.allclose(found.flatten(0, 1), scores.linear(pooled), atol=1e-5)


def _blocks() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU())


@pytest.mark.parametrize("dispatch", ["einsum", "index", "grouped"])
@pytest.mark.parametrize("training", [True, False])
def test_whole_modules_as_experts_see_their_own_images_only(dispatch: str, training: bool) -> None:
    torch.manual_seed(1)
    plan = Plan(k=2, group_images=1000, dispatch=dispatch)  # type: ignore[arg-type]
    layer = MoeLayer(SparseGateRouter(PooledScores(3, 3), 3), ModuleExperts(_blocks, 3), plan, item_dims=3)
    layer.train(training)
    images = torch.randn(9, 3, 6, 6)
    alone = copy.deepcopy(layer.experts)
    routing = layer.router(images[None], torch.ones(1, 9, dtype=torch.bool), Limits(2, 9))
    expected = torch.zeros(9, 4, 3, 3)
    for expert, member in enumerate(alone.members):
        items, ranks = (routing.experts_GSk[0] == expert).nonzero(as_tuple=True)
        if len(items):
            expected.index_add_(
                0, items, routing.weights_GSk[0, items, ranks].detach()[:, None, None, None] * member(images[items])
            )
    assert torch.allclose(layer(images), expected, atol=1e-6)
    for (name, found), (_, one) in zip(layer.experts.named_buffers(), alone.named_buffers(), strict=True):
        assert torch.allclose(found, one, atol=1e-6), name


def test_module_without_images_is_not_run_and_one_image_alone_is_no_error() -> None:
    """Batch normalisation of one value has no variance; torch refuses it."""
    experts = ModuleExperts(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 3).train()
    layer = MoeLayer(SparseGateRouter(PooledScores(3, 3), 3), experts, Plan(k=1, group_images=1000), item_dims=3).train()
    with torch.no_grad():
        layer.router.scores.linear.bias.copy_(torch.tensor([-100.0, 100.0, -100.0]))
    for dispatch_images in (1, 4):
        layer(torch.randn(dispatch_images, 3, 3, 3)).sum().backward()
    assert [member[1].num_batches_tracked.item() for member in experts.members] == [0, 1, 0]
    assert experts.members[0][0].weight.grad is None
    assert all(module.training for module in experts.modules())
