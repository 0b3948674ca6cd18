"""In which precision things are computed under autocast."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor


@contextmanager
def full_precision(like: Tensor) -> Iterator[None]:
    """Run a block without autocast."""
    # The meta device knows no autocast.
    with nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False):
        yield


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, in float32 where it has fewer digits."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def lowered(tensor: Tensor) -> Tensor:
    """The tensor in the precision that autocast would give a matrix product; as it is without autocast, or in float64."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))
