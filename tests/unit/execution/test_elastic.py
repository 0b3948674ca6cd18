"""A cluster that an autoscaler enlarges: nodes that are not there yet count, and so do those that came or went meanwhile.

The autoscaler is its configuration, a message of Ray's own as the head node keeps it. (Ray's pretended cloud begins with
`ray stop --force`, which ends every Ray on the machine.)
"""

from collections.abc import Mapping

import pytest
from ray._private.state import state
from ray.core.generated import autoscaler_pb2

from hardmoe.errors import BackendError
from hardmoe.execution.ray import backend as module
from hardmoe.execution.ray import connection
from hardmoe.execution.ray.backend import RayBackend
from hardmoe.stage import Resources

HEAD = {"CPU": 0.0, "node:__internal_head__": 1.0}


def configure(patch: pytest.MonkeyPatch, groups: Mapping[str, tuple[Mapping[str, int], int]]) -> None:
    """Let the cluster's autoscaler have these groups of nodes: resources and the most of each."""
    config = autoscaler_pb2.ClusterConfig()
    for name, (resources, most) in groups.items():
        config.node_group_configs.add(name=name, resources=resources, max_count=most)
    patch.setattr(state, "get_cluster_config", lambda: config)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> RayBackend:
    """A backend of a cluster that has only its head."""
    monkeypatch.setattr(connection, "living_nodes", lambda: [HEAD])
    monkeypatch.setattr(module, "init", lambda address, options: None)
    return RayBackend("10.0.0.1:6379")


def test_nodes_that_an_autoscaler_may_add_count(backend: RayBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that knew only the head refused every unit: a cluster of spot machines begins with none of them."""
    configure(monkeypatch, {"spot": ({"CPU": 8, "GPU": 1}, 3), "cpu": ({"CPU": 16}, 1)})
    with pytest.raises(BackendError, match="2 GPUs, which no node"):
        backend.prepare([Resources(1, 2.0)])
    training = Resources(1, None)
    backend.prepare([training])
    assert backend.has_room(training, {training: 3}) and not backend.has_room(training, {training: 4})
    wide = Resources(16, 0.0)
    assert backend.has_room(wide, {wide: 1}) and not backend.has_room(wide, {wide: 2})


def test_group_without_a_limit_is_no_list_without_an_end(backend: RayBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, {"spot": ({"CPU": 8}, 2**31 - 1)})
    assert 1000 < len(connection.possible_nodes()) < 2000


@pytest.mark.parametrize("config", [None, autoscaler_pb2.ClusterConfig()], ids=["none", "empty"])
def test_without_an_autoscaler_only_living_nodes_count(
    backend: RayBackend, monkeypatch: pytest.MonkeyPatch, config: autoscaler_pb2.ClusterConfig | None
) -> None:
    monkeypatch.setattr(state, "get_cluster_config", lambda: config)
    with pytest.raises(BackendError, match="no node"):
        backend.prepare([Resources()])


def test_node_that_came_makes_room_and_gpus_that_went_do_not_send_units_to_cpus(
    backend: RayBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "get_cluster_config", lambda: None)
    monkeypatch.setattr(connection, "living_nodes", lambda: [HEAD, {"CPU": 4.0, "GPU": 1.0}])
    training = Resources(1, None)
    backend.prepare([training])
    assert not backend.has_room(training, {training: 2})
    monkeypatch.setattr(connection, "living_nodes", lambda: [HEAD, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 2.0}])
    backend._look_at_nodes()
    assert backend.has_room(training, {training: 3}) and not backend.has_room(training, {training: 4})
    monkeypatch.setattr(connection, "living_nodes", lambda: [HEAD, {"CPU": 4.0}])
    backend._look_at_nodes()
    assert backend._slots.gpus(training) == 1.0 and not backend.has_room(training, {training: 1})
