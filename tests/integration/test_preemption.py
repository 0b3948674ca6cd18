"""Pre-empted and stopped: real signals to real processes, on Ray and without, and a run whose bits show nothing of it."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from s3 import Store
from support import PREPARATION, command, copied_run, invoke, records, run_here

from hardmoe.artifacts.lease import LEASE_NAME
from hardmoe.storage import open_storage

GRACE_SECONDS = 10.0
LONG = ("--only", "expert-0000", "--set", "experts.epochs=120", "--set", "experts.checkpoint_every_steps=null")
"""One expert, trained for some seconds, without a checkpoint until somebody asks for it."""


@dataclass
class Driver:
    """A command at work as a process of its own."""

    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for something that the process is about to do."""
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, f"it did not happen in time:\n{self.said()}"
            time.sleep(0.01)

    def ends(self, code: int) -> None:
        assert self.process.wait(120) == code, self.said()


@dataclass
class Project:
    """A directory whose run is finished up to the partition, and its drivers."""

    directory: Path
    root: Path
    drivers: list[Driver] = field(default_factory=list)

    def start(self, *arguments: str, **environment: str) -> Driver:
        log = self.directory / f"{len(self.drivers)}.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command(*arguments), cwd=self.directory, env={**os.environ, **environment}, stdout=sink, stderr=sink
            )
        self.drivers.append(Driver(process, log))
        return self.drivers[-1]

    def live(self) -> dict[str, object]:
        """What the expert last said of its progress."""
        for path in self.root.glob("experts/expert-0000/_progress/*/live/train/*.json"):
            with contextlib.suppress(OSError, ValueError):
                return json.loads(path.read_bytes())  # type: ignore[no-any-return]
        return {}

    def is_under_way(self) -> bool:
        return float(str(self.live().get("done", 0))) > 3

    def checkpoints(self) -> list[int]:
        return sorted(
            int(path.parent.name.removeprefix("step-")) for path in self.root.glob("experts/expert-0000/checkpoints/*/state.json")
        )


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Iterator[Project]:
    made = Project(tmp_path, copied_run(finished, tmp_path, keep=PREPARATION))
    (made.root / "recipe.yaml").unlink()
    yield made
    for driver in made.drivers:
        driver.process.kill()
        driver.process.wait()


@pytest.fixture(scope="module")
def undisturbed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The records of the same training, left in peace."""
    directory = tmp_path_factory.mktemp("undisturbed")
    root = copied_run(finished, directory, keep=PREPARATION)
    (root / "recipe.yaml").unlink()
    run_here(directory, "train-experts", *LONG)
    return records(root)


def step_of(sentence: str) -> int:
    found = re.search(r"at step (\d+) of \d+, where a checkpoint was made", sentence)
    assert found, sentence
    return int(found[1])


def test_sigterm_to_a_driver_without_workers_costs_no_step(project: Project, undisturbed: dict[str, bytes]) -> None:
    driver = project.start("train-experts", *LONG, "--backend", "inline")
    driver.until(project.is_under_way)
    before = int(str(project.live()["done"]))
    driver.process.terminate()
    assert driver.process.wait(GRACE_SECONDS) == 130, driver.said()
    assert driver.said().endswith("interrupted; running the command again resumes\n")
    stopped_at = step_of(str(project.live()["preempted"]))
    assert stopped_at >= before
    assert project.checkpoints()[-1] == stopped_at == project.live()["done"]
    assert not list(project.root.rglob("lease.json"))
    run_here(project.directory, "train-experts", *LONG)
    assert records(project.root) == undisturbed


def ray_worker(label: str) -> psutil.Process | None:
    """The process in which Ray runs a unit, by the title that Ray gives it."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] == [f"ray::{label}"]:
                return process
    return None


def test_sigterm_to_a_ray_worker_costs_no_step_and_no_try(project: Project, undisturbed: dict[str, bytes]) -> None:
    """Killed for good after the grace period, as a scheduler does; the only try there is must not be used up."""
    driver = project.start("train-experts", *LONG, "--backend", "ray", "--set", "execution.attempts=1")
    driver.until(project.is_under_way)
    worker = ray_worker("experts/expert-0000")
    assert worker is not None
    worker.terminate()
    _, alive = psutil.wait_procs([worker], GRACE_SECONDS)
    assert alive == []
    driver.ends(0)
    (line,) = [line for line in driver.said().splitlines() if "going on from there" in line]
    assert "experts/expert-0000: pre-empted by SIGTERM at step" in line
    log = (project.root / "experts/expert-0000/_progress/logs/train.expert-0000.log").read_text()
    assert step_of(log) == step_of(line)
    assert records(project.root) == undisturbed


@pytest.mark.parametrize("backend", ["inline", "ray"])
def test_stop_from_another_shell_makes_a_checkpoint_and_ends_the_run(
    project: Project, undisturbed: dict[str, bytes], backend: str
) -> None:
    driver = project.start("train-experts", *LONG, "--backend", backend)
    driver.until(project.is_under_way)
    told = invoke(project.directory, "stop")
    assert told.returncode == 0, told.stderr
    assert "(experts/expert-0000); the same command resumes" in told.stdout
    assert f"stopped: process {driver.process.pid} on " in told.stdout
    assert not list(project.root.rglob("lease.json")), "it waits for the end"
    driver.ends(130)
    assert driver.said().splitlines()[-1] == "stopped by 'hardmoe stop'; the same command resumes"
    stopped_at = step_of(driver.said())
    assert project.checkpoints()[-1] == stopped_at
    assert "Traceback" not in driver.said()
    # The request is still there, and older than this driver.
    run_here(project.directory, "train-experts", *LONG)
    assert records(project.root) == undisturbed


def test_stop_where_nothing_runs_says_so_and_writes_nothing(project: Project, finished: Path) -> None:
    shutil.copy(finished / "runs/small/recipe.yaml", project.root)
    before = sorted(project.root.rglob("*"))
    told = invoke(project.directory, "stop")
    assert (told.returncode, told.stdout) == (0, f"nothing is running in {project.root}\n")
    assert sorted(project.root.rglob("*")) == before


def test_stop_that_waits_in_vain_names_who_is_still_at_work(project: Project) -> None:
    driver = project.start("train-experts", *LONG, "--backend", "inline")
    driver.until(project.is_under_way)
    driver.process.send_signal(signal.SIGSTOP)
    told = invoke(project.directory, "stop", "--timeout", "0")
    assert told.returncode == 1
    assert f"error: after 0 seconds still at work: process {driver.process.pid} on" in told.stderr
    driver.process.send_signal(signal.SIGCONT)
    driver.ends(130)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_processes_without_ray_divide_eight_experts_in_a_store(finished: Path, project: Project, s3_store: Store) -> None:
    """Machines that know nothing of each other but the root."""
    eight = ("--set", "partition.experts=8", "--set", "experts.epochs=20", "--backend", "inline")
    uri = s3_store.root("runs/eight")
    run_here(project.directory, "partition", *eight[:4], "--root", uri)
    drivers = [project.start("train-experts", *eight, "--root", uri) for _ in range(3)]
    for driver in drivers:
        driver.ends(0)
    storage = open_storage(s3_store.without_faults(uri))
    names = [f"experts/expert-{number:04d}" for number in range(8)]
    built = [re.findall(r"^\S+ (experts/\S+): done in", driver.said(), re.MULTILINE) for driver in drivers]
    assert sorted(name for each in built for name in each) == names, "each was committed once"
    assert all(built), "everybody has had a share"
    for name in names:
        provenance = json.loads(storage.read_bytes(f"{name}/provenance.json"))
        assert len(provenance["units"]) == 1
    # A lease is created for each expert by the one who trains it, and by nobody else.
    staged = [path for method, path in s3_store.proxy.log if method == "PUT" and "/staged/train/" in path]
    models = [re.search(r"(experts/expert-\d+)/_progress/.*/model.safetensors", path) for path in staged]
    assert sorted(found[1] for found in models if found) == names, "each was trained once"
    assert not [path for path in storage.list("") if path.endswith(LEASE_NAME)]
    local = project.directory / "local"
    run_here(project.directory, "train-experts", *eight[:4], "--root", str(local))
    expected = records(local)
    assert {name: storage.read_bytes(f"{name}/artifact.json") for name in names} == {
        name: expected[f"{name}/artifact.json"] for name in names
    }
