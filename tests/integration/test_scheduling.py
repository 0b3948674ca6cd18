"""Experts on GPUs that are only pretended, on a real cluster of unequal nodes: who runs where, when, and beside whom.

Ray counts `num_gpus` whether there are any; the units sleep and say which ones they were given.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from sleeping import sleep_through, worker_path

from hardmoe.config import Json
from hardmoe.errors import BackendError
from hardmoe.execution.ray.backend import RayBackend
from hardmoe.stage import Resources

NODES = (4, 3, 1)
"""GPUs of every node."""


@pytest.fixture(scope="module")
def backend() -> Iterator[RayBackend]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", worker_path())
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for gpus in NODES:
            cluster.add_node(num_cpus=2 * gpus, num_gpus=gpus, include_dashboard=False)
        made = RayBackend(cluster.address)
        yield made
        made.close()
        ray.shutdown()
        cluster.shutdown()


def most_at_once(ran: Sequence[Json]) -> int:
    """How many ran at the same time, at most."""
    events = sorted([(one["began"], 1) for one in ran] + [(one["ended"], -1) for one in ran])
    running, most = 0, 0
    for _, change in events:
        running += change
        most = max(most, running)
    return most


def most_on_a_gpu(ran: Sequence[Json]) -> int:
    """How many ran on the same GPU at the same time, at most."""
    gpus = {(one["node"], gpu) for one in ran for gpu in one["gpus"]}
    return max(most_at_once([one for one in ran if one["node"] == node and gpu in one["gpus"]]) for node, gpu in gpus)


def gpus_of_nodes(ran: Sequence[Json]) -> dict[str, set[int]]:
    """Which GPUs of every node were used."""
    used: dict[str, set[int]] = {}
    for one in ran:
        used.setdefault(one["node"], set()).update(one["gpus"])
    return used


def check_longest_first(ran: Sequence[Json], seconds: Sequence[float], slots: int) -> None:
    """The longest began first; of those that waited, none more than two turns before or after its own, as one waits in Ray."""
    begun = sorted(range(len(ran)), key=lambda index: ran[index]["began"])
    turns = sorted(range(len(ran)), key=lambda index: -seconds[index])
    assert set(begun[:slots]) == set(turns[:slots])
    assert all(abs(turns.index(index) - turn) <= 2 for turn, index in enumerate(begun) if turn >= slots)


@pytest.mark.slow
def test_thirty_two_experts_take_turns_on_eight_gpus(backend: RayBackend, tmp_path: Path) -> None:
    seconds = [0.5 + 0.05 * ((13 * index) % 32) for index in range(32)]
    ran = sleep_through(tmp_path, seconds, backend, resources=Resources(1, 1.0), parallel=32)
    assert most_at_once(ran) == sum(NODES)
    assert most_on_a_gpu(ran) == 1
    assert sorted(map(len, gpus_of_nodes(ran).values())) == sorted(NODES)
    assert all(one["use_gpu"] and len(one["gpus"]) == 1 for one in ran)
    check_longest_first(ran, seconds, sum(NODES))


@pytest.mark.slow
def test_parallel_bounds_experts_whatever_the_gpus(backend: RayBackend, tmp_path: Path) -> None:
    ran = sleep_through(tmp_path, [0.3] * 8, backend, resources=Resources(1, 1.0), parallel=3)
    assert most_at_once(ran) == 3


@pytest.mark.slow
def test_two_experts_of_half_a_gpu_share_one(backend: RayBackend, tmp_path: Path) -> None:
    ran = sleep_through(tmp_path, [0.2] * 20, backend, resources=Resources(1, 0.5), meeting=2 * sum(NODES))
    assert most_at_once(ran) == 2 * sum(NODES)
    assert most_on_a_gpu(ran) == 2
    assert all(one["use_gpu"] for one in ran)


@pytest.mark.slow
def test_experts_of_two_gpus_run_where_two_are_left(backend: RayBackend, tmp_path: Path) -> None:
    """Two fit on the node of four and one on that of three; none on the node of one."""
    ran = sleep_through(tmp_path, [0.7] * 9, backend, resources=Resources(1, 2.0))
    assert most_at_once(ran) == 3
    assert most_on_a_gpu(ran) == 1
    assert all(len(set(one["gpus"])) == 2 for one in ran)
    by_node = Counter(one["node"] for one in ran)
    assert len(by_node) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "words"), [(Resources(1, 5.0), "1 CPUs and 5 GPUs"), (Resources(9, 0.0), "9 CPUs and 0 GPUs")], ids=["gpus", "cpus"]
)
def test_what_no_node_has_is_refused_at_once(backend: RayBackend, tmp_path: Path, asked: Resources, words: str) -> None:
    began = time.monotonic()
    with pytest.raises(BackendError, match=f"asks for {words}, which no node .*8 CPUs and 4 GPUs.*lower num_threads or gpus"):
        sleep_through(tmp_path, [0.1] * 3, backend, resources=asked)
    assert time.monotonic() - began < 5.0
    assert list(tmp_path.rglob("artifact.json")) == []
