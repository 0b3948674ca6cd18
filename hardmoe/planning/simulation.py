"""The scheduler without the work: the runner's own frontier, queue and slots, on a clock that jumps from one end to the next.

What differs from a run is only that units do not compute. Phases of very many equal units are simulated as fewer, longer ones,
never so few that a slot's last one weighs. Rejected: dividing the work by the slots, which knows nothing of the one long expert
at the end, nor of stages that wait for each other.
"""

import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hardmoe.execution.frontier import Frontier
from hardmoe.execution.plan import Plan
from hardmoe.execution.queue import WorkQueue
from hardmoe.execution.slots import Slots
from hardmoe.execution.task import UnitTask
from hardmoe.stage import Resources, Stage, Unit

_LEAST_SIMULATED = 256
_PER_SLOT = 4
"""Units of a phase are merged until so many are left for each slot: a whole number, so that no slot has one more than others."""


@dataclass(frozen=True)
class PhaseWork:
    """Equal units that may run at the same time."""

    name: str
    units: int
    seconds: float
    """Of one unit."""


@dataclass
class Span:
    """When a stage ran, in seconds from the begin of the run, and how long its units together."""

    begin: float = math.inf
    end: float = 0.0
    busy: float = 0.0


@dataclass
class _Node:
    cpus: float
    gpus: float


@dataclass(order=True)
class _End:
    time: float
    order: int
    task: UnitTask = field(compare=False)
    node: _Node = field(compare=False)


class Simulation:
    """One run; see the module.

    Args:
        stages: inputs before what stands on them.
        work: phases of each stage, by its name.
        nodes: `CPU` and `GPU` of each node.
        parallel: at most so many units at a time; None for as many as fit.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        work: Mapping[str, Sequence[PhaseWork]],
        nodes: Sequence[Mapping[str, float]],
        parallel: int | None = None,
    ) -> None:
        uses_gpus = any(node.get("GPU", 0.0) >= 1 for node in nodes)
        self._slots = Slots(nodes, uses_gpus=uses_gpus)
        self._nodes = [_Node(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes]
        self._parallel = parallel
        self._frontier = Frontier(stages, ())
        self._queue = WorkQueue(Plan(stages, {}, {}).heights())
        self._phases = {stage.name: deque(self._merged(stage, phase) for phase in work[stage.name]) for stage in stages}
        self._left: Counter[str] = Counter()
        self._handed: Counter[Resources] = Counter()
        self._waiting: deque[UnitTask] = deque()
        self._running: list[_End] = []
        self._order = itertools.count()
        self._now = 0.0
        self.spans = {stage.name: Span() for stage in stages}

    def run(self) -> float:
        """Seconds from begin to end; `spans` then says when each stage ran."""
        while self._frontier.open:
            for stage in list(self._frontier.ready):
                self._frontier.begin(stage)
                self._next_phase(stage)
            self._hand_over()
            self._place()
            if self._running:
                self._advance()
            elif self._frontier.open and not self._frontier.ready:
                raise AssertionError("nothing runs, and nothing can begin")
        return self._now

    def _merged(self, stage: Stage, phase: PhaseWork) -> PhaseWork:
        """Fewer and longer units with the same work together."""
        slots = max(1, self._slots.fitting(stage.resources))
        most = slots * max(_PER_SLOT, _LEAST_SIMULATED // slots)
        if phase.units <= most:
            return phase
        return PhaseWork(phase.name, most, phase.seconds * phase.units / most)

    def _next_phase(self, stage: Stage) -> None:
        while self._phases[stage.name]:
            phase = self._phases[stage.name].popleft()
            self._left[stage.name] = phase.units
            for number in range(phase.units):
                self._queue.push(UnitTask("", stage, "", phase.name, Unit(f"{number}", cost=phase.seconds)), phase.seconds)
            if phase.units:
                return
        span = self.spans[stage.name]
        span.begin, span.end = min(span.begin, self._now), self._now
        self._frontier.finish(stage)

    def _hand_over(self) -> None:
        while (item := self._queue.pop(self._has_room)) is not None:
            assert isinstance(item, UnitTask)
            self._handed[item.stage.resources] += 1
            self._waiting.append(item)

    def _has_room(self, demand: Resources) -> bool:
        total = self._handed.total()
        return total < (self._parallel or total + 1) and self._slots.has_room(demand, self._handed)

    def _place(self) -> None:
        """As Ray does: the first that waits for which some node is free enough, and so on."""
        for task in tuple(self._waiting):
            demand = task.stage.resources
            cpus, gpus = demand.num_cpus, self._slots.gpus(demand)
            node = next((node for node in self._nodes if node.cpus >= cpus and node.gpus >= gpus), None)
            if node is None:
                continue
            self._waiting.remove(task)
            node.cpus, node.gpus = node.cpus - cpus, node.gpus - gpus
            span = self.spans[task.stage.name]
            span.begin, span.busy = min(span.begin, self._now), span.busy + task.unit.cost
            heapq.heappush(self._running, _End(self._now + task.unit.cost, next(self._order), task, node))

    def _advance(self) -> None:
        """To the next end, and all others at the same moment."""
        self._now = self._running[0].time
        while self._running and self._running[0].time <= self._now:
            end = heapq.heappop(self._running)
            demand = end.task.stage.resources
            end.node.cpus, end.node.gpus = end.node.cpus + demand.num_cpus, end.node.gpus + self._slots.gpus(demand)
            self._handed[demand] -= 1
            self._left[end.task.stage.name] -= 1
            if not self._left[end.task.stage.name]:
                self._next_phase(end.task.stage)
