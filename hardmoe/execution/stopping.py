"""How a run, or one unit, is asked to end at its next checkpoint: a request in the root, a SIGTERM, a node that is drained.

    _progress/stop.json      the newest request of `hardmoe stop`, with a random token

A request holds for every driver that was at work when it came. Drivers note at their start which request is there already,
and tell their units; whatever else they find later is a new one. So no clocks are compared, nobody needs to take the file
away, and the same few bytes work on an object store. Rejected: signals to the drivers, which may be on other machines, and
a time in the file, which a skewed clock would turn into a request that stops tomorrow's runs.

A unit that makes checkpoints asks after every step (`UnitContext.asked_to_stop`). One that never asks is ended by SIGTERM as
it always was, and by a request not at all: it is short, and its completion is its checkpoint.
"""

import json
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from hardmoe.artifacts.lease import this_process
from hardmoe.artifacts.provenance import now
from hardmoe.errors import StorageError
from hardmoe.storage import Storage, read_if_there

REQUEST_NAME = "_progress/stop.json"
POLL_SECONDS = 1.0
STOPPED = "stopped by 'hardmoe stop'"


def request_stop(storage: Storage) -> None:
    """Ask every driver that is at work in the root to end."""
    body = {"token": secrets.token_hex(16), "requested": now(), "host": this_process().host}
    storage.write_bytes(REQUEST_NAME, (json.dumps(body) + "\n").encode())


def present_request(storage: Storage) -> str:
    """The newest request in the root, empty if there never was one."""
    return (read_if_there(storage, REQUEST_NAME) or b"").decode(errors="replace")


class StopRequests:
    """Looks for a request other than the one that is known, every so often."""

    def __init__(self, storage: Storage, known: str) -> None:
        self.known = known
        self._storage = storage
        self._arrived = False
        self._next_look = 0.0

    def arrived(self, *, look_now: bool = False) -> bool:
        """Whether there is one; looks at most once a second unless it must be known now."""
        if not self._arrived and (look_now or time.monotonic() >= self._next_look):
            self._next_look = time.monotonic() + POLL_SECONDS
            try:
                self._arrived = present_request(self._storage) not in ("", self.known)
            except StorageError:
                # Nothing may depend on a file that is hardly ever there: the next look will tell.
                return False
        return self._arrived


class UnitStop:
    """Whether one running unit is to end at its next checkpoint, and why.

    Args:
        requests: of `hardmoe stop`.
        leaving: says why the machine is about to go, None if it is not; asked every second, beside the unit's work.
    """

    def __init__(self, requests: StopRequests, leaving: Callable[[], str | None] | None = None) -> None:
        self._requests = requests
        self._leaving = leaving
        self._reason: str | None = None
        self._watch: threading.Thread | None = None
        self._over = threading.Event()

    def reason(self) -> str | None:
        """Why to end, None to go on; costs nothing. The first call begins the watch, and says that the unit heeds it."""
        if self._watch is None:
            self._watch = threading.Thread(target=self._look, name="stop requests", daemon=True)
            self._watch.start()
        return self._reason

    @contextmanager
    def heeding(self) -> Iterator[None]:
        """While the unit runs: hold a SIGTERM back until it has ended, if it asks for reasons to; a second one breaks through.

        Only where the process has a handler: one that is ended on the spot, or ignores the signal, stays so.
        """
        previous = signal.getsignal(signal.SIGTERM) if threading.current_thread() is threading.main_thread() else None
        held = False

        def note(number: int, frame: FrameType | None) -> None:
            nonlocal held
            if held or self._watch is None:
                assert callable(previous)
                previous(number, frame)
            held, self._reason = True, "pre-empted by SIGTERM"

        if callable(previous):
            signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            self._over.set()
            if callable(previous):
                signal.signal(signal.SIGTERM, previous)
            if held and callable(previous):
                previous(signal.SIGTERM, None)

    def _look(self) -> None:
        while self._reason is None:
            if self._requests.arrived():
                self._reason = STOPPED
            elif (why := self._leaving and self._leaving()) is not None:
                self._reason = why
            elif self._over.wait(POLL_SECONDS):
                return
