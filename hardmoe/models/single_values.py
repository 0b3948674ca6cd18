"""Batch normalisation of a batch of one image."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def running_statistics_for_single_values(model: nn.Module) -> Iterator[None]:
    """Let batch normalisation use its running statistics wherever a channel has one value only.

    A batch of one image has no variance once its maps are 1x1; torch refuses it. Layers with larger maps are not affected.
    """

    def choose(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values_per_channel = inputs[0].numel() // inputs[0].shape[1]
        module.train(values_per_channel > 1)

    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    handles = [layer.register_forward_pre_hook(choose) for layer in layers]
    try:
        yield
    finally:
        for handle, layer in zip(handles, layers, strict=True):
            handle.remove()
            layer.train()
