"""A pass on a device gives the bits of the CPU's `scan`: same assignment, same distances, same sums, same farthest points.

The device is the CPU here, on which every line but those of streams and events runs; `test_device_gpu.py` repeats it on a GPU.
"""

import numpy as np
import pytest
import torch
from device_cases import SHAPES, assert_same_bits, cases, ids_of, plain_pass
from hypothesis import given, settings

from hardmoe.errors import DataError
from hardmoe.neighbours.torch_engine import TorchEngine
from hardmoe.partitioning import device_features, device_pass, kmeans
from hardmoe.partitioning.device_features import Resident, Streamed, place, scan_pieces, staged
from hardmoe.partitioning.device_pass import DevicePass, scan_on
from hardmoe.partitioning.in_memory import FitOptions, fit

CPU = torch.device("cpu")


@settings(max_examples=80)
@given(case=cases())
def test_a_pass_gives_the_bits_of_the_cpu_path(case):
    assert_same_bits(*case, CPU)


@pytest.mark.parametrize("dim", SHAPES)
def test_distances_are_added_in_numpys_order(dim):
    generator = np.random.default_rng(dim)
    features = generator.standard_normal((300, dim)).astype(np.float16).astype(np.float32)
    assert_same_bits(features, features[:7] + np.float32(0.1), CPU)


def test_near_ties_are_decided_on_the_device_and_ties_alone_on_the_host(monkeypatch):
    generator = np.random.default_rng(1)
    centroids = generator.standard_normal((8, 32)).astype(np.float32)
    pairs = generator.integers(0, 8, (2, 5000))
    features = (centroids[pairs[0]] + centroids[pairs[1]]) / np.float32(2)
    on_host = []
    by_definition = device_pass.exact_nearest

    def counted(features, centroids, rows):
        on_host.append(len(rows))
        return by_definition(features, centroids, rows)

    monkeypatch.setattr(device_pass, "exact_nearest", counted)
    assert_same_bits(features, centroids, CPU)
    undecided = int((device_pass.search(torch.tensor(features), _centroids(centroids), torch.float32, 1e9) < 0).sum())
    assert undecided > 4000 and sum(on_host) < undecided / 2


def _centroids(centroids):
    return device_pass.DeviceCentroids.of(centroids, CPU)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("clusters", [1, 3])
def test_what_is_no_number_is_refused_as_on_the_cpu(bad, clusters):
    features = np.ones((5000, 3), np.float32)
    features[4321, 1] = features[17, 0] = bad
    with pytest.raises(DataError, match=r"^2 of 5000 features hold NaN or infinity: the trunk diverged"):
        scan_on(CPU, features, np.eye(3, dtype=np.float32)[:clusters])


def test_what_is_too_large_to_be_summed_is_refused_as_on_the_cpu():
    features = np.full((10, 3), 2.0**21, np.float32)
    with pytest.raises(DataError, match=r"beyond 1\.04858e\+06, the largest that can be summed exactly"):
        scan_on(CPU, features, np.eye(3, dtype=np.float32))


def test_centroids_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="finite"):
        DevicePass(np.full((2, 3), np.nan, np.float32), CPU)


def test_sums_of_many_long_rows_have_room():
    """Rows of 2^12 fill 63 bits after 2^19 of them: every tile's sums must have been put aside by then."""
    features = torch.full((1_100_000, 1), 2.0**12, dtype=torch.float16)
    this_pass = DevicePass(np.array([[4096.0], [0.0]], np.float32), CPU)
    this_pass.take(features)
    assert this_pass.sums().totals_KD[0, 0] == 1_100_000 * 2.0**12


@pytest.mark.parametrize("kind", [Resident, Streamed])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_resident_and_streamed_features_give_the_pass_of_the_cpu(kind, dtype, monkeypatch):
    monkeypatch.setitem(device_features._PIECE_BYTES, "cpu", 1000)
    generator = np.random.default_rng(4)
    features, ids = generator.standard_normal((999, 6)).astype(dtype), ids_of(999)
    features[500:600] = features[7]
    centroids = features[:5].astype(np.float32)
    placed = kind(torch.tensor(features), ids, CPU)
    assert len(list(placed.pieces())) == (1 if kind is Resident else -(-999 // (1000 // (6 * features.itemsize))))
    for _ in range(2):
        found = kmeans.PassSums(*scan_pieces(placed.pieces(), centroids, CPU, 5)).to_arrays()
        expected = plain_pass(features.astype(np.float32), ids, centroids)
        assert {name: array.tobytes() for name, array in found.items()} == expected


def test_copies_do_not_crowd_out_farther_distinct_points():
    """More copies of the farthest point than points are asked for, in a piece and across pieces."""
    features = np.zeros((5000, 2), np.float32)
    features[:900], features[900:910, 0], features[4000:] = 9.0, np.arange(1, 11), 9.0
    ids, centroids = ids_of(5000), np.zeros((3, 2), np.float32)
    centroids[1:, 0] = 100.0, 200.0
    spans = (slice(0, 2000), slice(2000, 5000))
    pieces = staged(((torch.tensor(features[span]), ids[span]) for span in spans), CPU)
    found = kmeans.PassSums(*scan_pieces(pieces, centroids, CPU, 3)).to_arrays()
    assert {name: array.tobytes() for name, array in found.items()} == plain_pass(features, ids, centroids)
    assert found["farthest_features"].tolist() == [[9.0, 9.0], [10.0, 0.0], [9.0, 0.0]]


def test_slots_go_round_with_batches_of_many_sizes():
    sizes = [5, 900, 3, 901, 0, 17, 64]
    batches = [(torch.full((size, 3), float(size)), ids_of(size)) for size in sizes]
    found = [(piece.shape[0], piece.mean().item() if len(piece) else 0.0) for piece, _ in staged(iter(batches), CPU)]
    assert found == [(size, float(size)) for size in sizes]


def test_place_chooses_by_free_memory_and_says_so(monkeypatch, caplog):
    features, ids = np.zeros((1000, 8), np.float16), ids_of(1000)
    with caplog.at_level("INFO"):
        assert isinstance(place(features, ids, CPU), Resident)
        monkeypatch.setattr(device_features, "_free_memory", lambda device: device_features._WORKSPACE + 1000)
        assert isinstance(place(features, ids, CPU), Streamed)
    kept, streamed = (record.getMessage() for record in caplog.records)
    assert kept.startswith("1000 x 8 features in float16, 1.6e-05 GB, are kept on the device (cpu has ")
    assert "are streamed from host memory in every pass (cpu has 2.15 GB free)" in streamed


@pytest.mark.parametrize("free", [2**62, 0])
def test_a_fit_where_there_is_a_device_is_that_of_the_cpu(free, monkeypatch):
    generator = np.random.default_rng(5)
    features, ids = generator.standard_normal((3000, 9)).astype(np.float32), ids_of(3000)
    features.flags.writeable = False
    options = FitOptions(max_passes=6, restarts=2, num_threads=2, batch_size=700)
    expected = fit(features, ids, 5, seed=3, options=options)
    used = []
    scan_on_device = device_features.scan_pieces
    monkeypatch.setattr(device_features, "scan_pieces", lambda *given: used.append(1) or scan_on_device(*given))
    monkeypatch.setattr(device_features, "_free_memory", lambda device: free)
    monkeypatch.setattr(kmeans, "device_of", lambda engine: "cpu")
    found = fit(features, ids, 5, seed=3, options=options)
    assert found.centroids_KD.tobytes() == expected.centroids_KD.tobytes()
    assert found.objective_per_pass == expected.objective_per_pass
    assert len(used) > 6


def test_batches_of_a_shard_on_a_device_give_the_sums_of_the_cpu(monkeypatch):
    generator = np.random.default_rng(6)
    features, ids = generator.standard_normal((500, 9)).astype(np.float32), ids_of(500)
    centroids, engine = features[:4].copy(), TorchEngine("cpu")
    batches = [(features[start : start + 130], ids[start : start + 130]) for start in range(0, 500, 130)]
    expected = kmeans.scan_batches(batches, centroids, engine)
    monkeypatch.setattr(kmeans, "device_of", lambda engine: "cpu")
    found = kmeans.scan_batches(iter(batches), centroids, engine)
    assert {name: array.tobytes() for name, array in found.to_arrays().items()} == {
        name: array.tobytes() for name, array in expected.to_arrays().items()
    }
