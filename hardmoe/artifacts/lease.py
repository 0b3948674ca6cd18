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
from hardmoe.storage import Storage, join, read_if_there

LEASE_NAME = "_progress/lease.json"
TIME_TO_LIVE_SECONDS = 60.0
HEARTBEAT_SECONDS = 10.0


@dataclass(frozen=True)
class Holder:
    """Which process holds a lease."""

    host: str
    boot: str
    """One boot of one machine, and one process table on it: containers share the former and not the latter."""
    pid: int
    started: float
    """Start of the process on a clock of the boot's own; tells a process from a later one with the same number."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "an unknown process (its lease cannot be read)"


_UNKNOWN = Holder("", "", 0, 0.0)


def this_process() -> Holder:
    """The calling process as a holder."""
    process = _process(os.getpid())
    assert process is not None
    return Holder(socket.gethostname(), _boot(), os.getpid(), process.started)


def is_dead(holder: Holder) -> bool:
    """Whether the holder certainly runs no more: same boot of the same host, and no such process."""
    if (holder.host, holder.boot) != (socket.gethostname(), _boot()):
        return False
    process = _process(holder.pid)
    if process is None:
        return not _is_hidden(holder.pid)
    return process.zombie or process.started != holder.started


@dataclass(frozen=True)
class _Process:
    started: float
    zombie: bool


def _boot() -> str:
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot_id} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return str(psutil.boot_time())


def _process(pid: int) -> _Process | None:
    """What the process table says; None if there is no such process.

    Linux is asked itself: psutil adds the boot's wall-clock time to the start, and that moves with every correction of the
    clock, so that a living holder would look like a later process of the same number.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return _process_elsewhere(pid) if not Path("/proc/self/stat").exists() else None
    except ProcessLookupError:
        return None
    # The name, in parentheses, may hold spaces and parentheses; state is the first field after it, start time the 20th.
    fields = stat.rpartition(")")[2].split()
    return _Process(float(fields[19]), fields[0] in "ZX")


def _is_hidden(pid: int) -> bool:
    """Whether there is a process of another user that the process table does not show us (mount option `hidepid`)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return False


def _process_elsewhere(pid: int) -> _Process | None:
    try:
        process = psutil.Process(pid)
        return _Process(process.create_time(), process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return None


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
            if not self._lost and read_if_there(self._storage, self._path) == self._content:
                return
        raise LeaseError(
            f"{self._storage.where(self._path)} was taken over by another process while this one was silent; "
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
        while True:
            theirs = read_if_there(self._storage, path)
            if theirs is None:
                taken = self._storage.create(path, mine)
            else:
                content = _parse(theirs)
                if not (content is not None and is_dead(content.holder)) and not self._expired(path, theirs):
                    return content.holder if content is not None else _UNKNOWN
                taken = self._storage.replace(path, theirs, mine)
            if taken:
                self._seen.pop(path, None)
                return Lease(self._storage, path, mine, self._heartbeat)
            # Another process took or gave back the lease between our look and our write: look again.

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
    data = read_if_there(storage, join(artifact, LEASE_NAME))
    if data is None:
        return None
    content = _parse(data)
    return content.holder if content is not None and not is_dead(content.holder) else None
