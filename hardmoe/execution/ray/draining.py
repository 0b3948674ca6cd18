"""Whether the node that a unit runs on is being drained: what an autoscaler does before it takes a machine away.

Ray tells nobody; it starts nothing new there and, past a deadline, the machine goes. A unit that asks gets the time in between.
`get_draining_nodes` is no part of Ray's public interface, and the only place where a process on a node can learn it (the
state API needs the dashboard, and `ray.nodes()` leaves it out). Seen with Ray 2.60, which `requirements.lock` pins.
"""

import ray
from ray._private.state import state

from hardmoe.execution.task import UnitOutcome, UnitTask
from hardmoe.execution.worker import execute_unit


def execute_heeding_drains(task: UnitTask) -> UnitOutcome:
    """Run a unit on a Ray worker; see `execute_unit`."""
    node = ray.get_runtime_context().get_node_id()

    def leaving() -> str | None:
        try:
            return "pre-empted, as its node is being drained," if node in state.get_draining_nodes() else None
        except (ray.exceptions.RayError, RuntimeError, OSError):
            # The head node does not answer: whether it ever will is not for a unit to find out.
            return None

    return execute_unit(task, leaving=leaving)
