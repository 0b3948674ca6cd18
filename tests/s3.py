"""An S3 store for tests: moto's server on loopback, behind a proxy of our own that misbehaves as networks and stores do.

The proxy, too, is on loopback, unless a host in namespaces (`hosts`) has a store for the others.

What goes wrong is decided by a seed and the request's number, so a test sees the same faults each time; and it is counted,
so that a test can tell that they did happen. A single fault can be asked for by name (`Proxy.next`). Writes are let
through one at a time: moto looks and writes in two steps, and a store's conditional writes are atomic.
"""

import http.client
import logging
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote

Fault = Literal["busy", "refuse", "cut", "lose", "conflict", "forgotten", "denied"]
"""503 SlowDown; the connection breaks off before the request gets through, within the answer, or instead of it; 409
ConditionalRequestConflict, which AWS answers to racing writes; 404 NoSuchUpload, which is all it says of a completed one;
403 AccessDenied."""

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_CONFIG_FILE": "/nonexistent/config",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent/credentials",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_DEFAULT_REGION": "us-east-1",
    "NO_PROXY": "127.0.0.1",
}
"""Environment variables with which boto3 finds these credentials and nothing of the machine's own."""

ERROR = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{}</Code><Message>For the test.</Message></Error>"
REFUSALS: dict[str, tuple[int, str]] = {
    "busy": (503, "SlowDown"),
    "conflict": (409, "ConditionalRequestConflict"),
    "forgotten": (404, "NoSuchUpload"),
    "denied": (403, "AccessDenied"),
}
_ANYWHERE = ("127.0.0.1", 0)
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


@dataclass(frozen=True)
class Faults:
    """Shares of the requests that each fault befalls."""

    busy: float = 0.0
    refuse: float = 0.0
    cut: float = 0.0
    lose: float = 0.0
    latency_seconds: float = 0.0
    """Added to every request, half of it at least."""
    seed: int = 0

    def of(self, number: int) -> Fault | None:
        """What befalls the request of this number."""
        draw = random.Random(f"{self.seed}/{number}").random()
        for kind in ("busy", "refuse", "cut", "lose"):
            draw -= getattr(self, kind)
            if draw < 0:
                return kind
        return None

    def delay(self, number: int) -> float:
        """Seconds to hold the request of this number back."""
        return self.latency_seconds * random.Random(f"{self.seed}/{number}/delay").uniform(0.5, 1.0)


class Proxy:
    """Forwards to a server on loopback; `url` is its own endpoint."""

    def __init__(self, host: str, port: int, listen: tuple[str, int] = _ANYWHERE) -> None:
        self.upstream = (host, port)
        self.faults = Faults()
        self.injected: Counter[str] = Counter()
        """Faults that did happen, by kind."""
        self.requests: Counter[str] = Counter()
        """Requests that arrived, by method."""
        self.log: list[tuple[str, str]] = []
        """Method and decoded path with query of each, in the order of arrival."""
        self.headers: list[dict[str, str]] = []
        """The headers of each, likewise."""
        self.after_fault: Callable[[], object] = lambda: None
        """Called before the connection breaks off, when half an answer was sent or none."""
        self.ignores_conditions = False
        """Whether If-None-Match is taken away, as by a store that does not know it."""
        self._planned: list[tuple[str, str, Fault]] = []
        self._lock = threading.Lock()
        self.writing = threading.Lock()
        self._server = _Server(self, listen)
        self.url = f"http://{listen[0]}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def next(self, method: str, part: str, *faults: Fault) -> None:
        """Let these faults befall the next requests, one each, of this method whose path or query contains `part`."""
        self._planned += [(method, part, fault) for fault in faults]

    def reset(self) -> None:
        """Misbehave no more, and count from zero."""
        with self._lock:
            self.faults = Faults()
            self.after_fault = lambda: None
            self.ignores_conditions = False
            self._planned.clear()
            self.injected.clear()
            self.requests.clear()
            self.log.clear()
            self.headers.clear()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def decide(self, method: str, path: str, headers: dict[str, str]) -> tuple[Fault | None, float]:
        """Number a request; what befalls it and how long it is held back."""
        with self._lock:
            number = len(self.log)
            self.log.append((method, path))
            self.headers.append(headers)
            self.requests[method] += 1
            fault = self.faults.of(number)
            for index, (wanted, part, planned) in enumerate(self._planned):
                if method == wanted and part in path:
                    fault = planned
                    del self._planned[index]
                    break
            if fault is not None:
                self.injected[fault] += 1
            return fault, self.faults.delay(number)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True
    block_on_close = False

    def __init__(self, proxy: Proxy, listen: tuple[str, int]) -> None:
        self.proxy = proxy
        super().__init__(listen, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, as killed ones do, is nobody's error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""

    def do_GET(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault, delay = proxy.decide(self.command, unquote(self.path), dict(self.headers.items()))
        time.sleep(delay)
        if fault == "refuse":
            proxy.after_fault()
            self._hang_up()
            return
        if fault in REFUSALS:
            status, code = REFUSALS[fault]
            self._answer(
                status, {"Content-Type": "application/xml"}, b"" if self.command == "HEAD" else ERROR.format(code).encode()
            )
            return
        if self.command in ("PUT", "POST", "DELETE"):
            with proxy.writing:
                status, headers, content = self._forward(body)
        else:
            status, headers, content = self._forward(body)
        if fault == "lose":
            self._hang_up()
        elif fault == "cut":
            self._answer(status, headers, content, cut=True)
            proxy.after_fault()
            self._hang_up()
        else:
            self._answer(status, headers, content)

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.server.proxy.upstream, timeout=60)
        try:
            dropped = {"connection", "expect"} | ({"if-none-match"} if self.server.proxy.ignores_conditions else set())
            headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
            if self.command == "HEAD":
                kept["Content-Length"] = answer.getheader("Content-Length") or "0"
            return answer.status, kept, content
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], content: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers and status != 204:
            self.send_header("Content-Length", str(len(content)))
        if cut and not content:
            # Nothing to break off but the headers themselves.
            self.wfile.write(b"HTTP/1.1 ")
            return
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)


class Store:
    """moto's server and the proxy before it."""

    def __init__(self, host: str, port: int, listen: tuple[str, int] = _ANYWHERE) -> None:
        self.direct = f"http://{host}:{port}"
        """The endpoint without faults, whatever the proxy does."""
        self.proxy = Proxy(host, port, listen)
        self._buckets = 0

    def bucket(self) -> str:
        """Make a new bucket."""
        import boto3

        self._buckets += 1
        name = f"bucket-{self._buckets}"
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing-secret"}
        client = boto3.client("s3", endpoint_url=self.direct, region_name="us-east-1", **keys)
        client.create_bucket(Bucket=name)
        client.close()
        return name

    def root(self, prefix: str = "run") -> str:
        """The URI of an empty root in a new bucket, through the proxy."""
        return f"s3://{self.bucket()}/{prefix}?endpoint={self.proxy.url}"

    def without_faults(self, uri: str) -> str:
        """The same root, past the proxy."""
        return uri.replace(self.proxy.url, self.direct)


@contextmanager
def running_store(listen: tuple[str, int] = _ANYWHERE) -> Iterator[Store]:
    """Serve until the block ends, the proxy at this address."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    store = Store(*server.get_host_and_port(), listen)
    try:
        yield store
    finally:
        store.proxy.close()
        server.stop()
