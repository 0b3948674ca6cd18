"""Where a training's time goes: into the network, or into what it waits for.

The share that is spent computing is the training's speed over that of a bare loop, the same steps on batches that are there
already: what any faster reading, validating or saving could gain at most. On a GPU, steps are queued and their time is spent
where the training next waits for the device, which is when it fetches losses; that counts as computing too.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

Purpose = Literal["computing", "reading", "validating", "saving"]
ItemT = TypeVar("ItemT")


class Clock:
    """Seconds by what they were spent on, since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._spent: dict[str, float] = {}
        self._inner = 0.0

    @contextmanager
    def spent(self, purpose: Purpose) -> Iterator[None]:
        """Count the block's time for a purpose, without what blocks within it count for theirs."""
        began, outer, self._inner = time.monotonic(), self._inner, 0.0
        try:
            yield
        finally:
            taken = time.monotonic() - began
            self._spent[purpose] = self._spent.get(purpose, 0.0) + taken - self._inner
            self._inner = outer + taken

    def reading(self, items: Iterable[ItemT]) -> Iterator[ItemT]:
        """The items; the time that each takes to come is spent reading."""
        source = iter(items)
        while True:
            with self.spent("reading"):
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item

    @property
    def seconds(self) -> float:
        """All that has passed."""
        return time.monotonic() - self._began

    def share(self, purpose: Purpose) -> float:
        """Of all that has passed, 0 to 1."""
        return self._spent.get(purpose, 0.0) / max(self.seconds, 1e-9)

    def describe(self) -> str:
        """`96 % computing, 2 % reading, 1 % validating, 1 % saving`; what rounds to nothing is left out."""
        shares = {purpose: round(100 * seconds / max(self.seconds, 1e-9)) for purpose, seconds in self._spent.items()}
        ordered = sorted(shares.items(), key=lambda item: -item[1])
        return ", ".join(f"{share} % {purpose}" for purpose, share in ordered if share)
