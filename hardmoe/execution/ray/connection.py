"""Joining a running Ray cluster, or saying in one sentence why that is not possible.

Ray itself waits minutes for a head node that is not there, and tells a version or token that does not fit in a paragraph.
"""

import os
import socket
from pathlib import Path
from typing import Any

from hardmoe.errors import BackendError

CONNECT_SECONDS = 5.0
TOKEN_REMEDY = "set RAY_AUTH_TOKEN to the cluster's, which its head keeps in ~/.ray/auth_token, and RAY_AUTH_MODE=token"
_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_MOST_OF_A_GROUP = 1024
_OWN_REMEDY = (
    "run it again when the machine is less busy, or do without Ray (--backend inline; of 'hardmoe serve', without --replicas)"
)
_OBJECT_STORE_BYTES = 128 * 2**20


def prepare_environment(joins: bool) -> None:
    """What Ray reads from the environment at its import.

    Args:
        joins: a cluster that runs already. `ray start` has such a one ask for a token, which it keeps in the home directory, but
            `ray.init` sends it only to whom the mode is set. A cluster without tokens does not mind one.
    """
    if joins and (any(os.environ.get(name) for name in _TOKENS) or (Path.home() / ".ray" / "auth_token").exists()):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Keep CUDA visible as it is for CPU-only units: Ray otherwise warns of a coming change of its default at every start.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def init(address: str, options: dict[str, Any]) -> None:
    """`ray.init`, with every refusal as one sentence.

    Raises:
        BackendError: there is no Ray, or it does not let this driver in.
    """
    if address != "local":
        check_reachable(address)
    prepare_environment(joins=address != "local")
    import ray

    try:
        if "/" not in address and address.rpartition(":")[2].isdecimal():
            # Asks for the cluster's id: `ray.init` takes half a minute to find out that a token is wrong, and does not say so.
            ray._raylet.GcsClient(address=address)
        ray.init(address=address, **options)
    except ray.exceptions.AuthenticationError as error:
        raise BackendError(f"the Ray cluster at '{address}' refuses this driver's token; {TOKEN_REMEDY}") from error
    except Exception as error:  # Ray raises bare ones as well, as where its processes are late on a busy machine
        remedy = _OWN_REMEDY if address == "local" else "check execution.address"
        raise BackendError(f"cannot start or reach Ray at '{address}': {reason(error).rstrip('.')}; {remedy}") from error
    except SystemExit as end:
        # Ray's own answer to a SIGTERM while it starts. Ours lets the run release its leases.
        raise KeyboardInterrupt from end


def own_ray(num_cpus: int, directory: Path) -> dict[str, Any]:
    """Options of `init` for a Ray of our own on this machine.

    Args:
        num_cpus: at least so many CPUs, whether the machine has them or not.
        directory: where it keeps its sockets and logs.
    """
    return {
        "num_cpus": max(os.cpu_count() or 1, num_cpus),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_temp_dir": str(directory),
    }


def living_nodes() -> list[dict[str, float]]:
    """Resources of the nodes of the cluster that was joined."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def possible_nodes() -> list[dict[str, float]]:
    """Resources of all nodes that the cluster's autoscaler may have at a time; none where there is no autoscaler.

    The configuration is no part of Ray's public interface. Seen with Ray 2.60, which `requirements.lock` pins.
    """
    from ray._private.state import state

    config = state.get_cluster_config()
    groups = [] if config is None else list(config.node_group_configs)
    nodes = [dict(group.resources) for group in groups for _ in range(min(group.max_count, _MOST_OF_A_GROUP))]
    heads = [node for node in living_nodes() if "node:__internal_head__" in node] if nodes else []
    return heads + nodes


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # A heading ends with a colon and says nothing without what follows.
    return " ".join(lines) if lines[0].endswith(":") else lines[0]


def check_reachable(address: str) -> None:
    """Knock at the door: Ray itself waits several minutes for a head node that is not there.

    Raises:
        BackendError: nobody answers.
    """
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address or not port.isdecimal():
        return  # `auto`, or a form that Ray knows about and answers at once
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS):
            return
    except (OSError, OverflowError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise BackendError(
            f"no Ray answers at '{address}' ({problem}); correct execution.address (the head node's host:6379), "
            "or use 'local' for a Ray of this machine"
        ) from error
