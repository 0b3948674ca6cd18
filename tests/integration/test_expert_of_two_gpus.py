"""An expert that is given two GPUs, which Ray only pretends: two processes on the CPU, on a real cluster, killed and resumed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import safetensors.torch
import torch
from ray.cluster_utils import Cluster
from support import PREPARATION, copied_run, payload, run_here
from test_preemption import Driver, Project, ray_worker

EXPERT = "experts/expert-0000"
TRAINING = ("--only", "expert-0000", "--set", "experts.epochs=3", "--set", "experts.checkpoint_every_steps=4")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2, "include_dashboard": False})
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_expert_of_two_gpus_is_the_expert_of_one(finished: Path, tmp_path: Path, cluster: Cluster) -> None:
    """In float32, after three epochs; the statistics of a batch are those of both shares, or it would be far off."""
    roots = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        roots.append(copied_run(finished, tmp_path / name, keep=PREPARATION))
        (roots[-1] / "recipe.yaml").unlink()
    run_here(tmp_path / "one", "train-experts", *TRAINING)
    two = Project(tmp_path / "two", roots[1])
    on_two = (*TRAINING, "--set", "experts.gpus=2", "--address", cluster.address)
    driver: Driver = two.start("train-experts", *on_two)
    driver.until(lambda: two.checkpoints())
    worker = ray_worker(EXPERT)
    assert worker is not None
    (helper,) = [child for child in worker.children() if any("spawn_main" in word for word in child.cmdline())]
    helper.kill()
    driver.ends(0)
    assert f"{EXPERT}: lost its worker (the process of device 2 of 2 died with exit code -9); trying again" in driver.said()
    log = (roots[1] / EXPERT / "_progress/logs/train.expert-0000.log").read_text()
    assert "every batch is divided among 2 devices" in log
    one, other = (safetensors.torch.load_file(root / EXPERT / "model.safetensors") for root in roots)
    assert payload(roots[0], EXPERT)["steps"] == payload(roots[1], EXPERT)["steps"] >= 10
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-2, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
