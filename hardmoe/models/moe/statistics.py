"""How a layer's experts are used, as sums that can be added up over batches and read at the end.

Names as in the evaluation of Pavlitskaya et al.: the coefficients of variation (population deviation by mean) of activation, how
often an expert is run, and of importance, the weights it is given; and living experts, those that are run at all.

Shape letters: E experts, G groups, S items of a group, k choices, B images, V tags.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from hardmoe.config import Json
from hardmoe.models.moe.layer import MoeLayer, moe_layers
from hardmoe.models.moe.routing import Routing


@dataclass
class Usage:
    """Sums over the items that one layer has routed."""

    activation_E: Tensor
    """float64: choices that an expert took."""
    importance_E: Tensor
    """float64: their weights."""
    num_items: float = 0.0
    num_choices: float = 0.0
    num_dropped: float = 0.0
    """Choices that found no slot."""
    entropy: float = 0.0
    """Of the items' gates, summed; nats."""

    @classmethod
    def empty(cls, num_experts: int) -> "Usage":
        """Of nothing yet."""
        return cls(torch.zeros(num_experts, dtype=torch.float64), torch.zeros(num_experts, dtype=torch.float64))

    def add(self, routing: Routing) -> None:
        """Take in a batch."""
        kept_GSk, valid_GS = routing.kept_GSk, routing.valid_GS
        experts_P = routing.experts_GSk.flatten().cpu()
        weights_P = torch.where(kept_GSk, routing.weights_GSk, 0).detach().flatten().double().cpu()
        self.activation_E = self.activation_E.index_add(0, experts_P, kept_GSk.flatten().double().cpu())
        self.importance_E = self.importance_E.index_add(0, experts_P, weights_P)
        gates_GSE = routing.gates_GSE.detach().double()
        entropy_GS = -torch.special.xlogy(gates_GSE, gates_GSE).sum(-1)
        self.entropy += float((entropy_GS * valid_GS).sum())
        self.num_items += float(valid_GS.sum())
        choices = float(valid_GS.sum()) * kept_GSk.shape[-1]
        self.num_choices += choices
        self.num_dropped += choices - float(kept_GSk.sum())

    def __add__(self, other: "Usage") -> "Usage":
        """Of both."""
        return Usage(
            self.activation_E + other.activation_E,
            self.importance_E + other.importance_E,
            self.num_items + other.num_items,
            self.num_choices + other.num_choices,
            self.num_dropped + other.num_dropped,
            self.entropy + other.entropy,
        )

    def to_json(self) -> dict[str, Json]:
        """As plain values."""
        tensors = {"activation_E": self.activation_E.tolist(), "importance_E": self.importance_E.tolist()}
        return {each.name: tensors.get(each.name, getattr(self, each.name)) for each in fields(self)}

    @classmethod
    def from_json(cls, told: Mapping[str, Json]) -> "Usage":
        """The inverse."""
        tensors = {name: torch.tensor(told[name], dtype=torch.float64) for name in ("activation_E", "importance_E")}
        return cls(**{**told, **tensors})

    def summary(self) -> dict[str, float]:
        """Plain numbers: `cv_activation`, `cv_importance`, `living_experts`, `dropped`, `entropy` (nats an item)."""
        return {
            "cv_activation": _variation(self.activation_E),
            "cv_importance": _variation(self.importance_E),
            "living_experts": float((self.activation_E > 0).sum()),
            "dropped": self.num_dropped / max(1.0, self.num_choices),
            "entropy": self.entropy / max(1.0, self.num_items),
        }


def _variation(totals_E: Tensor) -> float:
    mean = float(totals_E.mean())
    return float(totals_E.std(unbiased=False)) / mean if mean else 0.0


@contextmanager
def observed(network: nn.Module) -> Iterator[dict[str, Usage]]:
    """Count, while a block runs, what every layer of a network routes, by the layer's name."""
    layers: list[tuple[str, MoeLayer]] = list(moe_layers(network))
    usages = {name: Usage.empty(layer.router.num_experts) for name, layer in layers}
    for name, layer in layers:
        layer.observers.append(usages[name].add)
    try:
        yield usages
    finally:
        for name, layer in layers:
            layer.observers.remove(usages[name].add)


def tag_shares(routing: Routing, tags_BV: Tensor) -> Tensor:
    """Of every tag's images, the choices that each expert took, float64 [V, E]; a row sums to 1, or to 0 without images.

    Args:
        routing: of a layer, for these images in their order.
        tags_BV: bool, which tags an image has.
    """
    taken_GSE = routing.by_expert(routing.kept_GSk.double()).cpu()
    num_items = int(routing.valid_GS.sum()) // len(tags_BV)
    taken_BE = taken_GSE.flatten(0, 1)[routing.valid_GS.cpu().flatten()].view(len(tags_BV), num_items, routing.num_experts).sum(1)
    counts_VE = tags_BV.double().cpu().T @ taken_BE
    return counts_VE / counts_VE.sum(1, keepdim=True).clamp(min=1e-300)
