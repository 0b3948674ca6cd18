"""The Triton kernel of a pass gives the CPU's bits, in Triton's interpreter; `test_device_gpu.py` runs it compiled."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from device_cases import assert_same_bits

from hardmoe.partitioning import device_kernel
from hardmoe.partitioning.device_tiles import DeviceCentroids

TESTS = Path(__file__).parents[2]


@pytest.mark.skipif(find_spec("triton") is None, reason="torch's builds for CPUs come without Triton")
def test_the_kernel_interpreted_gives_the_bits_of_the_cpu():
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(TESTS / "kernel_interpreted.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rows decided by the kernel" in done.stdout


@pytest.mark.parametrize(
    ("clusters", "dim", "magnitude", "suits"),
    [(32, 256, 1, True), (33, 256, 1, False), (512, 16, 1, True), (8, 96, 1, False), (8, 64, 1e7, False), (8, 64, 0, False)],
)
def test_the_kernel_is_for_some_sizes_and_magnitudes_on_gpus(clusters, dim, magnitude, suits):
    centroids = DeviceCentroids.of(np.full((clusters, dim), magnitude, np.float32), torch.device("cpu"))
    assert device_kernel.suits(centroids) == suits
    assert not device_kernel.works(torch.device("cpu"), clusters, dim, torch.float16)


@pytest.mark.parametrize("fault", ["raises", "rounds otherwise"])
def test_a_kernel_that_does_not_work_is_done_without_and_said(fault, monkeypatch, caplog):
    """Triton needs a C compiler at run time, which a machine with a GPU may lack."""

    def run(self, features):
        if fault == "raises":
            raise RuntimeError("no C compiler")
        wrong = torch.zeros(len(features), dtype=torch.float64)
        sums = torch.zeros((3, 16), dtype=torch.int64)
        return device_kernel.KernelPass(torch.zeros(len(features), dtype=torch.int32), wrong, sums, sums, sums, sums)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(device_kernel, "find_spec", lambda name: True)
    monkeypatch.setattr(device_kernel.Kernel, "run", run)
    device_kernel.works.cache_clear()
    features = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)
    assert_same_bits(features, features[:3] / np.float32(2), torch.device("cpu"))
    device_kernel.works.cache_clear()
    assert "no C compiler" in caplog.text if fault == "raises" else "bits are not the definition's" in caplog.text
