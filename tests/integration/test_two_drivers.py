"""Two drivers on one root at once, and the leases of drivers that were killed."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import command, copied_run, invoke, records

from hardmoe.artifacts.lease import LEASE_NAME, Lease, LeaseObserver
from hardmoe.storage import open_storage

Driver = subprocess.Popen[str]


@contextlib.contextmanager
def driver(project: Path, *arguments: str) -> Iterator[Driver]:
    """A command at work, with its stderr in a file; killed at the end if it still runs."""
    log = project / f"{len(list(project.glob('*.log')))}.log"
    with log.open("w") as err:
        process = subprocess.Popen(
            command(*arguments, "--backend", "inline"), cwd=project, stdout=subprocess.PIPE, stderr=err, text=True
        )
        process.log = log  # type: ignore[attr-defined]
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def said(process: Driver) -> str:
    """What a driver has said on stderr so far."""
    path: Path = process.log  # type: ignore[attr-defined]
    return path.read_text()


def until(condition: Callable[[], bool], process: Driver) -> None:
    """Wait for something that the process is about to do."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, said(process)
        assert time.monotonic() < deadline, f"it did not happen in time:\n{said(process)}"
        time.sleep(0.01)


def finished_by(process: Driver) -> list[str]:
    """The artifacts that a driver says it has built."""
    return re.findall(r"^\S+ (\S+): done in", said(process), re.MULTILINE)


@pytest.mark.parametrize(("first", "second"), [("run", "partition"), ("partition", "run")], ids=lambda name: name)
def test_two_drivers_on_one_root_share_the_work_and_interleave_nothing(
    project: Path, finished: Path, first: str, second: str
) -> None:
    """The second is started as soon as the first holds its first lease."""
    root, expected = project / "runs" / "small", finished / "runs" / "small"
    with driver(project, first) as one:
        until((root / "dataset" / LEASE_NAME).exists, one)
        with driver(project, second) as other:
            results = {first: one.communicate(timeout=240)[0], second: other.communicate(timeout=240)[0]}
            assert (one.returncode, other.returncode) == (0, 0), said(one) + said(other)
            built, built_too = finished_by(one), finished_by(other)
            names = {str(Path(path).parent) for path in records(expected)}
            assert sorted(built + built_too) == sorted(names), "every artifact has exactly one builder"
            for name in names:
                argv = json.loads((root / name / "provenance.json").read_text())["argv"]
                assert argv[1] == (first if name in built else second)
            waits = re.findall(r"(\S+): being built by process (\d+) on (\S+); waiting for it", said(one) + said(other))
            assert {pid for _, pid, _ in waits} <= {str(one.pid), str(other.pid)}
            assert {host for _, _, host in waits} <= {socket.gethostname()}
    assert records(root) == records(expected)
    assert results["partition"] == invoke(finished, "partition").stdout
    assert results["run"].replace(str(root), "") == invoke(finished, "run").stdout.replace(str(expected), "")
    assert not list(root.rglob("lease.json"))


@pytest.fixture
def router_held(finished: Path, tmp_path: Path) -> Iterator[tuple[Path, Lease]]:
    """A run that has everything up to the features, and whose router this very process claims to be building."""
    root = copied_run(finished, tmp_path, keep=["dataset", "vocabulary", "trunk", "features"])
    (root / "recipe.yaml").unlink()
    lease = LeaseObserver(open_storage(str(root))).acquire("router")
    assert isinstance(lease, Lease)
    yield root, lease
    lease.release()


def deliver(finished: Path, root: Path) -> None:
    """Put the finished router into the root, its record last, as its builder would."""
    theirs = finished / "runs" / "small" / "router"
    shutil.copytree(theirs, root / "router", dirs_exist_ok=True, ignore=shutil.ignore_patterns("artifact.json"))
    shutil.copy(theirs / "artifact.json", root / "router")


def waiting_line() -> str:
    return f"router: being built by process {os.getpid()} on {socket.gethostname()}; waiting for it"


def test_second_driver_names_the_holder_waits_and_goes_on_with_its_result(
    router_held: tuple[Path, Lease], finished: Path
) -> None:
    root, lease = router_held
    with driver(root.parents[1], "partition") as process:
        until(lambda: waiting_line() in said(process), process)
        assert f"process {os.getpid()} on" in status_of(root, "router")
        deliver(finished, root)
        lease.release()
        assert process.wait(120) == 0, said(process)
        assert said(process).count("waiting for it") == 1, "it says so once, not at every look"
        assert finished_by(process) == ["partition"]
    expected = records(finished / "runs" / "small")
    assert all(expected[name] == data for name, data in records(root).items())


def status_of(root: Path, name: str) -> str:
    """An artifact's row in `hardmoe status`."""
    (row,) = [line for line in invoke(root.parents[1], "status").stdout.splitlines() if line.startswith(f"{name} ")]
    return row


def test_artifact_that_another_driver_built_from_another_recipe_meanwhile_is_refused(
    router_held: tuple[Path, Lease], finished: Path
) -> None:
    """Seen: what appeared while waiting was taken as it was, so two experts were trained on a router of three."""
    root, lease = router_held
    with driver(root.parents[1], "partition", "--set", "partition.experts=2") as process:
        until(lambda: waiting_line() in said(process), process)
        deliver(finished, root)
        lease.release()
        assert process.wait(120) == 1, said(process)
        (sentence,) = [line for line in said(process).splitlines() if line.startswith("error: ")]
        assert f"{root}/router was built from another recipe (partition.experts: 3 -> 2)" in sentence
    assert not (root / "partition" / "artifact.json").exists()


def test_lease_that_a_killed_driver_left_is_taken_over_at_once(finished: Path, tmp_path: Path) -> None:
    root = copied_run(finished, tmp_path)
    for name in ("evaluation", "report"):
        shutil.rmtree(root / name)
    with driver(tmp_path, "run") as killed:
        until((root / "evaluation" / LEASE_NAME).exists, killed)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait(60)
    held = json.loads((root / "evaluation" / LEASE_NAME).read_text())
    assert held["holder"]["pid"] == killed.pid, "the kill came after the end; there was nothing to take over"
    result = invoke(tmp_path, "run", "--backend", "inline")
    assert result.returncode == 0, result.stderr
    assert "waiting" not in result.stderr
    assert records(root) == records(finished / "runs" / "small")
    assert not (root / "evaluation" / LEASE_NAME).exists()


def test_interrupted_driver_gives_its_leases_back(finished: Path, tmp_path: Path) -> None:
    """SIGTERM is what a job scheduler sends; the next driver may be on another machine, where only the file tells."""
    root = copied_run(finished, tmp_path)
    for name in ("evaluation", "report"):
        shutil.rmtree(root / name)
    with driver(tmp_path, "run") as process:
        until(lambda: any((root / "evaluation" / "_progress").glob("*/done/*/*.json")), process)
        assert (root / "evaluation" / LEASE_NAME).exists()
        process.terminate()
        assert process.wait(60) == 130, said(process)
        assert said(process).endswith("interrupted; running the command again resumes\n")
    assert not list(root.rglob("lease.json"))
