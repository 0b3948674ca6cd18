"""Runs the Triton kernel in Triton's interpreter and holds it against the CPU path: a program for `test_device_kernel`.

    TRITON_INTERPRET=1 python tests/kernel_interpreted.py

Triton decides at its import whether it interprets, so this is a process of its own. Prints how often the kernel was at work.
"""

import warnings

import numpy as np
import torch
from device_cases import assert_same_bits, cases
from hypothesis import given, settings

from hardmoe.partitioning import device_kernel
from hardmoe.partitioning.device_pass import DeviceCentroids

CPU = torch.device("cpu")
decided = 0
_run = device_kernel.Kernel.run


def _counting(self: device_kernel.Kernel, features_ND: torch.Tensor) -> device_kernel.KernelPass:
    global decided
    found = _run(self, features_ND)
    decided += int((found.primary_N >= 0).sum())
    return found


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(case=cases(dims=(16, 32), most_clusters=20))
def any_features(case: tuple[np.ndarray, np.ndarray]) -> None:
    """Of every kind."""
    assert_same_bits(*case, CPU)


def every_shape() -> None:
    """Every width, more rows than a program takes, one centroid and many, unit features as in use."""
    generator = np.random.default_rng(0)
    for dim, clusters, rows in [(16, 1, 2100), (64, 33, 130), (128, 32, 300), (256, 32, 70)]:
        features = generator.standard_normal((rows, dim)).astype(np.float32)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        centroids = (features[:clusters] * np.float32(0.7)).copy()
        assert device_kernel.suits(DeviceCentroids.of(centroids, CPU))
        before = decided
        for given_features in (features, features.astype(np.float16).astype(np.float32)):
            assert_same_bits(given_features, centroids, CPU)
        assert decided - before > 2.9 * rows, (dim, decided - before, rows)  # three runs, nearly all rows decided by the kernel


def main() -> None:
    """All checks."""
    device_kernel.Kernel.run = _counting
    device_kernel._SHAPE[:] = [256, 4]  # interpreting takes as long as there are blocks
    assert device_kernel.works(CPU, 3, 16, torch.float16)
    device_kernel.works = lambda *given: True
    warnings.simplefilter("ignore")  # NumPy's, of overflows that the kernel expects
    every_shape()
    any_features()
    print(f"{decided} rows decided by the kernel")


if __name__ == "__main__":
    main()
