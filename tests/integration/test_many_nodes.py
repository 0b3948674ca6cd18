"""Whole runs on a Ray cluster of several hosts that share nothing but an S3 store, submitted from another host, through faults.

One cluster serves all trials; a host that a trial ended boots anew and joins again before the next. Every time limit of Ray's own
is left as it is, so what is seen here is what a user's cluster does.
"""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hosts import REPOSITORY, Host, hosts
from s3 import CREDENTIALS
from support import SMALL, merged

_STORE = """
import sys, time
from pathlib import Path
from s3 import Faults, running_store
with running_store((sys.argv[1], 5000)) as store:
    store.bucket()
    print(store.proxy.url, flush=True)
    while True:
        store.proxy.faults = Faults(busy=float(Path("/tmp/busy").exists()))
        Path("/tmp/refused").write_text(str(store.proxy.injected["busy"]))
        time.sleep(0.1)
"""
"""S3 on a host: answers every request with 503 as long as there is a file `/tmp/busy`."""
_READER = """
import json, sys
from hardmoe.storage import open_storage
for line in sys.stdin:
    storage = open_storage(line.strip())
    paths = [path for path in storage.list("") if path.endswith("artifact.json")]
    print(json.dumps({path: storage.read_bytes(path).decode() for path in paths}), flush=True)
"""
_UPLOAD = """
import sys
from pathlib import Path
from hardmoe.storage import open_storage
storage = open_storage(sys.argv[1])
for path in sorted(Path("photos").iterdir()):
    storage.write_bytes(path.name, path.read_bytes())
"""
_RAY = ["ray", "start", "--disable-usage-stats", "--temp-dir", "/tmp/ray", "--object-store-memory", "80000000"]
_START_ATTEMPTS = 4
"""A raylet dies if its agent has not started within 15 s, which is written in Ray 2.60 and cannot be set (seen in `raylet.err`:
"Timed out waiting for file …/dashboard_agent_listen_port"). On a busy machine that happens."""
_OUTAGE_SECONDS = 30
_CUT_SECONDS = 60


@dataclass(frozen=True)
class Site:
    """A laptop, and a cluster of a head and three workers, on the first of which is the store."""

    laptop: Host
    head: Host
    workers: list[Host]
    reader: subprocess.Popen[str]

    @property
    def store(self) -> Host:
        return self.workers[0]

    @property
    def victim(self) -> Host:
        """The worker that faults befall."""
        return self.workers[2]

    @property
    def job_server(self) -> str:
        return f"http://{self.head.address}:8265"

    def uri(self, prefix: str) -> str:
        return f"s3://bucket-1/{prefix}?endpoint=http://{self.store.address}:5000"

    def cpus(self, worker: Host) -> str:
        """One has two, for the demo's trunk asks for as many."""
        return "2" if worker is self.workers[1] else "1"

    def submit(self, *words: str) -> list[str]:
        return ["python", "-m", "hardmoe", "submit", "--address", self.job_server, *words]

    def records(self, root: str) -> dict[str, bytes]:
        """Every `artifact.json` in the store below a root."""
        assert self.reader.stdin is not None and self.reader.stdout is not None
        print(root, file=self.reader.stdin, flush=True)
        return {path: content.encode() for path, content in json.loads(self.reader.stdout.readline()).items()}

    def refused(self) -> int:
        """Requests that the store has answered with 503."""
        return int(self.store.succeed("cat", "/tmp/refused"))

    def kill_driver(self) -> None:
        """As the kernel does when memory runs out; `pkill` sees the head's own processes only."""
        self.head.succeed("pkill", "-9", "-f", "^python -m hardmoe")


def _eventually(condition: Callable[[], object], seconds: float = 900.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.3)


def _start_ray(host: Host, *words: str) -> None:
    """Start Ray on a host, which boots anew for every further attempt."""
    for left in range(_START_ATTEMPTS - 1, -1, -1):
        result = host.run(*_RAY, "--node-ip-address", host.address, *words)
        if result.returncode == 0:
            return
        assert left, f"{host.name}:\n{result.stderr[-2000:]}\n{host.run('cat', '/tmp/ray/session_latest/logs/raylet.err').stdout}"
        host.boot()


def _join(site: Site, worker: Host) -> None:
    """Make a worker a node of the cluster, unless it is one."""
    if not worker.is_on or worker.run("pgrep", "-x", "raylet").returncode != 0:
        assert worker is not site.store, "no fault of a trial befalls the store's host"
        worker.boot()
        _start_ray(worker, "--address", f"{site.head.address}:6379", "--num-cpus", site.cpus(worker))


@pytest.fixture(scope="module")
def _cluster() -> Iterator[Site]:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}
    variables = {**CREDENTIALS, **token, "NO_PROXY": "*"}
    with hosts("laptop", "head", "one", "two", "three", **variables) as (laptop, head, *workers):
        dashboard = ["--dashboard-host", head.address, "--dashboard-port", "8265"]
        _start_ray(head, "--head", "--num-cpus", "0", *dashboard)
        made = Site(laptop, head, workers, laptop.start("python", "-c", _READER))
        # Before the store begins on it, so that it may boot anew.
        _start_ray(made.store, "--address", f"{head.address}:6379", "--num-cpus", made.cpus(made.store))
        path = f"{REPOSITORY}:{REPOSITORY}/tests"
        serving = made.store.start("python", "-c", _STORE, made.store.address, PYTHONPATH=path)
        assert serving.stdout is not None and serving.stdout.readline() == f"http://{made.store.address}:5000\n"
        yield made


@pytest.fixture
def site(_cluster: Site) -> Site:
    """The cluster with all its nodes."""
    for worker in _cluster.workers:
        _join(_cluster, worker)
    return _cluster


@pytest.fixture(scope="module")
def _collection(_cluster: Site, photos: Path) -> str:
    """The images in the store."""
    for path in photos.iterdir():
        _cluster.laptop.put(f"/tmp/home/photos/{path.name}", path.read_bytes())
    _cluster.laptop.succeed("python", "-c", _UPLOAD, _cluster.uri("collection"))
    return _cluster.uri("collection/*.parquet")


@dataclass(frozen=True)
class Trial:
    """A recipe, submitted from the laptop; `expected` are the records of a run on the laptop itself."""

    site: Site
    recipe: str
    root: str
    expected: dict[str, bytes]

    @property
    def command(self) -> list[str]:
        return self.site.submit("--", "run", "-f", self.recipe, "--root", self.root)

    def start(self) -> subprocess.Popen[str]:
        return self.site.laptop.start(*self.command)

    def until(self, artifact: str, running: subprocess.Popen[str]) -> None:
        """Wait until this artifact is there; the run must be going on then."""
        _eventually(lambda: f"{artifact}/artifact.json" in self.site.records(self.root) or running.poll() is not None)
        assert running.poll() is None, running.communicate()

    def finish(self, running: subprocess.Popen[str]) -> str:
        """The run ends well, or with exit code 3 and then well when it is submitted again; returns what was said."""
        out, err = running.communicate(timeout=1200)
        said = out + err
        if running.returncode == 3:
            again = self.site.laptop.run(*self.command, timeout=1200)
            said += f"\n== again ==\n{again.stdout}{again.stderr}"
            assert again.returncode == 0, said
        else:
            assert running.returncode == 0, said
        found = self.site.records(self.root)
        assert found.keys() == self.expected.keys(), said
        for path, record in found.items():
            assert record.decode() == self.expected[path].decode(), f"{said}\n{path}"
        # For `pytest -s`: what a person would have seen.
        print(said)
        return said


def _run_on_laptop(site: Site, recipe: str, root: str) -> dict[str, bytes]:
    """The records of an uninterrupted run without a cluster."""
    site.laptop.succeed("python", "-m", "hardmoe", "run", "-f", recipe, "--root", root, "--backend", "inline", timeout=1800)
    return site.records(root)


@pytest.fixture(scope="module")
def _small(_cluster: Site, _collection: str) -> dict[str, bytes]:
    recipe: dict[str, Any] = merged(SMALL, {"dataset": {"path": _collection}})
    _cluster.laptop.put("/tmp/home/small.yaml", yaml.safe_dump(recipe).encode())
    return _run_on_laptop(_cluster, "small.yaml", "/tmp/home/runs/small")


@pytest.fixture
def trial(site: Site, _small: dict[str, bytes], request: pytest.FixtureRequest) -> Trial:
    return Trial(site, "small.yaml", site.uri(f"runs/{request.node.name.replace('_', '-')}"), _small)


@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_submitted_demo_whose_driver_is_killed_has_the_records_of_a_local_run(site: Site) -> None:
    site.laptop.put("/tmp/home/demo.yaml", (REPOSITORY / "pipelines" / "demo.yaml").read_bytes())
    trial = Trial(site, "demo.yaml", site.uri("runs/demo"), _run_on_laptop(site, "demo.yaml", "/tmp/home/runs/demo"))
    refused = site.laptop.run(*trial.command, RAY_AUTH_TOKEN="f" * 32)
    assert refused.returncode == 1 and "refuses this token" in refused.stderr
    refused = site.laptop.run(*site.submit("--", "run", "-f", "demo.yaml", "--root", "runs/mine"))
    assert refused.returncode == 1 and "a relative path of this machine" in refused.stderr
    running = trial.start()
    trial.until("partition", running)
    site.kill_driver()
    said = trial.finish(running)
    assert running.returncode == 0
    assert "submitting it again" in said and "precision@1" in said
    listed = site.laptop.succeed(*site.submit("--list"))
    assert "failed" in listed and "succeeded" in listed and trial.root in listed


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_run_goes_on_without_a_host_that_was_killed(trial: Trial) -> None:
    running = trial.start()
    trial.until("dataset", running)
    trial.site.victim.kill()
    trial.finish(running)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_run_goes_on_when_a_host_is_cut_off_for_a_minute(trial: Trial) -> None:
    running = trial.start()
    trial.until("dataset", running)
    trial.site.victim.cut()
    try:
        time.sleep(_CUT_SECONDS)
    finally:
        trial.site.victim.heal()
    trial.finish(running)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_run_goes_on_after_the_store_was_busy_for_half_a_minute(trial: Trial) -> None:
    running = trial.start()
    trial.until("dataset", running)
    before = trial.site.refused()
    trial.site.store.succeed("touch", "/tmp/busy")
    try:
        time.sleep(_OUTAGE_SECONDS)
        assert running.poll() is None
    finally:
        trial.site.store.succeed("rm", "/tmp/busy")
    assert trial.site.refused() > before
    trial.finish(running)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_run_goes_on_or_stops_and_resumes_when_a_hosts_disk_is_full(trial: Trial) -> None:
    victim = trial.site.victim
    running = trial.start()
    trial.until("dataset", running)
    # `cat` goes on to the last byte, and ends with an error.
    assert "No space left on device" in victim.run("bash", "-c", "cat /dev/zero > /tmp/ballast").stderr
    try:
        running.wait(timeout=1200)
    finally:
        victim.succeed("rm", "/tmp/ballast")
    trial.finish(running)
    # Its raylet may have lost a file to the full disk, and end of that in the middle of the next trial.
    victim.kill()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_root_that_only_the_drivers_host_has_is_found_out(site: Site) -> None:
    command = ["python", "-m", "hardmoe", "doctor", "--address", f"{site.head.address}:6379", "--root", "/tmp/home/run"]
    result = site.head.run(*command, "--json")
    assert result.returncode == 1 and result.stdout, result.stderr
    found = {each["node"].split()[0]: each for each in json.loads(result.stdout) if each["check"] == "root"}
    assert {node: each["state"] for node, each in found.items()} == {"head": "ok", "one": "bad", "two": "bad", "three": "bad"}
    assert "does not see what the driver writes there" in found["two"]["text"]


def test_hosts_share_no_file_and_can_be_cut_off_and_booted_anew() -> None:
    with hosts("one", "two") as (one, two):
        for place in ("/tmp/home/here", "/dev/shm/here"):
            one.succeed("touch", place)
            assert two.run("test", "-e", place).returncode == 1
        assert one.succeed("hostname") == "one\n"
        serving = two.start("python", "-u", "-m", "http.server", "8000", "--bind", two.address)
        assert serving.stdout is not None and serving.stdout.readline().startswith("Serving HTTP")
        assert "http.server" not in one.succeed("bash", "-c", "cat /proc/*/cmdline | tr '\\0' ' '")
        knock = ["python", "-c", f"import socket; socket.create_connection(('{two.address}', 8000), 2)"]
        assert one.run(*knock).returncode == 0
        two.cut()
        assert "timed out" in one.run(*knock).stderr
        two.heal()
        _eventually(lambda: one.run(*knock).returncode == 0, seconds=60)
        two.boot()
        assert serving.returncode == -9
        assert "ConnectionRefusedError" in one.run(*knock).stderr
        assert two.run("test", "-e", "/dev/shm/here").returncode == 1
