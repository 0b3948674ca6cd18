"""On a GPU a pass of k-means gives the bits of the CPU: by torch, by the Triton kernel, resident and streamed."""

import numpy as np
import pytest
import torch
from device_cases import SHAPES, assert_same_bits, cases, ids_of, plain_pass
from hypothesis import given, settings

from hardmoe.errors import DataError
from hardmoe.partitioning import device_features, device_kernel
from hardmoe.partitioning.device_features import Resident, Streamed, scan_pieces
from hardmoe.partitioning.device_pass import DeviceCentroids, scan_on
from hardmoe.partitioning.kmeans import PassSums

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@settings(max_examples=100)
@given(case=cases())
def test_torch_on_a_gpu_gives_the_bits_of_the_cpu(case):
    assert_same_bits(*case, GPU)


@settings(max_examples=100)
@given(case=cases(dims=(16, 32, 64, 128, 256), most_clusters=40))
def test_the_kernel_gives_the_bits_of_the_cpu(case):
    assert_same_bits(*case, GPU)


@pytest.mark.parametrize("dim", SHAPES)
def test_distances_on_a_gpu_are_added_in_numpys_order(dim):
    features = np.random.default_rng(dim).standard_normal((300, dim)).astype(np.float16).astype(np.float32)
    assert_same_bits(features, features[:7] + np.float32(0.1), GPU)


@pytest.mark.parametrize(("dim", "clusters"), [(16, 1), (32, 2), (64, 100), (128, 32), (128, 64), (256, 32)])
def test_the_kernel_decides_nearly_all_unit_features(dim, clusters):
    generator = np.random.default_rng(0)
    features = generator.standard_normal((50_000, dim)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    centroids = (features[:clusters] * np.float32(0.7)).copy()
    kernel = device_kernel.Kernel(DeviceCentroids.of(centroids, GPU))
    for dtype in (torch.float16, torch.float32):
        found = kernel.run(torch.tensor(features, device=GPU).to(dtype))
        assert (found.primary_N < 0).float().mean().item() < 0.1
    assert_same_bits(features, centroids, GPU)
    assert_same_bits(features.astype(np.float16).astype(np.float32), centroids, GPU)


@pytest.mark.parametrize("kind", ["resident", "pinned", "pageable"])
def test_features_of_every_residency_give_the_pass_of_the_cpu(kind, monkeypatch):
    """Pieces of 100 kB follow each other fast: one that is written too early would show in the sums."""
    monkeypatch.setitem(device_features._PIECE_BYTES, "cuda", 100_000)
    generator = np.random.default_rng(4)
    features, ids = generator.standard_normal((60_000, 32)).astype(np.float16), ids_of(60_000)
    centroids = features[:9].astype(np.float32)
    given_features = torch.tensor(features)
    if kind == "pinned":
        given_features = given_features.pin_memory()
    placed = (Resident if kind == "resident" else Streamed)(given_features, ids, GPU)
    expected = plain_pass(features.astype(np.float32), ids, centroids)
    for _ in range(3):
        found = PassSums(*scan_pieces(placed.pieces(), centroids, GPU, 9)).to_arrays()
        assert {name: array.tobytes() for name, array in found.items()} == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dim", [3, 32])
def test_what_is_no_number_is_refused_on_a_gpu(bad, dim):
    features = np.ones((5000, dim), np.float32)
    features[4321, 1] = bad
    with pytest.raises(DataError, match=r"^1 of 5000 features hold NaN or infinity"):
        scan_on(GPU, features, np.eye(dim, dtype=np.float32)[:3])
