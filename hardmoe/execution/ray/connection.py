"""Joining a running Ray cluster, or saying in one sentence why that is not possible.

Ray itself waits minutes for a head node that is not there, and tells a version or token that does not fit in a paragraph.
"""

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

from hardmoe.errors import BackendError

CONNECT_SECONDS = 5.0
TOKEN_REMEDY = "set RAY_AUTH_TOKEN to the cluster's, which its head keeps in ~/.ray/auth_token, and RAY_AUTH_MODE=token"
_TOKEN_FILE = Path("~/.ray/auth_token")
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How gRPC, which Ray's head speaks, is greeted: HTTP/2's opening and settings of no content."""
_MOST_OF_A_GROUP = 1024
_OWN_REMEDY = (
    "run it again when the machine is less busy, or do without Ray (--backend inline; of 'hardmoe serve', without --replicas)"
)
_OBJECT_STORE_BYTES = 128 * 2**20


def prepare_environment(joins: bool) -> None:
    """What Ray reads from the environment at its import.

    Args:
        joins: a cluster that runs already. `ray start` has such a one ask for a token where its home directory holds one, but
            `ray.init` sends it only to whom the mode is set. A cluster without tokens does not mind one.

    Raises:
        BackendError: there should be a token, and there is none or none that can be sent; Ray would end this process over it.
    """
    if joins:
        place, token, problem = _token()
        stated = place != str(_TOKEN_FILE)
        if token or stated:
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        if problem and os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
            raise BackendError(f"the token for a Ray cluster, in {place}, {problem}; {TOKEN_REMEDY}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Keep CUDA visible as it is for CPU-only units: Ray otherwise warns of a coming change of its default at every start.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _token() -> tuple[str, bytes, str]:
    """Where Ray looks for a token, the token that is there, and what is wrong with it."""
    place, token = "RAY_AUTH_TOKEN", os.environ.get("RAY_AUTH_TOKEN", "").encode(errors="surrogateescape")
    if not token:
        place = os.environ.get("RAY_AUTH_TOKEN_PATH") or str(_TOKEN_FILE)
        try:
            token = Path(place).expanduser().read_bytes()
        except (OSError, RuntimeError) as error:
            return place, b"", f"cannot be read ({(getattr(error, 'strerror', None) or str(error)).lower()})"
    token = token.strip()
    if not token:
        return place, b"", "is empty"
    return place, token, "" if token.isascii() and token.decode().isprintable() else "has characters that no header can carry"


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
        if place := _place_of(address):
            # Asks for the cluster's id: `ray.init` takes half a minute to find out that a token is wrong, and does not say so.
            ray._raylet.GcsClient(address=place)
        ray.init(address=address, **options)
    except BackendError:
        raise
    except ray.exceptions.AuthenticationError as error:
        raise BackendError(f"the Ray cluster at '{address}' refuses this driver's token; {TOKEN_REMEDY}") from error
    except Exception as error:  # Ray raises bare ones as well, as where its processes are late on a busy machine
        remedy = _OWN_REMEDY if address == "local" else "check execution.address"
        raise BackendError(f"cannot start or reach Ray at '{address}': {reason(error).rstrip('.')}; {remedy}") from error
    except SystemExit as end:
        # Ray's own answer to a SIGTERM while it starts. Ours lets the run release its leases.
        raise KeyboardInterrupt from end


def _place_of(address: str) -> str | None:
    """The head's host and port, which `auto` means as well; None where Ray has none yet, or another way in."""
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address

        address = canonicalize_bootstrap_address(address)
        check_reachable(address)
    return address if "/" not in address and address.rpartition(":")[2].isdecimal() else None


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
    """Knock at the door: Ray itself waits several minutes for a head node that is not there, or that is something else.

    Raises:
        BackendError: nobody answers, or somebody who is no head node.
    """
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address or not port.isdecimal():
        return  # `auto`, or a form that Ray knows about and answers at once
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as door:
            answer = _answer(door)
    except (OSError, OverflowError) as error:
        raise _unreachable(address, getattr(error, "strerror", None) or str(error)) from error
    if answer[:1].isalpha():
        what = (
            "a web server does, such as the dashboard, which is for 'hardmoe submit'"
            if answer[:4] == b"HTTP"
            else "another service does"
        )
        raise _unreachable(address, what)


def _answer(door: socket.socket) -> bytes:
    """The first bytes of it. A head that is busy, or wants TLS, may be silent or hang up: that is Ray's to tell."""
    with contextlib.suppress(OSError):
        door.sendall(_GREETING)
        return door.recv(64)
    return b""


def _unreachable(address: str, problem: str) -> BackendError:
    return BackendError(
        f"no Ray answers at '{address}' ({problem}); correct execution.address (the head node's host:6379), "
        "or use 'local' for a Ray of this machine"
    )
