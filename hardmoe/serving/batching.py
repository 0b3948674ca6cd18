"""What arrives while a batch is at work is the next batch.

Nobody waits for a batch to fill: an idle server answers at once, and a busy one has its batches filled by those who wait.
Rejected: waiting some milliseconds for company, which costs an idle server's only visitor that time, and Ray Serve's own
`@serve.batch`, which counts requests where images are what takes time, and computes on the loop that must answer health checks.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Waiting(Generic[Asked, Answer]):
    asked: Asked
    size: int
    future: "asyncio.Future[Answer]" = field(repr=False)


class Batches(Generic[Asked, Answer]):
    """See the module. Belongs to the event loop that it is first used in.

    Args:
        compute: answers of what was asked for together, in the same order; called in the worker, once at a time.
        worker: whose thread computes; several `Batches` may share one.
        most_images: in a batch; a request of more than that is a batch of its own.
    """

    def __init__(self, compute: Callable[[Sequence[Asked]], Sequence[Answer]], worker: Executor, most_images: int) -> None:
        self._compute, self._worker, self._most_images = compute, worker, most_images
        self._waiting: deque[_Waiting[Asked, Answer]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._began: float | None = None
        self.num_batches = 0
        """How many batches were computed."""

    @property
    def num_waiting(self) -> int:
        """Images whose batch has not begun."""
        return sum(each.size for each in self._waiting)

    def seconds_at_work(self) -> float:
        """For how long the batch at work has been so; 0 if there is none."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    async def __call__(self, asked: Asked, size: int) -> Answer:
        """The answer to what is asked, of so many images."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(asked, size, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        """Batch after batch until nobody waits."""
        while batch := self._next_batch():
            try:
                answers = await asyncio.get_running_loop().run_in_executor(self._worker, self._measured, batch)
            except Exception as error:  # noqa: BLE001 - whoever waits must be told, whatever it is
                for each in batch:
                    if not each.future.done():
                        each.future.set_exception(error)
                continue
            for each, answer in zip(batch, answers, strict=True):
                if not each.future.done():
                    each.future.set_result(answer)

    def _next_batch(self) -> list[_Waiting[Asked, Answer]]:
        """As many requests as fit, one at least; those whose sender is gone are left out."""
        batch: list[_Waiting[Asked, Answer]] = []
        images = 0
        while self._waiting and (not batch or images + self._waiting[0].size <= self._most_images):
            each = self._waiting.popleft()
            if not each.future.done():
                batch.append(each)
                images += each.size
        return batch

    def _measured(self, batch: Sequence[_Waiting[Asked, Answer]]) -> Sequence[Answer]:
        self.num_batches += 1
        self._began = time.monotonic()
        try:
            return self._compute([each.asked for each in batch])
        finally:
            self._began = None
