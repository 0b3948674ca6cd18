"""Servers for tests, in this process or as a command of their own, and what one asks them."""

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import command

from hardmoe.serving.app import Service, build_app
from hardmoe.serving.server import make_server


@contextmanager
def serving(service: Service) -> Iterator[int]:
    """A server in a thread; its port."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = make_server(build_app(service), service.limits, "127.0.0.1", listening.getsockname()[1])
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        until = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive() and time.monotonic() < until
            threading.Event().wait(0.01)
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@dataclass(frozen=True)
class Command:
    """A `hardmoe serve` that answers."""

    port: int
    process: subprocess.Popen[str]


@contextmanager
def commanded(root: Path, *arguments: str, patience: float = 240.0) -> Iterator[Command]:
    """`hardmoe serve` of a root as a process of its own; in the end it is interrupted, and must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    whole = command("serve", "--root", str(root), "--port", str(port), *arguments)
    process = subprocess.Popen(whole, cwd=root, stderr=subprocess.PIPE, text=True, env={**os.environ}, start_new_session=True)
    assert process.stderr is not None
    said: list[str] = []
    listener = threading.Thread(target=lambda: said.extend(process.stderr or ()))
    listener.start()
    try:
        until = time.monotonic() + patience
        while not any(line.startswith("serving ") for line in said):
            assert process.poll() is None and time.monotonic() < until, "".join(said)
            threading.Event().wait(0.05)
        while not _answers(port):
            assert process.poll() is None and time.monotonic() < until, "".join(said)
        yield Command(port, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) in (0, 130), "".join(said)
    finally:
        process.kill()
        process.wait()
        listener.join()
    assert "Traceback" not in "".join(said), "".join(said)


def _answers(port: int) -> bool:
    try:
        return request(port, "GET", "/health")[0] == 200
    except OSError:
        return False


def request(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def ask(port: int, path: str, body: Any) -> Any:
    status, answer = request(port, "POST", path, json.dumps(body).encode(), Content_Type="application/json")
    assert status == 200, answer
    return json.loads(answer)


def encoded(images: Sequence[bytes]) -> list[str]:
    return [base64.b64encode(image).decode() for image in images]
