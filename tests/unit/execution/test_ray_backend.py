"""Ray as the backend: units in other processes, dead workers told from failed units, and nothing left of it afterwards."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from counting import Control, Run, counting
from support import records

from hardmoe.artifacts.lease import this_process
from hardmoe.errors import BackendError, UnitsFailedError
from hardmoe.execution.ray import scratch
from hardmoe.execution.ray.backend import RayBackend
from hardmoe.execution.ray.connection import check_reachable, prepare_environment
from hardmoe.execution.runner import RunnerOptions
from hardmoe.stage import Resources

HERE = Path(__file__).parent


def eventually(condition: Callable[[], object], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def scratch_parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for Ray's directories that is short enough for its sockets, and this test's own."""
    parent = Path(f"/tmp/hm-{os.getpid()}-{time.monotonic_ns() % 10**6}")
    parent.mkdir()
    monkeypatch.setenv("TMPDIR", str(parent))
    monkeypatch.setattr(scratch.tempfile, "tempdir", None)
    # Workers import the counting stage; they know this environment and not this process's `sys.path`.
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{HERE.parents[1]}")
    yield parent
    assert list(parent.glob("hardmoe-ray-*")) == [], "Ray's directory outlived its driver"
    scratch.shutil.rmtree(parent)


def test_a_ray_that_does_not_come_up_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch, scratch_parent: Path) -> None:
    """On a busy machine Ray's own processes come too late; it raises a bare `Exception`, which went through as a traceback."""
    import ray

    def late(**options: object) -> None:
        raise Exception("The current node timed out during startup. The GCS has become overloaded.")

    monkeypatch.setattr(ray, "init", late)
    backend = RayBackend("local")
    with pytest.raises(BackendError, match=r"at 'local': The current node timed out .* overloaded; .*--backend inline"):
        backend.prepare([Resources()])
    backend.close()


def test_runs_units_on_workers_survives_their_death_and_equals_inline(
    root: Path, control: Control, tmp_path: Path, scratch_parent: Path
) -> None:
    """One cluster for it all, as starting one takes seconds: what no machine has is refused; a worker is killed and replaced;
    a unit raises what cannot be printed; and the rest equals an inline run."""
    before = set(psutil.Process().children(recursive=True))
    (other := tmp_path / "other").mkdir()
    control.order("kill", "square-2")
    Control(other).order("strange", "square-1")
    stages = [counting("good", control=control.directory), counting("bad", control=other), counting("on-good", inputs=["good"])]
    backend = RayBackend("local")
    with pytest.raises(BackendError, match=r"a unit asks for 1 CPUs and 64 GPUs, which no node .* has \(.*CPUs and .*lower"):
        backend.prepare([Resources(), Resources(1, 64.0)])
    run = Run(root, stages, RunnerOptions(attempts=2), backend)
    with pytest.raises(UnitsFailedError, match="bad/1: StrangeError: no message"):
        run.run()
    assert any("good/2: lost its worker" in line and "trying again (1 of 2)" in line for line in run.display.lines)
    assert control.runs().count("square-2") == 2
    assert control.processes() - {os.getpid()}, "units run in other processes"
    Run(tmp_path / "inline", [counting("good"), counting("on-good", inputs=["good"])]).run()
    assert records(root) == records(tmp_path / "inline")
    assert list(root.rglob("lease.json")) == []
    assert set(psutil.Process().children(recursive=True)) <= before


def test_units_of_several_demands_share_the_cpus_and_one_waits_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each demand once had a queue of its own in Ray: trainings that waited there took the CPUs of units that all waited for."""
    backend = RayBackend("local")
    monkeypatch.setattr(backend, "_nodes", [{"CPU": 2.0}, {"CPU": 2.0, "GPU": 1.0}])
    training, routing, wide = Resources(1, 1.0), Resources(1, 0.0), Resources(2, 0.0)
    assert backend.has_room(training, {training: 1})
    assert not backend.has_room(training, {training: 2}), "one runs and one waits for the GPU"
    assert backend.has_room(routing, {training: 2, routing: 2})
    assert not backend.has_room(routing, {training: 2, routing: 3}), "four run and one waits"
    assert backend.has_room(wide, {wide: 2})
    assert not backend.has_room(wide, {wide: 3})
    assert not backend.has_room(routing, {wide: 3})


_DRIVER = """
import signal, sys
sys.path[:0] = [{here!r}, {tests!r}]
signal.signal(signal.SIGTERM, signal.default_int_handler)
from pathlib import Path
from counting import Run, counting
from hardmoe.execution.ray.backend import RayBackend
try:
    Run(Path({root!r}), [counting(control=Path({control!r}))], backend=RayBackend("local")).run()
except KeyboardInterrupt:
    sys.exit(130)
"""


def ray_processes(scratch_directory: Path) -> list[psutil.Process]:
    """Everything that belongs to the cluster of one scratch directory."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(scratch_directory) in " ".join(process.info["cmdline"] or []) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_driver_that_is_ended_takes_ray_with_it(
    root: Path, control: Control, scratch_parent: Path, number: signal.Signals
) -> None:
    """Ray's own handler of SIGTERM exits on the spot: leases and directory stayed behind, with exit code 15."""
    control.order("block", "square-3")
    code = _DRIVER.format(here=str(HERE), tests=str(HERE.parents[1]), root=str(root), control=str(control.directory))
    driver = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        eventually(lambda: "square-3" in control.runs() or driver.poll() is not None)
        assert driver.poll() is None
        (directory,) = scratch_parent.glob("hardmoe-ray-*")
        assert ray_processes(directory)
        driver.send_signal(number)
        driver.wait(60)
        eventually(lambda: not ray_processes(directory))
    finally:
        driver.kill()
        driver.wait()
    if number == signal.SIGKILL:
        assert (root / "count/_progress/lease.json").exists()
        # What only a living process could tidy up, the next one on the machine does.
        scratch.make_scratch().joinpath("holder.json").unlink()
        (left,) = scratch_parent.glob("hardmoe-ray-*")
        assert left != directory
        scratch.shutil.rmtree(left)
    else:
        assert driver.returncode == 130
        assert list(root.rglob("lease.json")) == []
        assert json.loads((root / "count/_progress/status.json").read_text())["state"] == "stopped"
    control.cancel("block", "square-3")
    assert Run(root, [counting(control=control.directory)]).run().artifacts["count"].payload == {"total": 14}


def test_scratch_of_the_living_of_others_and_of_the_unknown_is_left_alone(scratch_parent: Path) -> None:
    me = this_process()
    holders = {"dead": replace(me, pid=2**22 + 1), "living": me, "elsewhere": replace(me, host="another", pid=2**22 + 1)}
    for name, holder in holders.items():
        (scratch_parent / f"hardmoe-ray-{name}").mkdir()
        (scratch_parent / f"hardmoe-ray-{name}" / "holder.json").write_text(json.dumps(asdict(holder)))
    (scratch_parent / "hardmoe-ray-just-made").mkdir()
    (scratch_parent / "hardmoe-ray-garbage").mkdir()
    (scratch_parent / "hardmoe-ray-garbage" / "holder.json").write_text("[]")
    (scratch_parent / "unrelated").mkdir()
    (scratch_parent / "hardmoe-ray-link").symlink_to(scratch_parent / "unrelated")
    mine = scratch.make_scratch()
    names = {path.name for path in scratch_parent.iterdir()}
    assert "hardmoe-ray-dead" not in names
    assert names >= {f"hardmoe-ray-{n}" for n in ("living", "elsewhere", "just-made", "garbage", "link")} | {
        "unrelated",
        mine.name,
    }
    for path in scratch_parent.glob("hardmoe-ray-*"):
        path.unlink() if path.is_symlink() else scratch.shutil.rmtree(path)


def test_long_temporary_directory_is_not_used_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel allows 107 bytes for a socket's path, and Ray takes 85 of them: jobs under a long TMPDIR could not start."""
    (long := tmp_path / ("x" * 60)).mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(scratch.tempfile, "tempdir", None)
    made = scratch.make_scratch()
    assert made.parent == Path("/tmp")
    scratch.shutil.rmtree(made)


def test_token_that_ray_start_made_is_sent_to_a_cluster_and_the_mode_that_somebody_set_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: `ray start --head`, then `--address auto` on the same machine: "refuses this driver's token"."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    # Set first, so that what the function sets is undone as well.
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    del os.environ["RAY_AUTH_MODE"]
    prepare_environment(joins=True)
    assert "RAY_AUTH_MODE" not in os.environ, "there is no token"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    prepare_environment(joins=False)
    assert "RAY_AUTH_MODE" not in os.environ, "a Ray of our own needs none"
    prepare_environment(joins=True)
    assert os.environ["RAY_AUTH_MODE"] == "token"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    prepare_environment(joins=True)
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read (no such file"),
        (b" \n", "is empty"),
        (b"\xff\xfe", "no header can carry"),
        (b"a\nb", "no header can carry"),
    ],
)
def test_token_that_ray_would_abort_over_is_refused_before_ray_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, words: str
) -> None:
    """Seen: a stack trace of Ray's, "You have likely discovered a bug in Ray", and gRPC's assertion with signal 6."""
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    del os.environ["RAY_AUTH_MODE"]
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path := tmp_path / "token"))
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BackendError, match=re.escape(words)) as refused:
        prepare_environment(joins=True)
    assert str(path) in str(refused.value) and "set RAY_AUTH_TOKEN" in str(refused.value)


def test_empty_token_file_in_the_home_directory_is_no_token_as_ray_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    del os.environ["RAY_AUTH_MODE"]
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("")
    prepare_environment(joins=True)
    assert "RAY_AUTH_MODE" not in os.environ
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(BackendError, match="auth_token, is empty"):
        prepare_environment(joins=True)


def test_dashboard_that_is_taken_for_the_head_is_refused_at_once() -> None:
    """Seen: `--address HEAD:8265`, the job server's port, was waited for 56 seconds, as gRPC does not say that it is none."""
    with socket.create_server(("127.0.0.1", 0)) as door:

        def answer() -> None:
            visitor, _ = door.accept()
            with visitor:
                visitor.recv(64)
                visitor.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(BackendError, match="a web server does, such as the dashboard"):
            check_reachable(f"127.0.0.1:{door.getsockname()[1]}")
        thread.join()


def test_head_that_hangs_up_without_a_word_is_left_to_ray() -> None:
    """As one does that wants TLS."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        thread = threading.Thread(target=lambda: door.accept()[0].close())
        thread.start()
        check_reachable(f"127.0.0.1:{door.getsockname()[1]}")
        thread.join()
