"""What the tests of k-means on a device share: features of every kind, and the CPU path's answer beside the device's.

Support of test_device_pass.py, test_device_kernel.py and test_device_gpu.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from hardmoe.neighbours.assignment import Assignment, assign
from hardmoe.neighbours.torch_engine import TorchEngine
from hardmoe.partitioning.device_pass import scan_on
from hardmoe.partitioning.exact_sums import ClusterSums
from hardmoe.partitioning.kmeans import scan_batch

ENGINE = TorchEngine("cpu")
SHAPES = [*range(1, 20), 64, 127, 128, 129, 136, 200, 255, 256, 257, 384, 600]
"""Widths at which NumPy's order of additions changes."""

Case = tuple[NDArray[np.float32], NDArray[np.float32]]
Scan = Callable[[torch.device, NDArray[np.float32], NDArray[np.float32]], tuple[Assignment, ClusterSums]]


def ids_of(rows: int) -> NDArray[np.uint8]:
    """Distinct example ids."""
    return np.random.default_rng(rows).integers(0, 256, (rows, 16), dtype=np.uint8)


@st.composite
def cases(draw: st.DrawFn, dims: Sequence[int] = range(1, 141), most_clusters: int = 60) -> Case:
    """Features and centroids, float32: spread ones, ties, near-ties, copies, zero vectors, tiny and huge ones."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, dim, clusters = draw(st.integers(0, 400)), draw(st.sampled_from(dims)), draw(st.integers(1, most_clusters))
    magnitude = draw(st.sampled_from([1e-30, 1e-6, 1.0, 100.0, 3000.0, 65504.0, 2.0**18.9, 2.0**19.9]))
    kind = draw(st.sampled_from(["spread", "grid", "between", "copies"]))
    features = generator.uniform(-1, 1, (rows, dim))
    centroids = generator.uniform(-1, 1, (clusters, dim))
    if kind == "grid":
        features, centroids = generator.integers(-2, 3, features.shape) / 2, generator.integers(-2, 3, centroids.shape) / 2
    if kind == "between":
        features = centroids[generator.integers(0, clusters, (2, rows))].mean(axis=0)
    if kind == "copies" and rows:
        features = features[generator.integers(0, min(rows, 5), rows)]
        centroids[clusters // 2 :] = centroids[0]
    features[generator.random(rows) < 0.1] = 0.0
    features, centroids = ((values * magnitude).astype(np.float32) for values in (features, centroids))
    if draw(st.booleans()):
        features[::3] *= np.float32(1e-3)
    if draw(st.booleans()):
        centroids[1::2] = np.nextafter(centroids[1::2], np.float32(np.inf))
    if draw(st.booleans()):
        features = np.clip(features, -65504, 65504).astype(np.float16).astype(np.float32)
    return features, centroids


def plain(features: NDArray[np.float32], centroids: NDArray[np.float32]) -> tuple[Assignment, ClusterSums]:
    """The definition's answer, by the CPU path that needs no compiler."""
    assignment = assign(features, centroids, ENGINE)
    return assignment, ClusterSums.from_batch(features, assignment, len(centroids))


def assert_same_bits(
    features: NDArray[np.float32], centroids: NDArray[np.float32], device: torch.device, scan: Scan = scan_on
) -> None:
    """The device's assignment, distances and sums are the CPU path's; float16 features, too, where they hold the values."""
    expected, expected_sums = plain(features, centroids)
    with np.errstate(over="ignore"):
        halves = features.astype(np.float16)
    for given in [features] + [halves] * np.array_equal(halves, features):
        found, sums = scan(device, given, centroids)
        np.testing.assert_array_equal(found.primary_N, expected.primary_N)
        assert found.squared_distance_N.tobytes() == expected.squared_distance_N.tobytes()
        assert _bytes(sums.to_arrays()) == _bytes(expected_sums.to_arrays())


def plain_pass(features: NDArray[np.float32], ids: NDArray[np.uint8], centroids: NDArray[np.float32]) -> dict[str, bytes]:
    """The bytes of the CPU path's pass."""
    return _bytes(scan_batch(features, ids, centroids, ENGINE).to_arrays())


def _bytes(arrays: dict[str, NDArray[Any]]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}
