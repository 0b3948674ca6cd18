"""What waits for a slot: units of builds that are under way, and stages whose build would begin with such a unit.

There is one heap for each demand (so many CPUs, so many GPUs), so that a unit waiting for a GPU never holds up one that needs
none. Over all demands that have room, the entry with the longest chain of stages behind it comes first, and of equal ones the
most costly: the router's small units before a control's experts, or the mixture's experts wait for both. Rejected: one queue
for everything, whose head blocks what stands behind it, and first come first served, whose end is spent waiting for the one
long expert.
"""

import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hardmoe.execution.task import UnitTask
from hardmoe.stage import Resources, Stage


@dataclass(order=True)
class _Entry:
    """Longest chain first, then most costly, then in the order of arrival."""

    rank: tuple[int, float, int]
    item: UnitTask | Stage = field(compare=False)


class WorkQueue:
    """Tasks, and stages yet to begin, by demand, chain and cost.

    Args:
        heights: by a stage's name, how many stages the longest chain from it on has (`Plan.heights`).
    """

    def __init__(self, heights: Mapping[str, int] | None = None) -> None:
        self._heights = heights or {}
        self._heaps: dict[Resources, list[_Entry]] = {}
        self._order = itertools.count()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, item: UnitTask | Stage, cost: float) -> None:
        """Add a task; or a stage, with the cost of its longest unit."""
        stage = item if isinstance(item, Stage) else item.stage
        rank = (-self._heights.get(stage.name, 0), -cost, next(self._order))
        heapq.heappush(self._heaps.setdefault(stage.resources, []), _Entry(rank, item))
        self._size += 1

    def pop(self, has_room: Callable[[Resources], bool]) -> UnitTask | Stage | None:
        """The first entry of all demands that have room; None if no entry's demand has."""
        open_heaps = [heap for demand, heap in self._heaps.items() if heap and has_room(demand)]
        if not open_heaps:
            return None
        self._size -= 1
        return heapq.heappop(min(open_heaps, key=lambda heap: heap[0])).item
