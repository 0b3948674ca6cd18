"""What a hard constraint is to a router.

Shape letters: E experts.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Constraint(nn.Module, ABC):
    """Knows what every expert was given in the steps before."""

    @abstractmethod
    def live_E(self) -> Tensor:
        """bool: which experts take part in this step."""

    @abstractmethod
    def update(self, importance_E: Tensor, num_items: Tensor) -> None:
        """Take in a step: the experts' summed weights, and how many items there were."""
