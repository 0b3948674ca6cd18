"""The nodes of a running Ray cluster, each asked for its facts at once, busy ones included.

A task is bound to each node and asks for no CPU, so it runs beside whatever runs there. Rejected: an actor per node, which
takes as long to start and must be stopped.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hardmoe.config import Json
from hardmoe.execution.ray.connection import init, reason

_SECONDS = 90.0
"""A node that has not answered by then is told as such; a worker's start and its import of torch take some ten."""
_CLOCK_LOOKS = 3


@dataclass(frozen=True)
class Node:
    """A living node and what it said."""

    name: str
    resources: Mapping[str, float]
    facts: Json | None
    problem: str = ""


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Be a driver of the cluster until the block ends.

    Raises:
        BackendError: there is none, or it does not let this driver in.
    """
    init(address, {"log_to_driver": False, "logging_level": logging.ERROR})
    import ray

    try:
        yield
    finally:
        ray.shutdown()


def ask_every_node(question: Callable[..., Json], *arguments: Any) -> list[Node]:
    """Run a function on every node, and look at its clock.

    Args:
        question: importable on the nodes; its dictionary is returned with `skew` and `object_store` beside.
        arguments: of the function.
    """
    import ray

    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            asked[_bound(question, node["NodeID"]).remote(*arguments)] = node
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_SECONDS)
    return [_answer(reference, node, reference in set(ready)) for reference, node in asked.items()]


def _bound(function: Callable[..., Any], node: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=there)


def _answer(reference: Any, node: Mapping[str, Any], is_ready: bool) -> Node:
    import ray

    name, resources = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})", node["Resources"]
    if not is_ready:
        return Node(name, resources, None, f"did not answer within {_SECONDS:g} s")
    try:
        facts = ray.get(reference)
    except ray.exceptions.RayError as error:
        missing = "No module named 'hardmoe'" in str(error)
        return Node(name, resources, None, "has no hardmoe" if missing else reason(error))
    more = {"skew": _skew(node["NodeID"]), "object_store": int(resources.get("object_store_memory", 0))}
    return Node(name, resources, {**facts, **more})


def _clock() -> float:
    return time.time()


def _skew(node: str) -> Json:
    """The node's clock less the driver's, from the fastest of a few exchanges; half of its duration is the error."""
    import ray

    best: tuple[float, float] | None = None
    for _ in range(_CLOCK_LOOKS):
        sent = time.time()
        there = ray.get(_bound(_clock, node).remote(), timeout=_SECONDS)
        received = time.time()
        error = (received - sent) / 2
        if best is None or error < best[1]:
            best = (there - (sent + received) / 2, error)
    assert best is not None
    return {"seconds": best[0], "error": best[1]}
