"""Units as Ray tasks, on a Ray of our own on this machine or on a cluster.

Ray distributes and nothing more: no objects travel but tasks and outcomes of a few kilobytes, Ray's own retries are off, and
what must survive is in the root. A worker or node that dies gives an infrastructure outcome, which the runner may retry.
Rejected: Ray Train for experts of one GPU (its controller, placement group and state calls cost more than a minute for each)
and Ray Workflows (removed from Ray after 2.47).
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hardmoe.errors import BackendError
from hardmoe.execution.measures import Measure
from hardmoe.execution.ray.connection import init, own_ray
from hardmoe.execution.ray.exporting import Exporter
from hardmoe.execution.ray.interrupts import interrupts_held_back
from hardmoe.execution.ray.scratch import make_scratch
from hardmoe.execution.slots import Slots
from hardmoe.execution.task import UnitOutcome, UnitTask
from hardmoe.stage import Resources

_LOOK_SECONDS = 5.0


class RayBackend:
    """See the module. `address` is `local` for a Ray of our own, or the address of a running cluster."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._running: dict[Any, UnitTask] = {}
        self._nodes: list[dict[str, float]] = []
        self._next_look = 0.0
        self._uses_gpus = False
        self._temporary: Path | None = None
        self._remote: Any = None
        self._exporter: Exporter | None = None

    def prepare(self, demands: Iterable[Resources]) -> None:
        """Start or join Ray, then hold every demand against every node."""
        demands = list(demands)
        if not self._nodes:
            with interrupts_held_back():
                self._start(max((demand.num_cpus for demand in demands), default=1))
        for demand in demands:
            if self._slots.fitting(demand) == 0:
                there = "; ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in self._nodes) or "no node"
                raise BackendError(
                    f"a unit asks for {demand.num_cpus} CPUs and {demand.num_gpus or 0:g} GPUs, which no node of the Ray cluster "
                    f"'{self._address}' has ({there}); lower num_threads or gpus in the recipe, or add a larger node"
                )

    def has_room(self, demand: Resources, handed_over: Mapping[Resources, int]) -> bool:
        """See `Slots.has_room`."""
        return self._slots.has_room(demand, handed_over)

    @property
    def _slots(self) -> Slots:
        return Slots(self._nodes, uses_gpus=self._uses_gpus)

    def submit(self, task: UnitTask) -> None:
        """Queue the task as a Ray task of its own."""
        gpus = self._slots.gpus(task.stage.resources)
        options = {"num_cpus": task.stage.resources.num_cpus, "num_gpus": gpus, "max_retries": 0, "name": task.label}
        with interrupts_held_back():
            self._running[self._remote.options(**options).remote(replace(task, use_gpu=gpus > 0))] = task

    def wait(self, timeout: float, meanwhile: Callable[[], None]) -> list[UnitOutcome]:
        """Outcomes that arrived, with a dead worker's told apart from a failed unit's."""
        import ray

        if not self._running:
            return []
        with interrupts_held_back():
            if time.monotonic() >= self._next_look:
                self._look_at_nodes()
            ready, _ = ray.wait(list(self._running), num_returns=1, timeout=timeout)
            if ready:
                ready, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
            return [self._outcome(reference) for reference in ready]

    def publish(self, measures: Mapping[Measure, float]) -> None:
        """Through Ray's exporter, which is one of Ray's own processes: nothing waits for it."""
        if not self._nodes:
            return
        with interrupts_held_back():
            if self._exporter is None:
                self._exporter = Exporter()
            self._exporter.publish(measures)

    def close(self) -> None:
        """Leave the cluster, or stop our own Ray and remove its files."""
        import ray

        self._running.clear()
        self._nodes, self._exporter = [], None
        with interrupts_held_back():
            ray.shutdown()
            if self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)
                self._temporary = None

    def _outcome(self, reference: Any) -> UnitOutcome:
        import ray

        task = self._running.pop(reference)
        try:
            outcome: UnitOutcome = ray.get(reference)
            return outcome
        except ray.exceptions.RayTaskError as error:
            return UnitOutcome(task, error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines()
            return UnitOutcome(task, infrastructure=f"{type(error).__name__}: {lines[0] if lines else 'no message'}")

    def _look_at_nodes(self) -> None:
        """The nodes there are, and those that an autoscaler would add: units must wait in Ray for it to see any demand."""
        from hardmoe.execution.ray.connection import living_nodes, possible_nodes

        self._next_look = time.monotonic() + _LOOK_SECONDS
        self._nodes = possible_nodes() or living_nodes()

    def _start(self, least_cpus: int) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._address == "local":
            self._temporary = make_scratch()
            options |= own_ray(least_cpus, self._temporary)
        init(self._address, options)
        import ray

        self._look_at_nodes()
        # Once and for all: units that began on GPUs must not go on without, because the last such node was just pre-empted.
        self._uses_gpus = any(node.get("GPU", 0.0) >= 1 for node in self._nodes)
        from hardmoe.execution.ray.draining import execute_heeding_drains

        # Made once: every new remote function is shipped to all workers again.
        self._remote = ray.remote(execute_heeding_drains)
