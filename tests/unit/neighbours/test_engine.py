"""Engines rank like scikit-learn's exhaustive search, and the choice among them survives a broken GPU build."""

import sys

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from hardmoe.neighbours import engine as engine_module
from hardmoe.neighbours import faiss_engine
from hardmoe.neighbours.assignment import assign
from hardmoe.neighbours.engine import choose_engine
from hardmoe.neighbours.faiss_engine import FaissEngine, probe_gpu
from hardmoe.neighbours.torch_engine import TorchEngine

ENGINES = [FaissEngine(), TorchEngine("cpu")]


@pytest.fixture
def fresh_choice():
    choose_engine.cache_clear()
    yield
    choose_engine.cache_clear()


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@pytest.mark.parametrize("rows", [1, 19, 5000])
def test_nearest_agrees_with_scikit_learn(engine, rows):
    generator = np.random.default_rng(3)
    features = generator.standard_normal((rows, 24)).astype(np.float32)
    centroids = generator.standard_normal((300, 24)).astype(np.float32)
    indices, squared_distances = engine.nearest(features, centroids, 3)
    expected_distances, expected = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(centroids).kneighbors(features)
    assert (indices.dtype, squared_distances.dtype, indices.shape) == (np.int64, np.float32, (rows, 3))
    assert (indices == expected).mean() > 0.999  # both work in float32, so a near-tie may fall either way
    np.testing.assert_allclose(np.sqrt(squared_distances), expected_distances, rtol=1e-4)


def test_torch_engine_keeps_float32_under_lowered_precision_and_autocast():
    features = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    plain = TorchEngine("cpu").nearest(features, features[:9], 2)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lowered = TorchEngine("cpu").nearest(features, features[:9], 2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(lowered[1], plain[1])


def test_choose_engine_without_gpu_takes_faiss_once(fresh_choice, monkeypatch):
    monkeypatch.setattr(faiss_engine, "num_gpus", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_engine().name == "faiss"
    assert choose_engine() is choose_engine()


def test_choose_engine_with_broken_gpu_build_falls_back_to_torch_with_one_warning(fresh_choice, monkeypatch, caplog):
    monkeypatch.setattr(faiss_engine, "num_gpus", lambda: 1)
    monkeypatch.setattr(faiss_engine, "probe_gpu", lambda: "no kernel image is available")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {choose_engine().name, choose_engine().name} == {"torch-cpu"}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no kernel image" in caplog.text


def test_choose_engine_without_faiss_takes_torch(fresh_choice, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "hardmoe.neighbours.faiss_engine", None)
    monkeypatch.delattr(sys.modules["hardmoe.neighbours"], "faiss_engine")
    monkeypatch.setattr(engine_module, "_torch_sees_gpu", lambda: False)
    assert choose_engine().name == "torch-cpu"
    assert "faiss cannot be imported" in caplog.text


@pytest.mark.parametrize(
    ("code", "timeout", "reason"),
    [
        ("pass", 20.0, None),
        ("raise RuntimeError('no kernel image')", 20.0, "RuntimeError: no kernel image"),
        ("import os; os.abort()", 20.0, "the probe ended with code -6"),
        ("import signal; signal.pause()", 0.3, "the probe hung for 0.3 s"),
    ],
    ids=["works", "raises", "aborts", "hangs"],
)
def test_probe_gpu_survives_whatever_the_child_does(code, timeout, reason):
    assert probe_gpu(code, timeout) == reason


@pytest.mark.gpu
def test_assign_on_gpu_gives_the_same_bytes_as_on_cpu():
    generator = np.random.default_rng(0)
    centroids = generator.standard_normal((31, 192)).astype(np.float32)
    pairs = generator.integers(0, 31, (2, 20_000))
    features = (centroids[pairs[0]] + centroids[pairs[1]]) / np.float32(2)
    expected = assign(features, centroids, FaissEngine())
    gpu_engines = [TorchEngine("cuda")] + ([FaissEngine(gpu=True)] if probe_gpu() is None else [])
    for engine in gpu_engines:
        found = assign(features, centroids, engine)
        np.testing.assert_array_equal(found.primary_N, expected.primary_N)
        np.testing.assert_array_equal(found.second_N, expected.second_N)
        np.testing.assert_array_equal(found.squared_distance_N, expected.squared_distance_N)
