"""A node that Ray drains: its unit makes room in time, and goes on on another node. A real cluster of two nodes."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from counting import Control, Run, counting
from ray._private.state import state
from ray.cluster_utils import Cluster

from hardmoe.execution.ray.backend import RayBackend
from hardmoe.execution.runner import RunnerOptions
from hardmoe.stage import Resources

PREEMPTION = 2
"""Ray's number of that reason; a drain for idleness would be refused while a unit runs."""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here}{os.pathsep}{here.parents[1]}")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    ray.shutdown()
    made.shutdown()


def test_unit_on_a_drained_node_makes_room_and_goes_on_elsewhere(root: Path, control: Control, cluster: Cluster) -> None:
    nodes = [cluster.add_node(num_cpus=1, include_dashboard=False) for _ in range(2)]
    control.order("room", "square-2")
    backend = RayBackend(cluster.address)
    backend.prepare([Resources()])
    run = Run(root, [counting(numbers=(2,), control=control.directory)], RunnerOptions(attempts=1), backend)
    seen: list[Any] = []

    def drain() -> None:
        deadline = time.monotonic() + 120
        while not list(control.directory.glob("at-square-2-*")):  # type: ignore[union-attr]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (place,) = control.directory.glob("at-square-2-*")  # type: ignore[union-attr]
        node = place.name.rpartition("-")[2]
        assert node in {each.node_id for each in nodes}
        client = ray._raylet.GcsClient(address=cluster.address)
        accepted, reason = client.drain_node(node, PREEMPTION, "spot", int((time.time() + 60) * 1000))
        seen.append((accepted, reason, node in state.get_draining_nodes()))

    thread = threading.Thread(target=drain)
    thread.start()
    plan = run.run()
    thread.join(60)
    assert seen == [(True, "", True)]
    assert plan.artifacts["count"].payload == {"total": 4}
    assert "count/2: pre-empted, as its node is being drained, at step 1 of 2; going on from there" in run.display.lines
    assert len({path.name for path in control.directory.glob("at-square-2-*")}) == 2  # type: ignore[union-attr]
