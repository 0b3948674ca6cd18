"""A store that does not answer: told on stderr after a few seconds, and not only when the last attempt has failed.

An operation may wait a minute for a store that is down, and somebody who looks at a silent terminal for so long takes it for
a hang. A thread that lives only while operations are under way looks at how long each has heard nothing. Rejected: shorter
timeouts, which fail what is merely slow, and telling it at the first failed attempt, which a silent server puts off for half a
minute.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

SILENT_SECONDS = 5.0
"""So long nothing is said of a store that says nothing."""
_LOOKS = 5
"""So many looks are taken within that time."""


@dataclass
class _Waiting:
    """An operation under way in a thread."""

    endpoint: str
    task: str
    since: float | None = None
    """When it last heard something, or began; None before its first request."""
    until: float = 0.0
    """When it will be given up, about."""


_waiting: dict[int, _Waiting] = {}
"""By thread."""
_told: set[str] = set()
_lock = threading.Lock()
_watcher: threading.Thread | None = None


@contextlib.contextmanager
def listened_for(endpoint: str, task: str) -> Iterator[None]:
    """Tell, once for a store and a process, if it says nothing while the block waits for its answers.

    Args:
        endpoint: the store's URL.
        task: what is being done, such as `read s3://bucket/run/recipe.yaml`.
    """
    thread = threading.get_ident()
    with _lock:
        outer = _waiting.get(thread)
        _waiting[thread] = _Waiting(endpoint, task)
        _watch()
    try:
        yield
    finally:
        with _lock:
            if outer is None:
                _waiting.pop(thread, None)
            else:
                _waiting[thread] = outer


def heard(patience_seconds: float) -> None:
    """The calling thread's operation heard something, or begins a request that is given up after so long a silence."""
    with _lock:
        if (waiting := _waiting.get(threading.get_ident())) is not None:
            waiting.since = time.monotonic()
            waiting.until = waiting.since + patience_seconds


def _watch() -> None:
    """Make sure that somebody looks; the lock is held."""
    global _watcher
    if _watcher is None:
        _watcher = threading.Thread(target=_look, name="silence of stores", daemon=True)
        _watcher.start()


def _look() -> None:
    global _watcher
    pause = threading.Event()
    while True:
        pause.wait(SILENT_SECONDS / _LOOKS)
        with _lock:
            lines = [line for waiting in _waiting.values() if (line := _line(waiting)) is not None]
            if not _waiting:
                _watcher = None
                return
        for line in lines:
            print(line, file=sys.stderr, flush=True)  # noqa: T201 - nothing above this layer knows of it


def _line(waiting: _Waiting) -> str | None:
    """What is to be said of an operation now, if anything."""
    now = time.monotonic()
    if waiting.since is None or now - waiting.since < SILENT_SECONDS or waiting.endpoint in _told:
        return None
    _told.add(waiting.endpoint)
    until = time.strftime("%H:%M:%S", time.localtime(time.time() + waiting.until - now))
    return f"{waiting.endpoint} does not answer yet (to {waiting.task}); hardmoe goes on trying until about {until}"


def _forget() -> None:
    """In a forked child: its one thread waits for nothing, and another of the parent's may have held the lock."""
    global _lock, _watcher
    _lock, _watcher = threading.Lock(), None
    _waiting.clear()


os.register_at_fork(after_in_child=_forget)
