"""A network that is slow, and notes every training step of a Ray worker: who took it.

`experts.backbone: watched:network`, with this folder on `PYTHONPATH`. `WATCHED_LOG` names the file, `WATCHED_SECONDS` how long a
step takes at least; without them it is only a network.
"""

import os
import time

import torch
from torch import Tensor, nn


class Watched(nn.Module):
    """One convolution with batch normalisation."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        """The mean of every map."""
        if self.training and torch.is_grad_enabled() and (path := os.environ.get("WATCHED_LOG")):
            _note(path)
        features: Tensor = self.body(images).mean((2, 3))
        return features


def network(image_size: int) -> Watched:
    """For any size."""
    return Watched()


def _note(path: str) -> None:
    import ray

    time.sleep(float(os.environ.get("WATCHED_SECONDS", "0")))
    line = f"{ray.get_runtime_context().get_task_name()} {os.getpid()}\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)
