"""What waits for a slot: units of builds that are under way, and stages whose build would begin with such a unit.

There is one heap for each demand (so many CPUs, so many GPUs), so that a unit waiting for a GPU never holds up one that needs
none. Over all demands that have room, the most costly entry comes first. Rejected: one queue for everything, whose head
blocks what stands behind it, and first come first served, whose end is spent waiting for the one long expert.
"""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from hardmoe.execution.task import UnitTask
from hardmoe.stage import Resources, Stage


@dataclass(order=True)
class _Entry:
    """Most costly first, then in the order of arrival."""

    rank: tuple[float, int]
    item: UnitTask | Stage = field(compare=False)


class WorkQueue:
    """Tasks, and stages yet to begin, by demand and cost."""

    def __init__(self) -> None:
        self._heaps: dict[Resources, list[_Entry]] = {}
        self._order = itertools.count()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, item: UnitTask | Stage, cost: float) -> None:
        """Add a task; or a stage, with the cost of its longest unit."""
        demand = item.resources if isinstance(item, Stage) else item.stage.resources
        heapq.heappush(self._heaps.setdefault(demand, []), _Entry((-cost, next(self._order)), item))
        self._size += 1

    def pop(self, has_room: Callable[[Resources], bool]) -> UnitTask | Stage | None:
        """The most costly entry of all demands that have room; None if no entry's demand has."""
        open_heaps = [heap for demand, heap in self._heaps.items() if heap and has_room(demand)]
        if not open_heaps:
            return None
        self._size -= 1
        return heapq.heappop(min(open_heaps, key=lambda heap: heap[0])).item
