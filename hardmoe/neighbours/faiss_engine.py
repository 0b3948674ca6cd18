"""Nearest centroids with faiss, on the CPU or on one GPU.

A flat (exhaustive) index is used: with a few thousand centroids at most, building anything cleverer costs more than it
saves (100,000 x 96 against 8 centroids: 15 ms on one thread). Rejected: `faiss.Kmeans`, which also updates the centroids
but counts in float32, so that past 2^24 points in a cluster they are silently wrong.

Shape letters: N examples, D feature dim, K centroids, C neighbours asked for.
"""

import subprocess
import sys
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

_TEMPORARY_BYTES = 256 * 2**20  # faiss reserves 1.5 GB by default, beside the trunk on the same GPU
_PROBE_SECONDS = 120.0
_PROBE = """
import faiss, numpy as np
index = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), 4)
index.add(np.eye(4, dtype=np.float32))
assert (index.search(np.eye(4, dtype=np.float32), 1)[1][:, 0] == np.arange(4)).all(), "wrong neighbours"
"""


def num_gpus() -> int:
    """How many GPUs faiss sees; 0 for a CPU build."""
    return int(faiss.get_num_gpus())


def probe_gpu(code: str = _PROBE, timeout_seconds: float = _PROBE_SECONDS) -> str | None:
    """Search four points on the GPU in a child process; the reason why that failed, or None.

    A child, because faiss answers a missing kernel with `abort()`, and on some cards by hanging.
    """
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"the probe hung for {timeout_seconds:g} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"the probe ended with code {done.returncode}"


class FaissEngine:
    """An exhaustive faiss search; see `Engine` for the contract."""

    def __init__(self, gpu: bool = False) -> None:
        """Search on the first visible GPU if `gpu`, else on the CPU with faiss's own threads."""
        self.name = "faiss-gpu" if gpu else "faiss"
        self.on_gpu = gpu
        self._resources: Any = None
        if gpu:
            self._resources = faiss.StandardGpuResources()
            self._resources.setTempMemory(_TEMPORARY_BYTES)

    def nearest(
        self, features_ND: NDArray[np.float32], centroids_KD: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See `Engine.nearest`."""
        dim = centroids_KD.shape[1]
        index = faiss.IndexFlatL2(dim) if self._resources is None else faiss.GpuIndexFlatL2(self._resources, dim)
        index.add(centroids_KD)
        squared_distances_NC, indices_NC = index.search(features_ND, count)
        return indices_NC, squared_distances_NC
