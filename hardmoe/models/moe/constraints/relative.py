"""The relative-importance constraint of Pavlitskaya et al. (arXiv 2204.10598): in the long run every expert gets 1 / E.

Shape letters: E experts.
"""

import torch
from torch import Tensor

from hardmoe.models.moe.constraints.base import Constraint


class RelativeImportance(Constraint):
    """R_e is the running sum of (I_e - mean(I)) / mean(I); an expert sits out while R_e is above the threshold.

    The R_e sum to 0, so with a threshold of 0 or more at least one expert always takes part; one that sits out loses exactly 1 a
    step.

    Args:
        num_experts: E.
        threshold: the paper's m.
    """

    def __init__(self, num_experts: int, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold
        self.relative_E: Tensor
        self.register_buffer("relative_E", torch.zeros(num_experts, dtype=torch.float64))

    def live_E(self) -> Tensor:
        """bool: which experts take part in this step."""
        return self.relative_E <= self.threshold

    @torch.no_grad()
    def update(self, importance_E: Tensor, num_items: Tensor) -> None:
        """Add a step's relative importance; the mean is of all items, whose weights sum to 1 each."""
        mean = num_items.double() / len(self.relative_E)
        self.relative_E += (importance_E.double() - mean) / mean
