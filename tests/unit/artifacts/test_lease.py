"""Leases: one builder, no waiting for the dead, no taking from the living, and a loss that is noticed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from hardmoe.artifacts import lease as lease_module
from hardmoe.artifacts.lease import LEASE_NAME, Holder, Lease, LeaseObserver, is_dead, lease_holder, this_process
from hardmoe.errors import LeaseError
from hardmoe.storage import LocalStorage

PATH = f"a/{LEASE_NAME}"
_HOLD = """
import sys, time
from pathlib import Path
from hardmoe.artifacts.lease import Lease, LeaseObserver
from hardmoe.storage import LocalStorage
lease = LeaseObserver(LocalStorage(Path(sys.argv[1])), heartbeat=float(sys.argv[2])).acquire("a")
assert isinstance(lease, Lease)
print("held", flush=True)
sys.stdin.read()
lease.release()
"""


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


@contextmanager
def holding_process(storage: LocalStorage, heartbeat: float = 10.0) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease of `a` until its stdin is closed."""
    command = [sys.executable, "-c", _HOLD, storage.uri, str(heartbeat)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def observer(storage: LocalStorage, time_to_live: float = 60.0, heartbeat: float = 10.0) -> LeaseObserver:
    return LeaseObserver(storage, time_to_live, heartbeat)


def held(found: Lease | Holder) -> Lease:
    assert isinstance(found, Lease), f"held by {found}"
    return found


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def elsewhere() -> Holder:
    """A holder on another machine, whose process table we cannot read."""
    return replace(this_process(), host="another-machine", boot="another-boot")


def write_lease(storage: LocalStorage, holder: Holder, beat: int = 0) -> None:
    body = {"token": "t", "beat": beat, "holder": vars(holder)}
    storage.write_bytes(PATH, json.dumps(body).encode())


def test_second_process_is_told_who_holds_the_lease_until_it_is_given_back(storage: LocalStorage) -> None:
    with holding_process(storage) as process:
        found = observer(storage).acquire("a")
        assert isinstance(found, Holder)
        assert found.pid == process.pid
        assert str(found) == f"process {process.pid} on {this_process().host}"
        assert lease_holder(storage, "a") == found
        process.communicate("")
        lease = held(observer(storage).acquire("a"))
        lease.check()
        lease.release()
    assert not storage.exists(PATH)
    assert lease_holder(storage, "a") is None


def test_lease_of_a_killed_process_on_this_machine_is_taken_at_once(storage: LocalStorage) -> None:
    with holding_process(storage) as process:
        process.send_signal(signal.SIGKILL)
        # Not waited for: until its parent does so, a killed process stands in the process table as a zombie.
        eventually(lambda: isinstance(found := observer(storage).acquire("a"), Lease) and not found.release())


def test_lease_of_an_earlier_process_with_the_same_number_is_taken_at_once(storage: LocalStorage) -> None:
    write_lease(storage, replace(this_process(), started=this_process().started - 100))
    held(observer(storage).acquire("a")).release()


def test_living_holder_survives_a_correction_of_the_clock(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil's start times are wall-clock times, which moved by minutes when a suspended machine woke up and asked NTP."""
    import psutil

    with holding_process(storage):
        real = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + 300)
        assert isinstance(observer(storage).acquire("a"), Holder)


def test_holder_in_another_container_of_the_same_host_is_not_declared_dead() -> None:
    """Containers share the boot id, and often the host name, and number their processes each for itself."""
    nobody = replace(this_process(), pid=2**22 + 1)
    assert is_dead(nobody)
    assert not is_dead(replace(nobody, boot=nobody.boot.replace("pid:", "pid:other-")))
    assert not is_dead(replace(nobody, host="another-machine"))
    assert not is_dead(this_process())


def test_process_of_another_user_that_is_hidden_from_us_is_not_declared_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_permitted(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(lease_module, "_process", lambda pid: None)
    monkeypatch.setattr(os, "kill", not_permitted)
    assert not is_dead(Holder(this_host(), lease_module._boot(), 12345, 1.0))


def this_host() -> str:
    import socket

    return socket.gethostname()


def test_silent_lease_from_elsewhere_expires_by_the_observers_own_clock(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(lease_module.time, "monotonic", lambda: clock[0])
    write_lease(storage, elsewhere())
    watching = observer(storage, time_to_live=60.0)
    assert watching.acquire("a") == elsewhere()
    clock[0] += 59.9
    assert watching.acquire("a") == elsewhere()
    # A heartbeat: the minute begins again.
    write_lease(storage, elsewhere(), beat=1)
    clock[0] += 59.9
    assert watching.acquire("a") == elsewhere()
    clock[0] += 59.9
    assert watching.acquire("a") == elsewhere()
    clock[0] += 0.2
    held(watching.acquire("a")).release()


def test_time_before_the_first_look_does_not_count(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lease(storage, elsewhere())
    assert isinstance(observer(storage, time_to_live=0.001).acquire("a"), Holder)


def test_unreadable_lease_is_left_for_the_time_to_live(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be one that a later version writes and keeps alive."""
    clock = [0.0]
    monkeypatch.setattr(lease_module.time, "monotonic", lambda: clock[0])
    storage.write_bytes(PATH, b"\xff not a lease")
    watching = observer(storage)
    found = watching.acquire("a")
    assert str(found) == "an unknown process (its lease cannot be read)"
    assert lease_holder(storage, "a") is None
    clock[0] += 60.0
    held(watching.acquire("a")).release()


def test_heartbeats_keep_a_lease_from_an_observer_elsewhere(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    with holding_process(storage, heartbeat=0.02):
        monkeypatch.setattr(lease_module, "is_dead", lambda holder: False)
        watching = observer(storage, time_to_live=3.0)
        beats = set()

        def heard_often_enough() -> bool:
            found = watching.acquire("a")
            assert isinstance(found, Holder)
            beats.add(storage.read_bytes(PATH))
            return len(beats) > 20

        eventually(heard_often_enough)


def test_holder_that_was_silent_too_long_finds_out_at_its_commit_and_leaves_the_new_lease_alone(storage: LocalStorage) -> None:
    mine = held(observer(storage, heartbeat=3600).acquire("a"))
    write_lease(storage, elsewhere())
    with pytest.raises(LeaseError, match=r"/a/_progress/lease.json was taken over by another process .* nothing was written"):
        mine.check()
    mine.release()
    assert lease_holder(storage, "a") == elsewhere()


def test_heartbeat_notices_the_loss_even_if_the_other_holder_is_gone_again(storage: LocalStorage) -> None:
    mine = held(observer(storage, heartbeat=0.01).acquire("a"))
    storage.delete_tree(PATH)
    eventually(lambda: not mine._thread.is_alive())
    with pytest.raises(LeaseError):
        mine.check()
    mine.release()


def test_heartbeat_goes_on_after_a_hiccup_of_the_disk(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    from hardmoe.errors import StorageError

    failures = [StorageError("the disk is full")] * 5
    real = storage.replace

    def flaky(path: str, expected: bytes, data: bytes | None) -> bool:
        if failures and data is not None:
            raise failures.pop()
        return real(path, expected, data)

    monkeypatch.setattr(storage, "replace", flaky)
    mine = held(observer(storage, heartbeat=0.01).acquire("a"))
    first = storage.read_bytes(PATH)
    eventually(lambda: storage.read_bytes(PATH) != first)
    mine.check()
    mine.release()
    assert not storage.exists(PATH)


def test_of_many_observers_at_one_lease_exactly_one_gets_it_again_and_again(storage: LocalStorage) -> None:
    """Acquire and release race in eight threads; whoever has the lease must be alone with it."""
    inside, taken, wrong = [0], [0], []

    def compete() -> None:
        watching = observer(storage, heartbeat=3600)
        while taken[0] < 60:
            found = watching.acquire("a")
            if isinstance(found, Lease):
                inside[0] += 1
                taken[0] += 1
                if inside[0] != 1:
                    wrong.append(inside[0])
                found.check()
                inside[0] -= 1
                found.release()

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert taken[0] >= 60
    assert not storage.exists(PATH)


def test_lease_of_a_dead_holder_goes_to_one_of_many(storage: LocalStorage) -> None:
    write_lease(storage, replace(this_process(), pid=2**22 + 1))
    found: list[Lease | Holder] = []
    threads = [threading.Thread(target=lambda: found.append(observer(storage, heartbeat=3600).acquire("a"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    winners = [lease for lease in found if isinstance(lease, Lease)]
    assert len(winners) == 1
    assert [holder.pid for holder in found if isinstance(holder, Holder)] == [os.getpid()] * 7
    winners[0].release()
