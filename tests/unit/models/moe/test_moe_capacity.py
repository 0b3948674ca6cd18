"""Capacity, slots and priority against upstream's example and a plain loop."""

from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_parts import GATES, mlp_layer, route_gates
from torch import Tensor

from hardmoe.models.moe.capacity import expert_capacity
from hardmoe.models.moe.layer import Plan
from hardmoe.models.moe.routing import Routing, give_slots


def test_capacity_is_upstreams() -> None:
    assert expert_capacity(32, 2, 32, 1.0) == 4
    assert expert_capacity(400, 2, 32, 1.05) == 28  # 26.25 up to 27 up to 28
    assert expert_capacity(400, 1, 4, 1.04) == 104  # exactly: no rounding of 1.04 may add a slot
    assert expert_capacity(10, 2, 4, 0) == expert_capacity(10, 2, 4, 100.0) == 10


@pytest.mark.parametrize(
    ("priority", "expected"),
    [
        (False, [[(0, 0), (2, 1)], [(0, 1), (2, 2)], [(2, 0), (0, 2)]]),
        (True, [[(0, 1), (2, 2)], [(0, 0), (2, 1)], [(2, 0), (0, 2)]]),
    ],
)
def test_slots_and_weights_are_upstreams(priority: bool, expected: list[list[tuple[int, int]]]) -> None:
    routing = route_gates(torch.tensor(GATES), 2, 2, priority)
    pairs = torch.stack([routing.experts_GSk, routing.slots_GSk], -1)[0]
    assert [[tuple(pair) for pair in row] for row in pairs.tolist()] == expected
    combine = torch.zeros(3, 3, 2)
    for item, expert, slot in ((i, e, s) for i, row in enumerate(expected) for e, s in row if s < 2):
        combine[item, expert, slot] = GATES[item][expert]
    found = torch.zeros(3, 3, 2)
    for item in range(3):
        for choice in range(2):
            if routing.kept_GSk[0, item, choice]:
                expert, slot = int(routing.experts_GSk[0, item, choice]), int(routing.slots_GSk[0, item, choice])
                found[item, expert, slot] = routing.weights_GSk[0, item, choice]
    assert torch.equal(found, combine)


def _by_a_loop(experts_Sk: list[list[int]], order: list[int], capacity: int) -> dict[tuple[int, int], int]:
    """(item, rank) to slot, of those that are kept."""
    used: dict[int, int] = defaultdict(int)
    kept = {}
    for rank in range(len(experts_Sk[0])):
        for item in order:
            expert = experts_Sk[item][rank]
            if used[expert] < capacity:
                kept[item, rank] = used[expert]
            used[expert] += 1
    return kept


@settings(max_examples=150)
@given(st.integers(1, 24), st.integers(1, 6), st.data())
def test_slots_are_those_of_a_loop(size: int, num_experts: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, num_experts))
    capacity = data.draw(st.integers(1, size))
    priority = data.draw(st.booleans())
    gates = torch.rand(size, num_experts, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 10_000))))
    gates = (gates * 4).round() / 4 if data.draw(st.booleans()) else gates  # with ties
    routing = route_gates(gates, k, capacity, priority)
    best = routing.weights_GSk[0, :, 0].tolist()
    order = sorted(range(size), key=lambda item: -best[item]) if priority else list(range(size))
    expected = _by_a_loop(routing.experts_GSk[0].tolist(), order, capacity)
    kept = routing.kept_GSk[0].nonzero().tolist()
    assert {(i, j): int(routing.slots_GSk[0, i, j]) for i, j in kept} == expected
    _check_counts(routing, size)


def _check_counts(routing: Routing, size: int) -> None:
    """Kept per expert is min(C, demand), its slots are 0 to n - 1, and the rows of all experts add up to that."""
    rows = 0
    for expert in range(routing.num_experts):
        asked = routing.experts_GSk[0] == expert
        slots = sorted(routing.slots_GSk[0][asked & routing.kept_GSk[0]].tolist())
        assert slots == list(range(min(routing.capacity, int(asked.sum()))))
        rows += len(slots)
        # A choice is kept only if every earlier-ranked choice of that expert was.
        ranks = asked.nonzero()[:, 1]
        kept_ranks = (asked & routing.kept_GSk[0]).nonzero()[:, 1]
        dropped_ranks = (asked & ~routing.kept_GSk[0]).nonzero()[:, 1]
        if len(dropped_ranks) and len(kept_ranks):
            assert int(kept_ranks.max()) <= int(dropped_ranks.min())
        assert len(ranks) == len(kept_ranks) + len(dropped_ranks)
    assert rows == int(routing.kept_GSk.sum()) <= routing.num_experts * routing.capacity


def test_priority_keeps_the_largest_gates_and_order_keeps_the_earliest() -> None:
    gates = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.8, 0.2]])
    kept = {priority: route_gates(gates, 1, 2, priority).kept_GSk[0, :, 0].tolist() for priority in (False, True)}
    assert kept == {False: [True, True, False, False], True: [False, True, False, True]}


def test_priority_goes_with_the_items_and_order_does_not() -> None:
    gates = torch.rand(12, 3, generator=torch.Generator().manual_seed(1))
    order = torch.arange(11, -1, -1)

    def kept(priority: bool) -> tuple[Tensor, Tensor]:
        return tuple(route_gates(each, 2, 3, priority).kept_GSk[0] for each in (gates, gates[order]))  # type: ignore[return-value]

    whole, moved = kept(True)
    assert torch.equal(whole[order], moved)
    whole, moved = kept(False)
    assert not torch.equal(whole[order], moved)


def test_item_without_any_expert_comes_out_as_zero() -> None:
    layer = mlp_layer(Plan(k=1, inference_capacity_factor=0.01, group_images=12), num_experts=1).eval()
    items = torch.randn(12, 1, 5, dtype=torch.float64)
    outputs = layer(items)
    assert bool((outputs[:4] != 0).any(-1).all())
    assert bool((outputs[4:] == 0).all())
    assert torch.equal((items + outputs)[4:], items[4:])


def test_groups_know_nothing_of_each_other() -> None:
    layer = mlp_layer(Plan(k=2, inference_capacity_factor=0.5, priority=True, group_images=3)).eval()
    images = torch.randn(6, 4, 5, dtype=torch.float64)
    other = torch.cat([images[:3], torch.randn(3, 4, 5, dtype=torch.float64)])
    assert torch.equal(layer(images)[:3], layer(other)[:3])
    assert torch.allclose(layer(images), torch.cat([layer(images[:3]), layer(images[3:])]), atol=1e-14)


def test_image_depends_on_its_group_where_capacity_is_short_and_never_where_it_is_not() -> None:
    images = torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    other = torch.cat([images[:1], 3 * images[1:]])
    layer = mlp_layer(Plan(k=2, inference_capacity_factor=0.3, priority=True)).eval()
    assert not torch.allclose(layer(images)[0], layer(other)[0])
    for enough in (4 / 2, 0.0):
        layer.plan = Plan(k=2, inference_capacity_factor=enough, priority=True)
        assert torch.allclose(layer(images)[0], layer(other)[0], atol=1e-14)
        assert torch.allclose(layer(images)[0], layer(images[:1])[0], atol=1e-14)


@pytest.mark.parametrize("batch", [1, 5, 7, 9])
def test_batch_that_no_group_divides_is_padded_and_the_padding_counts_nowhere(batch: int) -> None:
    """Upstream refuses it; users met that with the first single image."""
    layer = mlp_layer(Plan(k=2, group_images=4), noise=1.0).eval()
    images = torch.randn(batch, 3, 5, dtype=torch.float64)
    assert torch.allclose(layer(images), torch.cat([layer(image[None]) for image in images]), atol=1e-14)
    layer.train()
    layer.loss_weights = {"importance": 1.0}
    layer(images)
    scores = torch.softmax(layer.router.scores(images), -1)
    groups = -(-batch // 4)
    size = -(-batch // groups)
    sums = torch.stack([scores[at * size : (at + 1) * size].flatten(0, 1).sum(0) for at in range(groups)])
    expected = (sums.var(-1, unbiased=False) / sums.mean(-1) ** 2).mean()
    assert torch.allclose(layer.auxiliary_loss, expected)


def test_choice_that_does_not_count_takes_no_slot() -> None:
    experts = torch.zeros(1, 4, 1, dtype=torch.int64)
    wanted = torch.tensor([False, True, False, True])[None, :, None]
    found = give_slots(experts, wanted, 2, 1, None)
    assert found.kept_GSk[0, :, 0].tolist() == [False, True, False, False]
