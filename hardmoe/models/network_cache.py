"""Networks in memory: loaded when they are first wanted, the least recently used evicted when they would be too many.

A mixture has more experts than memory may hold, and asks for few of them at a time. Rejected: `functools.lru_cache`, which counts
entries where memory is what is scarce; weights mapped from their files, which an object store has none of.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def num_bytes(network: nn.Module) -> int:
    """What a network's parameters and buffers take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))


class NetworkCache(Generic[Network]):
    """See the module; may be used by several threads.

    Args:
        load: makes the network of a number.
        most_bytes: what all networks together may take, but that the one just asked for always stays; None for no limit.
    """

    def __init__(self, load: Callable[[int], Network], most_bytes: int | None = None) -> None:
        self._load = load
        self._most_bytes = most_bytes
        self._held: OrderedDict[int, tuple[Network, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.num_loads = 0
        """How often a network was loaded."""

    def get(self, number: int) -> Network:
        """The network of that number."""
        with self._lock:
            if number not in self._held:
                network = self._load(number)
                self.num_loads += 1
                self._held[number] = (network, num_bytes(network))
            self._held.move_to_end(number)
            while self._most_bytes is not None and len(self._held) > 1 and self.held_bytes > self._most_bytes:
                self._held.popitem(last=False)
            return self._held[number][0]

    @property
    def numbers(self) -> list[int]:
        """The numbers of the networks that are held, the least recently used first."""
        return list(self._held)

    @property
    def held_bytes(self) -> int:
        """What the networks that are held take together."""
        return sum(size for _, size in self._held.values())
