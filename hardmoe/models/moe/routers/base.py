"""What a router is to a layer.

Shape letters: G groups, S items of a group, E experts, k choices.
"""

from typing import Protocol

from torch import Tensor

from hardmoe.models.moe.routing import Limits, Routing


class Router(Protocol):
    """Decides who goes where."""

    num_experts: int

    def __call__(self, items_GSX: Tensor, valid_GS: Tensor, limits: Limits) -> Routing:
        """Route items of any shape X; those that are not valid take no slot and count in no loss."""
        ...
