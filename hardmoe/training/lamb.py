"""LAMB: Adam whose step is as long, layer by layer, as the weights are (You et al., "Large Batch Optimization for Deep
Learning: Training BERT in 76 minutes", ICLR 2020, arXiv 1904.00962, algorithm 2).

Parameters of one dimension are neither decayed nor adapted, as in the authors' own code: biases begin at zero and have no
length to go by. Nothing is brought from the device, so a GPU is never waited for. Rejected: clipping the weights' length (phi of
the paper), which no published recipe sets.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, optim

_EPS = 1e-6


class Lamb(optim.Optimizer):
    """The algorithm, over groups of parameters; the learning rate is 0 until it is set in the groups.

    Args:
        groups: as torch's optimisers take them, each with its `weight_decay`; `adapt: False` leaves the ratio of lengths at 1.
        betas: decays of the averages of gradients and of their squares.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "adapt": True, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("LAMB takes its gradients from the parameters, not from a closure")
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._move(parameters, group)

    def _move(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        states = [self._state(parameter) for parameter in parameters]
        means, squares = [state["mean"] for state in states], [state["square"] for state in states]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1.0)
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        # Without their bias towards the zeros that they began with; a counter for each, as gradients may come late.
        steps_P = torch.stack(steps)
        updates = list(torch._foreach_div(means, list((1 - beta1**steps_P).unbind())))
        roots = torch._foreach_div(squares, list((1 - beta2**steps_P).unbind()))
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, _EPS)
        torch._foreach_div_(updates, roots)
        torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        if group["adapt"]:
            torch._foreach_mul_(updates, list(_ratios(parameters, updates).unbind()))
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


def _ratios(parameters: list[Tensor], updates: list[Tensor]) -> Tensor:
    """Length of the weights over length of the update; 1 where either is zero."""
    weights_P, updates_P = torch.stack(torch._foreach_norm(parameters)), torch.stack(torch._foreach_norm(updates))
    return torch.where((weights_P > 0) & (updates_P > 0), weights_P / updates_P, 1.0)
