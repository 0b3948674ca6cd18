"""`hardmoe submit`: what is refused before anything is sent, in one sentence and soon; and jobs on a real job server."""

import json
import os
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from support import hardmoe, invoke, refusal, write_recipe

REPOSITORY = Path(__file__).parents[3]
NOBODY = "http://127.0.0.1:1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class _Refusing(BaseHTTPRequestHandler):
    """Answers everything with the server's `status`; not at all if that is 0, until the test is over."""

    def do_GET(self) -> None:
        status: int = self.server.status  # type: ignore[attr-defined]
        if status == 0:
            self.server.over.wait(60)  # type: ignore[attr-defined]
            return
        self.send_response(status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@contextmanager
def refusing(status: int, certificate: Path | None = None) -> Iterator[str]:
    """The address of a server that answers so."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    server.status, server.over = status, threading.Event()  # type: ignore[attr-defined]
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.over.set()  # type: ignore[attr-defined]
        server.shutdown()
        server.server_close()


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A directory with a recipe that a cluster could run."""
    write_recipe(tmp_path, root="s3://bucket/run", dataset={"path": "s3://bucket/photos/*.parquet"})
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"root": "runs/small"}, "root is 'runs/small', a relative path of this machine"),
        ({"root": "/mnt/runs/small"}, "root is '/mnt/runs/small', a path of this machine"),
        ({"root": "s3://bucket/run"}, "dataset.path is '.*/photos/.*', a path of this machine"),
        ({"root": "s3://b/r", "reuse": ["runs/other"], "dataset": {"path": "s3://b/*.parquet"}}, "reuse is 'runs/other'"),
        (
            {"root": "s3://b/r", "hashtags": {"aliases": "a.csv"}, "dataset": {"path": "s3://b/*"}},
            "hashtags.aliases is '.*a.csv'",
        ),
    ],
)
def test_place_that_workers_do_not_see_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    write_recipe(tmp_path, **changes)
    sentence = refusal(invoke(tmp_path, "submit", "--address", NOBODY, "--", "run"))
    assert re.search(words, sentence) and "s3://bucket/prefix" in sentence and "--shared" in sentence


def test_path_below_a_shared_directory_is_taken(tmp_path: Path) -> None:
    write_recipe(tmp_path, root=str(tmp_path / "runs" / "small"))
    sentence = refusal(invoke(tmp_path, "submit", "--address", NOBODY, "--shared", str(tmp_path), "--", "hardmoe", "run"))
    assert "no job server answers" in sentence


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("status",), "'status' is no command for a cluster; submit one of distil, evaluate, fit-decoder, partition, report,"),
        (("partition", "--check", "other.yaml"), "--check names a file of this machine"),
        (("run", "-f", "missing.yaml"), "missing.yaml"),
        (("run", "--set", "partition.expert=3"), "unknown key 'partition.expert'"),
    ],
)
def test_command_that_cannot_run_there_is_refused(there: Path, words: tuple[str, ...], sentence: str) -> None:
    assert sentence in refusal(invoke(there, "submit", "--address", NOBODY, "--", *words))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--", "run", "--paralel", "3"),
        (),
        ("--list", "--", "run"),
        ("--env", "x", "--", "run"),
        ("--list", "--stop", "x"),
        ("--", "hardmoe"),
        ("--logs", ""),
        ("--shared", "mounted", "--", "run", "--root", "mounted/x"),
    ],
    ids=str,
)
def test_wrong_command_line_is_a_usage_error(there: Path, arguments: tuple[str, ...]) -> None:
    assert invoke(there, "submit", "--address", NOBODY, *arguments).returncode == 2


@pytest.mark.parametrize("address", [NOBODY, "10.0.0.1:6379", "http://127.0.0.1:1/"])
def test_address_where_no_job_server_is_gets_one_sentence(there: Path, address: str) -> None:
    sentence = refusal(invoke(there, "submit", "--address", address, "--", "run"))
    assert ("no job server answers" if "://" in address else "is no job server's") in sentence and ":8265" in sentence


@pytest.mark.parametrize("headers", ["{", "[]", '{"a": 1}'])
def test_headers_that_are_none_are_refused(there: Path, headers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_HEADERS", headers)
    assert "no JSON object of texts" in refusal(invoke(there, "submit", "--address", NOBODY, "--list"))


def test_relative_root_below_a_shared_directory_is_refused_with_the_path_to_write(tmp_path: Path) -> None:
    """Seen: "say with --shared DIR" was the remedy for somebody who had said so."""
    write_recipe(tmp_path, root="runs/small")
    sentence = refusal(invoke(tmp_path, "submit", "--address", NOBODY, "--shared", str(tmp_path), "--", "run"))
    assert f"write {tmp_path / 'runs' / 'small'}" in sentence


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "refuses this token"), (403, "refuses this token"), (500, "refuses"), (0, "no job server answers")],
)
def test_server_that_refuses_or_hangs_is_told_within_ten_seconds(there: Path, status: int, words: str) -> None:
    began = time.monotonic()
    with refusing(status) as address:
        sentence = refusal(invoke(there, "submit", "--address", address, "--", "run"))
    assert words in sentence and time.monotonic() - began < 10


def test_certificate_that_is_not_trusted_is_told_and_one_that_is_named_is_trusted(there: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-keyout", "key.pem", "-out", "ca.pem"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, cwd=there, check=True, capture_output=True)
    both = there / "both.pem"
    both.write_text((there / "key.pem").read_text() + (there / "ca.pem").read_text())
    with refusing(403, both) as address:
        assert "not trusted here" in refusal(invoke(there, "submit", "--address", address, "--", "run"))
        sentence = refusal(invoke(there, "submit", "--address", address, "--ca", str(there / "ca.pem"), "--", "run"))
    assert "refuses this token" in sentence


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The job server of a cluster of one node with three CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        port = free_port()
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 3, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port},
        )
        yield f"http://127.0.0.1:{port}"
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_job_is_sent_followed_listed_and_ends_as_its_command_did(server: str, tmp_path: Path) -> None:
    """`--dry-run` builds nothing, so the cluster has little to do; the job runs in another directory, by the recipe alone."""
    write_recipe(tmp_path, root="elsewhere")
    submit = ("submit", "--address", server, "--shared", str(tmp_path))
    (tmp_path / "photos").mkdir()
    asked = ("--", "run", "--dry-run", "--root", str(tmp_path / "root"), "--set", "partition.experts=7")
    failed = hardmoe(tmp_path, *submit, *asked)
    assert failed.returncode == 1, failed.stderr
    assert "error: " in failed.stdout and "photos" in failed.stdout, "the job's own sentence is shown"
    (job,) = re.findall(r"submitted as (\S+)", failed.stderr)
    for column in (job, "failed", f"run --dry-run --root {tmp_path / 'root'}"):
        assert column in hardmoe(tmp_path, "submit", "--address", server, "--list").stdout
    assert hardmoe(tmp_path, "submit", "--address", server, "--logs", job).stdout in failed.stdout
    assert "had ended already" in hardmoe(tmp_path, "submit", "--address", server, "--stop", job).stdout
    assert "there is no such job" in refusal(hardmoe(tmp_path, "submit", "--address", server, "--logs", "unknown"))
    write_recipe(tmp_path, root=str(tmp_path / "root"), trunk={"num_threads": 5})
    assert "5 CPUs and 0 GPUs fit on no node" in refusal(hardmoe(tmp_path, *submit, "--", "run"))


def test_environment_and_token_of_this_process_are_left_as_they_were(there: Path) -> None:
    before = json.dumps(dict(os.environ))
    invoke(there, "submit", "--address", NOBODY, "--", "run")
    after = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    assert after == {key: value for key, value in json.loads(before).items() if not key.startswith("RAY_")}
