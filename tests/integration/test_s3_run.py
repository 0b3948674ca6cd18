"""Whole runs whose root and collection are in an S3 store that is busy, slow, and breaks connections off."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from s3 import CREDENTIALS, Faults, Store
from support import command, invoke, real_images, records, refusal, run_here, write_photos, write_recipe

from hardmoe.artifacts.lease import LEASE_NAME, Holder, Lease, LeaseObserver
from hardmoe.mixture import Mixture
from hardmoe.storage import Storage, open_storage

MISBEHAVING = Faults(busy=0.1, refuse=0.004, cut=0.003, lose=0.003, latency_seconds=0.003, seed=7)
"""What is asked for: 10 % of the requests answered with 503, 1 % of the connections broken off, some latency."""

SMALLER: dict[str, Any] = {
    "dataset": {"shard_rows": 256},
    "trunk": {"checkpoint_every_steps": 6},
    "partition": {"experts": 2, "max_passes": 3},
    "experts": {"checkpoint_every_steps": 6},
    "decoder": {"epochs": 1, "checkpoint_every_steps": 4},
}
"""Changes of the small recipe that spare requests; every kind of artifact is still there."""


@dataclass(frozen=True)
class Run:
    """A finished run in a store."""

    directory: Path
    """Where its recipe is, and `runs/local`, the same run on a disk."""
    store: Store
    uri: str
    """Its root, through the proxy."""
    requests: int
    injected: Counter[str]

    @property
    def storage(self) -> Storage:
        """The root past the proxy."""
        return open_storage(self.store.without_faults(self.uri))


def upload(photos: Path, uri: str) -> None:
    """Put a directory's files into a store."""
    storage = open_storage(uri)
    for path in sorted(photos.iterdir()):
        storage.write_bytes(path.name, path.read_bytes())


@pytest.fixture(scope="module")
def run(_running_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    store, directory = _running_store, tmp_path_factory.mktemp("s3-run")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        patch.setattr("hardmoe.storage.s3_client.FIRST_WAIT_SECONDS", 0.01)
        store.proxy.reset()
        collection = store.root("photos")
        write_photos(directory / "local-photos", real_images(260), num_files=2)
        upload(directory / "local-photos", store.without_faults(collection))
        bucket, _, options = collection.partition("?")
        path = f"{bucket}/*.parquet?{options}"
        places: dict[str, Any] = SMALLER | {"dataset": SMALLER["dataset"] | {"path": store.without_faults(path)}}
        write_recipe(directory, "local.yaml", root="runs/local", **places)
        run_here(directory, "run", "-f", "local.yaml")
        uri = store.root("runs/far")
        write_recipe(directory, root=uri, **SMALLER | {"dataset": SMALLER["dataset"] | {"path": path}})
        store.proxy.reset()
        store.proxy.faults = MISBEHAVING
        run_here(directory, "run")
        found = Run(directory, store, uri, len(store.proxy.log), Counter(store.proxy.injected))
        store.proxy.reset()
        yield found


def records_in(storage: Storage) -> dict[str, bytes]:
    """Every `artifact.json` in a store; see `support.records`."""
    return {path: storage.read_bytes(path) for path in storage.list("") if path.rpartition("/")[2] == "artifact.json"}


def test_run_through_faults_has_the_records_of_a_run_without(run: Run) -> None:
    assert records_in(run.storage) == records(run.directory / "runs" / "local")
    # No half-written file, no lease, nothing staged is left, and nothing is missing.
    # (Which checkpoints a training leaves depends on how fast the store took them, and how many files of curves, which are
    # named by the time, on how long it took.)
    far, local = (
        [path for path in storage.list("") if not {"checkpoints", "tensorboard"} & set(path.split("/"))]
        for storage in (run.storage, open_storage(str(run.directory / "runs" / "local")))
    )
    assert far == local
    assert run.injected["busy"] > 0.07 * run.requests
    assert all(run.injected[kind] > 0 for kind in ("refuse", "cut", "lose"))


@pytest.mark.usefixtures("s3_store")
def test_commands_that_look_at_a_run_work_in_a_store(run: Run) -> None:
    run.store.proxy.faults = MISBEHAVING
    (names,) = [json.loads(invoke(run.directory, "status", "--json", "--root", run.uri).stdout)]
    assert {row["state"] for row in names} == {"done"}
    verified = invoke(run.directory, "verify")
    assert verified.returncode == 0
    assert len(re.findall(r"^\S+: ok, \d+ files$", verified.stdout, re.MULTILINE)) == len(names)
    shown = invoke(run.directory, "show", "router").stdout
    assert f"in {run.storage.where('router')}" in shown
    assert invoke(run.directory, "logs").returncode == 0
    assert "endpoint" not in shown


def test_finished_run_again_writes_nothing_and_says_the_same(run: Run, s3_store: Store) -> None:
    s3_store.proxy.faults = MISBEHAVING
    again = invoke(run.directory, "run")
    assert again.returncode == 0, again.stderr
    assert s3_store.proxy.requests.keys() <= {"GET", "HEAD"}
    assert f"report: {run.storage.where('report/index.html')}" in again.stdout
    local = invoke(run.directory, "run", "-f", "local.yaml")
    assert again.stdout.splitlines()[:-1] == local.stdout.splitlines()[:-1]


def test_report_names_the_place_without_its_options(run: Run, s3_store: Store) -> None:
    run.storage.delete_tree("report/index.html")
    assert invoke(run.directory, "report").returncode == 0
    page = run.storage.read_bytes("report/index.html").decode()
    assert run.storage.where() in page
    assert s3_store.proxy.url not in page


def test_damage_in_a_store_is_found_and_named(run: Run, s3_store: Store) -> None:
    (path,) = [path for path in run.storage.list("decoder") if path.endswith(".safetensors")]
    whole = run.storage.read_bytes(f"decoder/{path}")
    run.storage.write_bytes(f"decoder/{path}", bytes([whole[0] ^ 1]) + whole[1:])
    try:
        result = invoke(run.directory, "verify", "decoder")
        assert refusal(result).startswith("1 artifact is damaged")
        place = run.storage.where(f"decoder/{path}")
        assert f"decoder: BAD: {place} has other content than its record says (SHA-256 differs)" in result.stdout
    finally:
        run.storage.write_bytes(f"decoder/{path}", whole)


def test_artifacts_of_a_run_in_a_store_are_reused_by_one_on_a_disk(run: Run, s3_store: Store, tmp_path: Path) -> None:
    s3_store.proxy.faults = MISBEHAVING
    recipe = run.directory / "hardmoe.yaml"
    (tmp_path / "hardmoe.yaml").write_text(recipe.read_text())
    result = invoke(
        tmp_path, "partition", "--root", "runs/near", "--set", f"reuse=[{json.dumps(run.uri)}]", "--backend", "inline"
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(invoke(tmp_path, "status", "--json", "--root", "runs/near").stdout)
    assert {row["state"] for row in rows} == {"reused", "missing"}


def test_mixture_opens_in_a_store_and_predicts_the_same(run: Run, s3_store: Store) -> None:
    s3_store.proxy.faults = MISBEHAVING
    images = [example.image for example in real_images(12)]
    far, near = (Mixture.load(root).predict(images, k=3) for root in (run.uri, str(run.directory / "runs" / "local")))
    assert far == near


def test_missing_bucket_is_one_sentence_before_anything_is_built(run: Run, s3_store: Store) -> None:
    root = f"s3://not-there/run?endpoint={s3_store.proxy.url}"
    sentence = refusal(invoke(run.directory, "run", "--root", root, "--backend", "inline"))
    assert re.match(r"cannot \w+ s3://not-there/run/\S+: there is no such bucket; create it, or correct its name", sentence)


HOLD = """
import sys
from hardmoe.artifacts.lease import LeaseObserver
from hardmoe.storage import open_storage
print(type(LeaseObserver(open_storage(sys.argv[1]), heartbeat=0.05).acquire("dataset")).__name__, flush=True)
sys.stdin.read()
"""


def test_lease_in_a_store_has_one_holder_and_is_taken_over_when_that_is_killed(s3_store: Store) -> None:
    """The holder's beats go on through faults; a beat whose answer was lost must not make it believe that it lost."""
    uri = s3_store.root()
    s3_store.proxy.faults = Faults(busy=0.15, refuse=0.05, cut=0.05, lose=0.15, seed=3)
    observer = LeaseObserver(open_storage(uri))
    with subprocess.Popen([sys.executable, "-c", HOLD, uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "Lease\n"
        while s3_store.proxy.injected["lose"] < 4:
            held = observer.acquire("dataset")
            assert isinstance(held, Holder)
            assert held.pid == other.pid
        other.kill()
        other.wait()
        taken = observer.acquire("dataset")
        assert isinstance(taken, Lease)
        taken.check()
        taken.release()
    assert open_storage(uri).list("") == []


@contextlib.contextmanager
def driver(directory: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    """`hardmoe run` at work, with its stderr in a file; killed at the end if it still runs."""
    with (directory / name).open("w") as err:
        process = subprocess.Popen(command("run", "--backend", "inline"), cwd=directory, stdout=err, stderr=err, text=True)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something that the process is about to do."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_two_drivers_on_one_root_in_a_store_and_a_third_killed_before_them(
    project: Path, finished: Path, s3_store: Store
) -> None:
    """The first is killed while it builds the trunk; the two after it take its lease over and share the rest."""
    uri = s3_store.root()
    storage = open_storage(s3_store.without_faults(uri))
    write_recipe(project, root=uri)
    s3_store.proxy.faults = MISBEHAVING
    with driver(project, "0.log") as killed:
        until(lambda: bool(storage.list("trunk/checkpoints")), killed)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait(60)
    assert storage.exists(f"trunk/{LEASE_NAME}"), "the kill came too late; there was nothing to take over"
    with driver(project, "1.log") as one, driver(project, "2.log") as other:
        assert one.wait(280) == 0, (project / "1.log").read_text()
        assert other.wait(280) == 0, (project / "2.log").read_text()
    assert records_in(storage) == records(finished / "runs" / "small")
    built = [re.findall(r"^\S+ (\S+): done in", (project / log).read_text(), re.MULTILINE) for log in ("0.log", "1.log", "2.log")]
    names = {str(Path(path).parent) for path in records(finished / "runs" / "small")}
    assert sorted(name for mine in built for name in mine) == sorted(names), "every artifact has exactly one builder"
    assert not [path for path in storage.list("") if path.endswith("lease.json")]
