"""The optimisers and their schedule, a pure function of the step.

The learning rate is computed from the step each time. Rejected: torch's `LRScheduler`, whose internal state would have to
be saved with every checkpoint and drifts by rounding when it multiplies step after step. The batches of an epoch differ by at
most one example, so the share of all steps is the share of all examples that were seen.

AdamW is torch's fused one, also on a CPU, where it is one pass over the parameters instead of ten and the same bits each time.
SGD is fused on a GPU only: on a CPU its bits are those of the first runs.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn, optim

from hardmoe.training.config import TrainingConfig
from hardmoe.training.lamb import Lamb

REFERENCE_BATCH = 256
"""The batch size that `TrainingConfig.learning_rate` is stated for."""


def learning_rate_at(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Learning rate of a step: a linear rise to the peak, then the schedule: half a cosine or a line to 0, or the peak.

    Args:
        step: 0 for the first.
        total_steps: steps of the whole training.
        config: its peak is `learning_rate` times `batch_size / 256`, or for adamw and lamb times its square root.
    """
    scale = config.batch_size / REFERENCE_BATCH
    peak = config.learning_rate * (scale if config.optimizer == "sgd" else math.sqrt(scale))
    warmup_steps = round(total_steps * config.warmup_fraction)
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if config.schedule == "constant":
        return peak
    done, all_of_them = step - warmup_steps, max(1, total_steps - warmup_steps)
    if config.schedule == "linear":
        return peak * (1 - done / all_of_them)
    return peak * 0.5 * (1 + math.cos(math.pi * done / all_of_them))


def build_optimizer(model: nn.Module, config: TrainingConfig) -> optim.Optimizer:
    """The optimiser over the parameters that require gradients; frozen ones are left out.

    Biases and the scales of normalisation layers, all of one dimension, are not decayed. The model is on its device already. Set
    the learning rate with `set_learning_rate` before every step.
    """
    groups = parameter_groups(model, config.weight_decay)
    betas = (config.momentum, config.beta2)
    if config.optimizer == "lamb":
        return Lamb(groups, betas)
    if config.optimizer == "adamw":
        return optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
    on_gpu = {parameter.device.type for group in groups for parameter in group["params"]} == {"cuda"}
    return optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov, fused=on_gpu)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that require gradients, those that are decayed and those of one dimension at most, which are not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: optim.Optimizer, learning_rate: float) -> None:
    """Use a learning rate for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def optimizer_state(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """What the optimiser remembers, as `<what>.<parameter>`: momenta, squares, counters of steps; nothing before a first step."""
    return {
        f"{what}.{name}": tensor
        for name, parameter in model.named_parameters()
        for what, tensor in optimizer.state.get(parameter, {}).items()
        if tensor is not None
    }


def restore_optimizer_state(model: nn.Module, optimizer: optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_state` gave, each in its parameter's layout, to the bit."""
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        what, _, name = key.partition(".")
        parameter = parameters[name]
        # A counter has no dimension; what has the parameter's shape must also have its strides, which fused kernels rely on.
        like = parameter.detach() if tensor.shape == parameter.shape else torch.zeros((), device=parameter.device)
        optimizer.state[parameter][what] = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
