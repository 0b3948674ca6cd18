"""How many units fit on some nodes: the arithmetic that the Ray backend schedules by, and that `hardmoe plan` simulates with."""

import math
from collections.abc import Mapping, Sequence

from hardmoe.stage import Resources

QUEUED_AHEAD = 1
"""So many units more than fit are handed over, to bridge the gap between one's end and the next one's begin."""


class Slots:
    """The nodes of a cluster.

    Args:
        nodes: `CPU` and `GPU` of each.
        uses_gpus: whether a unit that takes a GPU where there are any takes one.
    """

    def __init__(self, nodes: Sequence[Mapping[str, float]], *, uses_gpus: bool) -> None:
        self._nodes = nodes
        self._uses_gpus = uses_gpus
        self._cpus = sum(node.get("CPU", 0.0) for node in nodes)
        self._fitting: dict[Resources, int] = {}

    def gpus(self, demand: Resources) -> float:
        """GPUs that a unit of this demand takes."""
        return demand.num_gpus if demand.num_gpus is not None else float(self._uses_gpus)

    def fitting(self, demand: Resources) -> int:
        """How many units of this demand fit when nothing else runs."""
        if demand not in self._fitting:
            self._fitting[demand] = self._count(demand)
        return self._fitting[demand]

    def _count(self, demand: Resources) -> int:
        gpus = self.gpus(demand)
        total = 0
        for node in self._nodes:
            by_gpu = node.get("GPU", 0.0) / gpus if gpus else math.inf
            total += int(min(node.get("CPU", 0.0) // demand.num_cpus, by_gpu))
        return total

    def has_room(self, demand: Resources, handed_over: Mapping[Resources, int]) -> bool:
        """As many of this demand as fit on the nodes, and of all together as there are CPUs; and one to follow the first done."""
        cpus = sum(other.num_cpus * count for other, count in handed_over.items())
        return handed_over.get(demand, 0) < self.fitting(demand) + QUEUED_AHEAD and cpus < self._cpus + QUEUED_AHEAD
