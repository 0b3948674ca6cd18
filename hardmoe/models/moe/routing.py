"""What a router decides: for every item its experts, its slot in each, and whether there was room for it.

Slots are given out in the order of choices, all first choices before all second ones (Riquelme et al., arXiv 2106.05974, section
3.2), within them in the order of the items; or, with Batch Priority Routing, of the items' largest gate. They are counted by a
stable sort. Rejected: the running sum of a one-hot matrix, which is E times as large and no clearer.

Shape letters: G groups, S items of a group, k choices of an item, E experts.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """How many experts an item has, and how many items an expert."""

    k: int
    capacity: int
    """Slots of an expert in each group."""
    priority: bool = False
    """Whether items with a larger gate are given their slots first."""


@dataclass(frozen=True)
class Routing:
    """Who goes where."""

    experts_GSk: Tensor
    """int64."""
    slots_GSk: Tensor
    """int64; the slot in that expert, of the group. Of a choice that is not kept, anything."""
    kept_GSk: Tensor
    """bool: whether the expert takes the item."""
    weights_GSk: Tensor
    """float: what the expert's output is multiplied by. Gradients of the task reach the router through these only."""
    gates_GSE: Tensor
    """float: the distribution over all experts that the choice was made by."""
    valid_GS: Tensor
    """bool: which items there are; the others fill up a group."""
    num_experts: int
    capacity: int
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Auxiliary losses by name, each a scalar, not weighed yet."""

    def by_expert(self, values_GSk: Tensor) -> Tensor:
        """Values of an item's choices at the experts chosen, [G, S, E]; 0 at the others."""
        values_GSE = values_GSk.new_zeros(*values_GSk.shape[:2], self.num_experts)
        return values_GSE.scatter_add(-1, self.experts_GSk, values_GSk)


@dataclass(frozen=True)
class Choices:
    """What items chose, before it is known who finds a slot."""

    experts_GSk: Tensor
    """int64, the best first."""
    wanted_GSk: Tensor
    """bool: choices that count; the others take no slot."""
    weights_GSk: Tensor
    gates_GSE: Tensor

    def routed(self, valid_GS: Tensor, limits: Limits, losses: dict[str, Tensor]) -> Routing:
        """Give out the slots, by the weight of the first choice where there is priority."""
        num_experts = self.gates_GSE.shape[-1]
        priority_GS = self.weights_GSk[..., 0] if limits.priority else None
        slots = give_slots(self.experts_GSk, self.wanted_GSk, num_experts, limits.capacity, priority_GS)
        return Routing(
            self.experts_GSk,
            slots.slots_GSk,
            slots.kept_GSk,
            self.weights_GSk,
            self.gates_GSE,
            valid_GS,
            num_experts,
            limits.capacity,
            losses,
        )


@dataclass(frozen=True)
class Slots:
    """The outcome of giving out slots."""

    slots_GSk: Tensor
    kept_GSk: Tensor


def give_slots(experts_GSk: Tensor, wanted_GSk: Tensor, num_experts: int, capacity: int, priority_GS: Tensor | None) -> Slots:
    """Give every choice a slot in its expert, as long as there are any.

    Args:
        experts_GSk: int64, an item's choices, the best first.
        wanted_GSk: bool, choices that count; the others take no slot.
        num_experts: E.
        capacity: slots of an expert in each group.
        priority_GS: who comes first, the larger the sooner, equal ones by position; None for all by position.
    """
    groups, size, k = experts_GSk.shape
    asked_GSk = torch.where(wanted_GSk, experts_GSk, num_experts)
    if priority_GS is not None:
        first_GS = torch.argsort(priority_GS.detach(), dim=1, descending=True, stable=True)
        asked_GSk = asked_GSk.gather(1, first_GS[..., None].expand(-1, -1, k))
    # All first choices, then all second ones: [G, k * S].
    asked_GN = asked_GSk.transpose(1, 2).reshape(groups, k * size)
    sorted_GN, order_GN = torch.sort(asked_GN, dim=1, stable=True)
    experts_GE = torch.arange(num_experts + 1, device=asked_GN.device).expand(groups, -1).contiguous()
    starts_GE = torch.searchsorted(sorted_GN, experts_GE)
    places_GN = torch.arange(k * size, device=asked_GN.device) - starts_GE.gather(1, sorted_GN)
    slots_GN = torch.empty_like(places_GN).scatter(1, order_GN, places_GN)
    slots_GSk = slots_GN.view(groups, k, size).transpose(1, 2)
    if priority_GS is not None:
        slots_GSk = torch.empty_like(slots_GSk).scatter(1, first_GS[..., None].expand(-1, -1, k), slots_GSk)
    return Slots(slots_GSk, wanted_GSk & (slots_GSk < capacity))
