"""One decision per image, by a convolution of its maps."""

from torch import Tensor, nn

from hardmoe.models.moe.precision import at_least_float32, full_precision

_WIDTH, _KERNEL = 256, 3


class ConvolvedScores(nn.Module):
    """FC(GAP(Conv3x3(x))), the convolutional gate of Pavlitskaya et al.; small maps are padded, where theirs cannot take them."""

    def __init__(self, channels: int, num_experts: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, _WIDTH, _KERNEL)
        self.linear = nn.Linear(_WIDTH, num_experts)

    def forward(self, maps_GSCHW: Tensor) -> Tensor:
        """Scores [G, S, E]."""
        with full_precision(maps_GSCHW):
            maps_BCHW = at_least_float32(maps_GSCHW).flatten(0, 1)
            missing = [max(0, _KERNEL - side) for side in maps_BCHW.shape[-2:]]
            maps_BCHW = nn.functional.pad(maps_BCHW, (0, missing[1], 0, missing[0]))
            pooled_BC = self.convolution(maps_BCHW).mean((-2, -1))
            scores_GSE: Tensor = self.linear(pooled_BC).unflatten(0, maps_GSCHW.shape[:2])
            return scores_GSE
