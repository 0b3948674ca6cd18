"""The optimiser and its schedule, a pure function of the step.

The learning rate is computed from the step each time. Rejected: torch's `LRScheduler`, whose internal state would have to
be saved with every checkpoint and drifts by rounding when it multiplies step after step.
"""

import math

from torch import nn, optim

from hardmoe.training.config import TrainingConfig

REFERENCE_BATCH = 256
"""The batch size that `TrainingConfig.learning_rate` is stated for."""


def learning_rate_at(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Learning rate of a step: a linear rise to the peak, then half a cosine to 0.

    Args:
        step: 0 for the first.
        total_steps: steps of the whole training.
        config: its peak is `learning_rate * batch_size / 256`.
    """
    peak = config.learning_rate * config.batch_size / REFERENCE_BATCH
    warmup_steps = round(total_steps * config.warmup_fraction)
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def build_optimizer(model: nn.Module, config: TrainingConfig) -> optim.SGD:
    """Stochastic gradient descent over the parameters that require gradients; frozen ones are left out.

    Biases and the scales of normalisation layers, all of one dimension, are not decayed. Set the learning rate with
    `set_learning_rate` before every step.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return optim.SGD([group for group in groups if group["params"]], lr=0.0, momentum=config.momentum, nesterov=config.nesterov)


def set_learning_rate(optimizer: optim.Optimizer, learning_rate: float) -> None:
    """Use a learning rate for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
