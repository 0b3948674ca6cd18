"""The hook by which a network's own pieces add to the loss.

A module that wants something of its network besides the hashtags leaves a scalar in an attribute `auxiliary_loss` while it
runs in training; the step takes all of them, adds them to the loss, and leaves None behind. Layers of experts do so, with the
weights of the recipe's `moe` section, and a network of your own may. The training's log tells the sum that is minimised.
Rejected: a return value, which every backbone would have to pass through, and a global list, which outlives a step that failed.
"""

from torch import Tensor, nn


def take_auxiliary_loss(network: nn.Module) -> Tensor | None:
    """The sum of what the modules of a network left in this forward pass, a scalar; None if they left nothing."""
    total: Tensor | None = None
    for module in network.modules():
        left = getattr(module, "auxiliary_loss", None)
        if isinstance(left, Tensor):
            total = left if total is None else total + left
            module.auxiliary_loss = None  # type: ignore[assignment]
    return total
