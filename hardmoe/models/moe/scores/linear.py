"""The router of V-MoE and of the sweet spot: one linear map per item. On a map of pixels it is a 1x1 convolution."""

from torch import Tensor, nn
from torch.nn import functional

from hardmoe.models.moe.precision import at_least_float32, full_precision


class LinearScores(nn.Module):
    """Logits x W without a bias (Riquelme et al., arXiv 2106.05974, section 2.2)."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.weight_ED = nn.Parameter(nn.init.normal_(nn.Linear(dim, num_experts, bias=False).weight.detach(), std=0.02))

    def forward(self, items_GSD: Tensor) -> Tensor:
        """Scores [G, S, E]."""
        with full_precision(items_GSD):
            return functional.linear(at_least_float32(items_GSD), self.weight_ED)
