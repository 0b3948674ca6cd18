"""Nearest centroids with torch: the fallback where faiss has no kernels for the card, or is not installed.

|x|^2 - 2 x.c + |c|^2 by tiles, so that one tile of distances bounds the memory whatever N is. Rejected: `torch.cdist`,
which chooses between two formulas by size and, on a GPU, materialises all distances at once.

Shape letters: N examples, D feature dim, K centroids, C neighbours asked for, T rows of a tile.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

_TILE_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # of features plus distances: one core's cache, 256 MB on a GPU


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """TF32, autocast and gradients off: the first two would break the error bound that `Engine` promises."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class TorchEngine:
    """An exhaustive torch search on one device; see `Engine` for the contract."""

    def __init__(self, device: str = "cpu") -> None:
        """Search on `device`, such as "cpu" or "cuda"."""
        self.name = f"torch-{device}"
        self._device = torch.device(device)
        self.on_gpu = self._device.type != "cpu"

    def nearest(
        self, features_ND: NDArray[np.float32], centroids_KD: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See `Engine.nearest`."""
        num_rows, dim = features_ND.shape
        indices_NC = np.empty((num_rows, count), np.int64)
        squared_distances_NC = np.empty((num_rows, count), np.float32)
        tile_rows = max(1, _TILE_ELEMENTS.get(self._device.type, 2**20) // (dim + len(centroids_KD)))
        with full_float32(self._device.type):
            centroids = torch.tensor(centroids_KD, device=self._device)
            for start in range(0, num_rows, tile_rows):
                rows = slice(start, start + tile_rows)
                features_TD = torch.tensor(features_ND[rows], device=self._device)
                nearest = _squared_distances(features_TD, centroids).topk(count, dim=1, largest=False)
                indices_NC[rows] = nearest.indices.cpu().numpy()
                squared_distances_NC[rows] = nearest.values.cpu().numpy()
        return indices_NC, squared_distances_NC


def _squared_distances(features_TD: torch.Tensor, centroids_KD: torch.Tensor) -> torch.Tensor:
    """Expanded squared distances, float32 [T, K]."""
    distances_TK = torch.addmm(centroids_KD.square().sum(1), features_TD, centroids_KD.T, alpha=-2)
    return distances_TK.add_(features_TD.square().sum(1, keepdim=True))
