"""`serving.batching`: what waits goes together, what failed is told to those concerned, what hangs is seen."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from hardmoe.serving import replicas
from hardmoe.serving.batching import Batches


class Held:
    """A worker's function that waits to be let on, and notes what came together."""

    def __init__(self) -> None:
        self.let_on, self.begun = threading.Event(), threading.Event()
        self.together: list[list[int]] = []

    def __call__(self, asked: Sequence[int]) -> list[int]:
        self.together.append(list(asked))
        self.begun.set()
        assert self.let_on.wait(60)
        if 13 in asked:
            raise ValueError("thirteen")
        return [-each for each in asked]


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 60)


def ask_while_the_first_is_at_work(asked: Sequence[tuple[int, int]], most_images: int, gone: int | None = None) -> Held:
    """(what, images) each; the first alone, the others while it is at work."""
    held = Held()

    async def main() -> list[int | BaseException]:
        with ThreadPoolExecutor(1) as worker:
            batches = Batches(held, worker, most_images)
            tasks = [asyncio.create_task(batches(*asked[0]))]
            await until(held.begun)
            tasks += [asyncio.create_task(batches(*each)) for each in asked[1:]]
            await asyncio.sleep(0)
            assert batches.num_waiting == sum(size for _, size in asked[1:]) and batches.seconds_at_work() > 0
            if gone is not None:
                tasks[gone].cancel()
            held.let_on.set()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            assert batches.num_waiting == 0 and batches.seconds_at_work() == 0
            return answers

    answers = asyncio.run(main())
    for at, ((what, _), answer) in enumerate(zip(asked, answers, strict=True)):
        if at == gone:
            assert isinstance(answer, asyncio.CancelledError)
        elif any(13 in batch and what in batch for batch in held.together):
            assert isinstance(answer, ValueError)
        else:
            assert answer == -what
    return held


def test_what_waits_goes_together_as_far_as_it_fits() -> None:
    held = ask_while_the_first_is_at_work([(1, 1), (2, 2), (3, 2), (4, 1), (5, 9), (6, 1)], most_images=4)
    assert held.together == [[1], [2, 3], [4], [5], [6]]


def test_failure_is_told_to_its_batch_and_the_next_one_goes_on() -> None:
    held = ask_while_the_first_is_at_work([(1, 1), (13, 1), (2, 1), (3, 2)], most_images=2)
    assert held.together == [[1], [13, 2], [3]]


def test_what_nobody_waits_for_any_more_is_left_out() -> None:
    held = ask_while_the_first_is_at_work([(1, 1), (2, 1), (3, 1)], most_images=4, gone=1)
    assert held.together == [[1], [3]]


def test_batch_that_does_not_end_is_an_illness(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held()

    async def main() -> None:
        with ThreadPoolExecutor(1) as worker:
            batches = Batches(held, worker, 4)
            replicas.check_at_work([batches])
            task = asyncio.create_task(batches(1, 1))
            await until(held.begun)
            replicas.check_at_work([batches])
            monkeypatch.setattr(replicas, "SECONDS_OF_A_BATCH", 0.0)
            with pytest.raises(replicas.HangingError):
                replicas.check_at_work([batches])
            held.let_on.set()
            await task

    asyncio.run(main())
