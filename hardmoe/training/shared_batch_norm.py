"""Batch normalisation over a batch of which every process has a share.

Mean and variance of a channel are those of the whole batch, so several devices train the network that one device with the
whole batch would. Each process tells the others its count, mean and sum of squared deviations, which combine without
cancellation (Chan, Golub, LeVeque 1983, equation 1.5); the gradient needs two more sums (Ioffe, Szegedy 2015, arXiv
1502.03167, section 3). Rejected: torch's SyncBatchNorm, which refuses the CPU and replaces the layers.

Shape letters: B rows of this process, C channels, P processes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def shared_batch_norm(model: nn.Module) -> Iterator[None]:
    """Let every layer of batch normalisation that trains use the statistics of all processes' batches together.

    All processes of the default group must run the same layers in the same order within the block.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    for layer in layers:
        layer.forward = partial(_normalised, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _normalised(layer: _BatchNorm, x_BC: Tensor) -> Tensor:
    """What the layer's own forward gives, and its running statistics as it keeps them, of all processes' rows."""
    y_BC, count, mean_C, variance_C = _Normalise.apply(x_BC, layer.weight, layer.bias, layer.eps)
    if layer.track_running_stats and layer.running_mean is not None and layer.running_var is not None:
        assert layer.num_batches_tracked is not None
        with torch.no_grad():
            layer.num_batches_tracked.add_(1)
            factor = 1.0 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
            layer.running_mean.lerp_(mean_C.to(layer.running_mean.dtype), factor)
            unbiased_C = variance_C * (count / (count - 1)).item()
            layer.running_var.lerp_(unbiased_C.to(layer.running_var.dtype), factor)
    return y_BC  # type: ignore[no-any-return]


def _whole_batch(x_BC: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Values per channel, mean [C] and biased variance [C] over all processes, float64."""
    mean_C = x_BC.mean(dims, dtype=torch.float64 if x_BC.dtype == torch.float64 else torch.float32)
    deviations_C = (x_BC - _spread(mean_C, x_BC)).square().sum(dims)
    count = torch.full((1,), x_BC.numel() / x_BC.shape[1], dtype=torch.float64, device=x_BC.device)
    mine = torch.cat([count, mean_C.double(), deviations_C.double()])
    told = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(told, mine)
    counts_P, means_PC, deviations_PC = torch.split(torch.stack(told), [1, len(mean_C), len(mean_C)], dim=1)
    total = counts_P.sum()
    whole_mean_C = (counts_P * means_PC).sum(0) / total
    between_C = (counts_P * (means_PC - whole_mean_C).square()).sum(0)
    return total, whole_mean_C, (deviations_PC.sum(0) + between_C) / total


def _spread(values_C: Tensor, like_BC: Tensor) -> Tensor:
    """Values of the channels in a shape that broadcasts over the batch."""
    return values_C.view(1, -1, *[1] * (like_BC.dim() - 2))


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, of [B, C, ...]."""

    @staticmethod
    def forward(ctx: Any, x_BC: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        dims = [dim for dim in range(x_BC.dim()) if dim != 1]
        count, mean_C, variance_C = _whole_batch(x_BC, dims)
        inverse_C = (variance_C + eps).rsqrt()
        work = torch.promote_types(x_BC.dtype, torch.float32)
        normal_BC = (x_BC - _spread(mean_C.to(work), x_BC)) * _spread(inverse_C.to(work), x_BC)
        y_BC = normal_BC
        if weight_C is not None and bias_C is not None:
            y_BC = torch.addcmul(_spread(bias_C.to(work), x_BC), normal_BC, _spread(weight_C.to(work), x_BC))
        ctx.save_for_backward(x_BC, weight_C, mean_C, inverse_C, count)
        ctx.mark_non_differentiable(count, mean_C, variance_C)
        return y_BC.to(x_BC.dtype), count, mean_C, variance_C

    @staticmethod
    def backward(ctx: Any, grad_BC: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x_BC, weight_C, mean_C, inverse_C, count = ctx.saved_tensors
        dims = [dim for dim in range(x_BC.dim()) if dim != 1]
        work = torch.promote_types(x_BC.dtype, torch.float32)
        grad_BC = grad_BC.to(work)
        inverse = _spread(inverse_C.to(work), x_BC)
        normal_BC = (x_BC - _spread(mean_C.to(work), x_BC)) * inverse
        # Over this process's rows: the trainer sums the parameters' gradients itself.
        bias_grad_C, weight_grad_C = grad_BC.sum(dims), (grad_BC * normal_BC).sum(dims)
        sums = torch.cat([bias_grad_C, weight_grad_C]).double()
        distributed.all_reduce(sums)
        grad_mean_C, along_C = (sums / count).to(work).chunk(2)
        scale = inverse if weight_C is None else inverse * _spread(weight_C.to(work), x_BC)
        x_grad_BC = (grad_BC - _spread(grad_mean_C, x_BC) - normal_BC * _spread(along_C, x_BC)) * scale
        if weight_C is None:
            return x_grad_BC.to(x_BC.dtype), None, None, None
        return x_grad_BC.to(x_BC.dtype), weight_grad_C.to(weight_C.dtype), bias_grad_C.to(weight_C.dtype), None
