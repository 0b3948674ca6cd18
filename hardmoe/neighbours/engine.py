"""What a nearest-centroid engine is, and which one this machine gets.

An engine is fast and nearly right: it ranks centroids in float32 and its distances err within a stated bound.
`assignment.assign` turns that into an answer that no longer depends on the engine. Rejected: asking engines for the two
nearest only, because whether the second is truly the second cannot be known without seeing the third.

Shape letters: N examples, D feature dim, K centroids, C neighbours asked for.
"""

import logging
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Ranks centroids by squared Euclidean distance in float32.

    Every distance must lie within gamma(D + 2) * (|x| + |c|)^2 of the truth, gamma(n) = n u / (1 - n u), u = 2^-24: what
    any order of float32 additions gives, fused or not, for |x|^2 - 2 x.c + |c|^2 as for sum((x - c)^2). Arithmetic that
    computes in less (TF32, bfloat16, float16) breaks the promise, and an engine must switch it off.
    """

    name: str
    on_gpu: bool

    def nearest(
        self, features_ND: NDArray[np.float32], centroids_KD: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The `count` nearest centroids of every row, nearest first; ties in any order.

        Args:
            features_ND: float32 [N, D], C-contiguous, N may be 0.
            centroids_KD: float32 [K, D], C-contiguous.
            count: how many to return, 1 <= count <= K.

        Returns:
            Indices int64 [N, C] and squared distances float32 [N, C]. Where a distance overflows float32 both are
            unspecified.
        """
        ...


@lru_cache(maxsize=1)
def choose_engine() -> Engine:
    """The fastest engine that works here: faiss on a GPU, torch on a GPU, faiss on the CPU, torch on the CPU.

    A GPU build of faiss whose wheel has no kernels for the card aborts the process or hangs instead of raising, so it is
    tried in a child process first; when that fails one warning is logged.
    """
    try:
        from hardmoe.neighbours import faiss_engine
    except ImportError as error:
        logger.warning("faiss cannot be imported (%s): nearest centroids are searched with torch instead", error)
        return _torch_engine()
    if faiss_engine.num_gpus() == 0:
        return _torch_engine() if _torch_sees_gpu() else faiss_engine.FaissEngine()
    problem = faiss_engine.probe_gpu()
    if problem is None:
        return faiss_engine.FaissEngine(gpu=True)
    logger.warning("faiss does not work on this GPU (%s): nearest centroids are searched with torch instead", problem)
    return _torch_engine()


def device_of(engine: Engine) -> str | None:
    """Where torch can do the rest of a pass beside the search; None where that is a CPU, or torch is built for one."""
    return "cuda" if engine.on_gpu and _torch_sees_gpu() else None


def _torch_sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _torch_engine() -> Engine:
    from hardmoe.neighbours.torch_engine import TorchEngine

    return TorchEngine("cuda" if _torch_sees_gpu() else "cpu")
