"""The layer that puts a router, a dispatch and experts together.

Shape letters: B images, T items of an image, G groups, S items of a group, D width, X shape of an item, Y shape of an output.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from hardmoe.models.moe.capacity import expert_capacity
from hardmoe.models.moe.dispatch.base import Dispatch
from hardmoe.models.moe.dispatch.einsum import EinsumDispatch
from hardmoe.models.moe.dispatch.grouped import GroupedDispatch
from hardmoe.models.moe.dispatch.index import IndexDispatch
from hardmoe.models.moe.experts.base import Experts
from hardmoe.models.moe.groups import group, ungroup
from hardmoe.models.moe.losses import weighted_sum
from hardmoe.models.moe.routers.base import Router
from hardmoe.models.moe.routing import Limits, Routing

DispatchName = Literal["einsum", "index", "grouped"]
DISPATCHES: dict[str, Callable[[], Dispatch]] = {"einsum": EinsumDispatch, "index": IndexDispatch, "grouped": GroupedDispatch}


@dataclass(frozen=True)
class Plan:
    """How a layer routes."""

    k: int
    """Experts of each item."""
    capacity_factor: float = 0.0
    """In training; see `expert_capacity`. 0 for no limit."""
    inference_capacity_factor: float = 0.0
    """The same in evaluation mode. With no limit, what an image gets does not depend on the images beside it."""
    priority: bool = False
    """Batch Priority Routing, in training and evaluation mode alike."""
    group_images: int = 8
    """Images that are routed together."""
    dispatch: DispatchName = "grouped"


class MoeLayer(nn.Module):
    """Each item through its experts; from [B, …, X] to [B, …, Y].

    Args:
        router: says who goes where.
        experts: run.
        plan: the limits.
        loss_weights: by name of the router's auxiliary losses; those that are not named are left out.
        item_dims: dimensions of an item: 1 for patches or pixels [B, …, D], 3 for whole maps [B, C, H, W].
    """

    def __init__(
        self, router: Router, experts: Experts, plan: Plan, loss_weights: Mapping[str, float] | None = None, item_dims: int = 1
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.plan = plan
        self.loss_weights = dict(loss_weights or {})
        self.item_dims = item_dims
        self.dispatch = DISPATCHES[plan.dispatch]()
        self.observers: list[Callable[[Routing], None]] = []
        """Told of every routing; see `statistics`."""
        self.dense_names: tuple[str, ...] = ()
        """What of a dense network the experts stand for, by names within the layer's parent; see `upcycling`."""
        self.auxiliary_loss: Tensor | None = None
        """Of the last forward pass in training; whoever adds it to a loss takes it away, see `training.auxiliary`."""

    def forward(self, inputs_BTX: Tensor) -> Tensor:
        """Route, run, mix."""
        between = inputs_BTX.shape[1 : inputs_BTX.ndim - self.item_dims]
        items_BTX = inputs_BTX.reshape(inputs_BTX.shape[0], -1, *inputs_BTX.shape[inputs_BTX.ndim - self.item_dims :])
        items_GSX, valid_GS = group(items_BTX, self.plan.group_images)
        routing = self.router(items_GSX, valid_GS, self.limits(items_GSX.shape[1]))
        if self.training:
            self.auxiliary_loss = weighted_sum(routing.losses, self.loss_weights)
        for observe in self.observers:
            observe(routing)
        outputs_GSY = self.dispatch(items_GSX, routing, self.experts)
        outputs_BTY = ungroup(outputs_GSY, items_BTX.shape[0], items_BTX.shape[1])
        return outputs_BTY.reshape(len(outputs_BTY), *between, *outputs_BTY.shape[2:])

    @property
    def num_experts(self) -> int:
        """E."""
        return self.router.num_experts

    @property
    def num_active(self) -> int:
        """How many of them an item passes; on average, where experts choose."""
        return min(self.plan.k, self.num_experts)

    def limits(self, group_size: int) -> Limits:
        """The limits of a group of so many items."""
        plan, num_experts = self.plan, self.router.num_experts
        factor = plan.capacity_factor if self.training else plan.inference_capacity_factor
        return Limits(plan.k, expert_capacity(group_size, plan.k, num_experts, factor), plan.priority)


def moe_layers(network: nn.Module) -> Iterator[tuple[str, MoeLayer]]:
    """The layers of experts in a network, with their names, in its order."""
    return ((name, module) for name, module in network.named_modules() if isinstance(module, MoeLayer))


def replan(network: nn.Module, **changes: int | float | bool) -> None:
    """Let all layers of a network route otherwise: fields of `Plan` by name, such as `k` or `inference_capacity_factor`."""
    for _, layer in moe_layers(network):
        layer.plan = replace(layer.plan, **changes)  # type: ignore[arg-type]


@contextmanager
def as_in_training(network: nn.Module) -> Iterator[None]:
    """Let all layers of a network, while a block runs, have as many slots in evaluation mode as in training."""
    plans = {name: layer.plan for name, layer in moe_layers(network)}
    for _, layer in moe_layers(network):
        layer.plan = replace(layer.plan, inference_capacity_factor=layer.plan.capacity_factor)
    try:
        yield
    finally:
        for name, layer in moe_layers(network):
            layer.plan = plans[name]
