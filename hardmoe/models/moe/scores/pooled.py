"""One decision per image: a linear layer over its averaged maps."""

from torch import Tensor, nn

from hardmoe.models.moe.precision import at_least_float32, full_precision


class PooledScores(nn.Module):
    """FC(GAP(x)), the `GAP-FC` gate of Pavlitskaya et al. (arXiv 2204.10598)."""

    def __init__(self, channels: int, num_experts: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, num_experts, bias=bias)

    def forward(self, maps_GSCHW: Tensor) -> Tensor:
        """Scores [G, S, E]."""
        with full_precision(maps_GSCHW):
            scores_GSE: Tensor = self.linear(at_least_float32(maps_GSCHW).mean((-2, -1)))
            return scores_GSE
