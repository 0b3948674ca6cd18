"""Ctrl-C and SIGTERM beside Ray: held back while Ray's own code runs, and raised right after it.

A KeyboardInterrupt is raised wherever the main thread happens to be. Inside Ray that may be a callback from C++, which
swallows it (seen: a run that went on to its end and exit code 0) or does not survive it (seen: a segmentation fault). No call
into Ray here takes long but the first one, and a second Ctrl-C breaks through. Rejected: a flag that the runner looks at now
and then, which leaves a driver that is busy in its own part, or in a unit of the inline backend, deaf for as long.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Let a signal of the block's time take effect at its end; handlers that the block installs are taken away again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if len(noted) > 1:
            signal.default_int_handler(number, frame)

    for number, handler in handlers.items():
        # What ends the process on the spot, or is ignored, stays as it is.
        if callable(handler):
            signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if noted:
            signal.default_int_handler(noted[0], None)
