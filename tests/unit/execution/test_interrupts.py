"""Signals while Ray's code runs: held back to its end, never lost, and a second one breaks through."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from hardmoe.execution.ray.interrupts import interrupts_held_back


@pytest.fixture(autouse=True)
def _as_on_the_command_line() -> Iterator[None]:
    """SIGTERM is an interruption like Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signal_takes_effect_at_the_end_of_the_block(number: int) -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), interrupts_held_back():
        send(number)
        reached = True
    assert reached
    with pytest.raises(KeyboardInterrupt):
        send(number)


def test_second_signal_breaks_through() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), interrupts_held_back():
        send(signal.SIGINT)
        send(signal.SIGINT)
        reached = True
    assert not reached


def test_signal_is_not_lost_where_the_block_fails() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_held_back():
        send(signal.SIGTERM)
        raise ValueError


def test_handler_that_the_block_installs_is_taken_away_again() -> None:
    """Ray's handler of SIGTERM exits on the spot with code 15, which kept leases and files."""
    with interrupts_held_back():
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(15))
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler


def test_ignored_signal_stays_ignored() -> None:
    """As under `nohup`, or in a background job of a shell without job control."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts_held_back():
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_block_in_another_thread_leaves_signals_alone() -> None:
    done: list[bool] = []

    def work() -> None:
        with interrupts_held_back():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
