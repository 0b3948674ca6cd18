"""Leases: at most one builder per artifact, on one machine or many, with nothing to clean up after a kill.

A lease is a small file with a random token, its holder (host, boot, process and its start time) and a counter that the
holder raises every few seconds. Taking over needs proof that the holder is gone: on the same boot of the same host the
process table says so at once; elsewhere the counter must stand still for the time-to-live on the *observer's* monotonic
clock, so clocks need not agree. Every change is compare-and-swap. Rejected: `flock`, which object stores do not have and
some network mounts pretend to have, and expiry by wall-clock time, which clock skew breaks.
"""

import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from hardmoe.errors import LeaseError, StorageError
from hardmoe.storage import Storage, join

LEASE_NAME = "_progress/lease.json"
TIME_TO_LIVE_SECONDS = 60.0
HEARTBEAT_SECONDS = 10.0


@dataclass(frozen=True)
class Holder:
    """Which process holds a lease."""

    host: str
    boot: str
    pid: int
    started: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_process() -> Holder:
    """The calling process as a holder."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    boot = boot_id.read_text().strip() if boot_id.exists() else str(psutil.boot_time())
    return Holder(socket.gethostname(), boot, os.getpid(), psutil.Process().create_time())


def is_dead(holder: Holder) -> bool:
    """Whether the holder certainly runs no more: same boot of the same host, and no such process."""
    here = this_process()
    if (holder.host, holder.boot) != (here.host, here.boot):
        return False
    try:
        process = psutil.Process(holder.pid)
        return bool(process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - holder.started) > 1.0)
    except psutil.NoSuchProcess:
        return True


@dataclass
class _Content:
    token: str
    beat: int
    holder: Holder

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self), sort_keys=True) + "\n").encode()


def _parse(data: bytes) -> _Content | None:
    try:
        body = json.loads(data)
        return _Content(body["token"], body["beat"], Holder(**body["holder"]))
    except (ValueError, KeyError, TypeError):
        return None


class Lease:
    """A lease that this process holds; a thread keeps it alive until `release`."""

    def __init__(self, storage: Storage, path: str, content: bytes, heartbeat: float) -> None:
        self._storage = storage
        self._path = path
        self._content = content
        self._heartbeat = heartbeat
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._lost = False
        self._thread = threading.Thread(target=self._beat, name=f"lease {path}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that the lease is still ours, by the file itself.

        Raises:
            LeaseError: another process took it over.
        """
        with self._lock:
            if not self._lost and self._storage.exists(self._path) and self._storage.read_bytes(self._path) == self._content:
                return
        raise LeaseError(
            f"{self._storage.uri}/{self._path} was taken over by another process while this one was silent; "
            "nothing was written, run the command again to continue beside it"
        )

    def release(self) -> None:
        """Stop the heartbeat and give the lease back, if it is still ours."""
        self._stop.set()
        self._thread.join()
        with self._lock:
            self._storage.replace(self._path, self._content, None)

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat):
            with self._lock:
                body = _parse(self._content)
                assert body is not None
                body.beat += 1
                try:
                    if self._storage.replace(self._path, self._content, body.to_bytes()):
                        self._content = body.to_bytes()
                    else:
                        self._lost = True
                        return
                except StorageError:
                    # A full disk or a hiccup of the mount: keep trying; if it lasts, `check` finds out whether we lost it.
                    continue


class LeaseObserver:
    """Tries to take leases, remembering how long each foreign one has stood still."""

    def __init__(
        self, storage: Storage, time_to_live: float = TIME_TO_LIVE_SECONDS, heartbeat: float = HEARTBEAT_SECONDS
    ) -> None:
        self._storage = storage
        self._time_to_live = time_to_live
        self._heartbeat = heartbeat
        self._seen: dict[str, tuple[bytes, float]] = {}

    def acquire(self, artifact: str) -> Lease | Holder:
        """Take the artifact's lease, or say who holds it; never waits."""
        path = join(artifact, LEASE_NAME)
        mine = _Content(secrets.token_hex(16), 0, this_process()).to_bytes()
        if self._storage.create(path, mine):
            return Lease(self._storage, path, mine, self._heartbeat)
        try:
            theirs = self._storage.read_bytes(path)
        except StorageError:
            # Released between the two calls: it counts as held until the next try.
            return this_process()
        content = _parse(theirs)
        gone = content is None or is_dead(content.holder) or self._expired(path, theirs)
        if gone and self._storage.replace(path, theirs, mine):
            return Lease(self._storage, path, mine, self._heartbeat)
        return content.holder if content is not None else this_process()

    def _expired(self, path: str, content: bytes) -> bool:
        """Whether this very content has been there for the time-to-live, on our own clock."""
        now = time.monotonic()
        seen, since = self._seen.get(path, (b"", now))
        if seen != content:
            self._seen[path] = (content, now)
            return False
        return now - since >= self._time_to_live


def lease_holder(storage: Storage, artifact: str) -> Holder | None:
    """Who holds an artifact's lease, for display; None if nobody does or the holder is known to be dead."""
    path = join(artifact, LEASE_NAME)
    if not storage.exists(path):
        return None
    content = _parse(storage.read_bytes(path))
    return content.holder if content is not None and not is_dead(content.holder) else None
