"""The mean-importance constraint of Pavlitskaya et al. (arXiv 2204.10598): no expert gets much more than 1 / E.

Shape letters: E experts.
"""

import torch
from torch import Tensor

from hardmoe.models.moe.constraints.base import Constraint


class MeanImportance(Constraint):
    """M_e is the mean over the steps of I_e / items; an expert sits out while M_e - 1 / E is above the threshold.

    It caps what an expert gets, at 1 / E + threshold, and lets others die.

    Args:
        num_experts: E.
        threshold: the paper's m.
    """

    def __init__(self, num_experts: int, threshold: float = 0.3) -> None:
        super().__init__()
        self.threshold = threshold
        self.mean_E: Tensor
        self.num_steps: Tensor
        self.register_buffer("mean_E", torch.zeros(num_experts, dtype=torch.float64))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def live_E(self) -> Tensor:
        """bool: which experts take part in this step."""
        return self.mean_E - 1 / len(self.mean_E) <= self.threshold

    @torch.no_grad()
    def update(self, importance_E: Tensor, num_items: Tensor) -> None:
        """Take a step's shares into the mean."""
        self.num_steps += 1
        self.mean_E += (importance_E.double() / num_items - self.mean_E) / self.num_steps
