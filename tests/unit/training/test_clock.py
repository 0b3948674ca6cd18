"""Where a training's time goes."""

import time

import pytest

from hardmoe.training.clock import Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be moved by hand."""
    at = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: at[0])
    return at


def test_time_is_counted_once_and_for_the_innermost_purpose(now: list[float]) -> None:
    clock = Clock()
    with clock.spent("computing"):
        now[0] += 6
        with clock.spent("validating"):
            now[0] += 2
        with clock.spent("saving"):
            now[0] += 1
    now[0] += 1
    assert clock.seconds == 10
    assert [clock.share(purpose) for purpose in ("computing", "validating", "saving", "reading")] == [0.6, 0.2, 0.1, 0.0]
    assert clock.describe() == "60 % computing, 20 % validating, 10 % saving"


def test_waiting_for_items_is_reading_and_working_on_them_is_not(now: list[float]) -> None:
    def slow() -> object:
        for item in range(3):
            now[0] += 1
            yield item
        now[0] += 1

    clock = Clock()
    for _ in clock.reading(slow()):
        now[0] += 4
    assert clock.seconds == 16
    assert clock.share("reading") == 0.25


def test_an_error_within_a_block_is_counted_too(now: list[float]) -> None:
    clock = Clock()
    with pytest.raises(LookupError), clock.spent("reading"):
        now[0] += 3
        raise LookupError
    assert clock.share("reading") == 1.0
