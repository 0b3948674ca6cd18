"""The runbook's commands before and during a run, as they stand, on a Ray cluster of two nodes with a store on this machine."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from s3 import Store
from support import hardmoe, write_recipe

from hardmoe.storage import open_storage

REPOSITORY = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Running:
    """A cluster as `ray start` makes it."""

    address: str
    job_server: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def end(process: subprocess.Popen[bytes]) -> None:
    """The process and whatever it started."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.wait(60)
    for each in family:
        if each.is_running():
            each.kill()


def wait_for_nodes(count: int, job_server: str, token: Path, started: list[subprocess.Popen[bytes]]) -> None:
    """Until the dashboard knows of so many living nodes."""
    end_of_patience = time.monotonic() + 240
    while True:
        assert all(process.poll() is None for process in started) and time.monotonic() < end_of_patience
        with (
            suppress(OSError, urllib.error.URLError),
            urllib.request.urlopen(_asked(f"{job_server}/nodes?view=summary", token), timeout=5) as answer,
        ):
            if answer.read().decode().count('"ALIVE"') == count:
                return
        time.sleep(0.1)


def _asked(address: str, token: Path) -> urllib.request.Request:
    return urllib.request.Request(address, headers={"Authorization": f"Bearer {token.read_text().strip()}"})


@pytest.fixture
def cluster(s3_store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """By the runbook's own two commands, with ports that are free and `--block`, so that they end with the test."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    # As on a machine of one's own: the token is in the home directory, and nobody sets the mode.
    monkeypatch.setenv("HOME", str(home := tmp_path_factory.mktemp("home")))
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    text = (REPOSITORY / "cluster" / "README.md").read_text()
    port, dashboard = free_port(), free_port()
    address, job_server = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
    environment = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{environment}{os.pathsep}{os.environ['PATH']}")
    ray = str(environment / "ray")
    # Sockets have short paths.
    scratch = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    commands = []
    for told in ("ray start --head --port=6379 --dashboard-host=127.0.0.1", "ray start --address=HEAD:6379"):
        assert told in " ".join(text.split()), told
        words = told.replace("6379", str(port)).replace("HEAD", "127.0.0.1").split()
        words += ["--block", "--num-cpus=2", "--disable-usage-stats", f"--dashboard-agent-listen-port={free_port()}"]
        commands.append(
            [ray, *words[1:], *(["--temp-dir", scratch, f"--dashboard-port={dashboard}"] if "--head" in words else [])]
        )
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        started = []
        for command in commands:
            started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ}))
            stack.callback(end, started[-1])
            wait_for_nodes(len(started), job_server, home / ".ray" / "auth_token", started)
        yield Running(address, job_server)


def test_block_of_commands_before_and_during_a_run_is_right_word_by_word(
    cluster: Running, s3_store: Store, photos: Path, tmp_path: Path
) -> None:
    text = (REPOSITORY / "cluster" / "README.md").read_text()
    (block,) = re.findall(r"^```sh cluster\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    root = s3_store.root("photos")
    collection = s3_store.root("collection")
    for path in photos.iterdir():
        open_storage(collection).write_bytes(path.name, path.read_bytes())
    write_recipe(tmp_path, "photos.yaml", dataset={"path": collection.replace("?", "/*.parquet?")})
    own = {"10.0.0.1:6379": cluster.address, "http://127.0.0.1:8265": cluster.job_server, "s3://bucket/photos": root}
    said = []
    for line in block.splitlines():
        for theirs, ours in own.items():
            line = line.replace(theirs, ours)
        program, *words = line.split()
        assert program == "hardmoe"
        done = hardmoe(tmp_path, *words, timeout=600)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        said.append(done.stdout + done.stderr)
    doctor, submitted, listed, status, failed, stopped = said
    assert "object store" in doctor and "bad" not in doctor
    assert "precision@1" in submitted
    assert "succeeded" in listed
    assert re.search(r"^evaluation +done", status, re.MULTILINE) and "missing" not in status
    assert "nothing failed" in failed
    assert "nothing is running" in stopped
