"""One client per store and process, and one policy of retries.

Every request is retried by `Patience` and by nothing else: botocore sends each one once. So there is one bound on the time
that a dead endpoint costs, bodies that break off half-way are retried like refused connections, and a conditional write
knows whether an earlier attempt may have got through although its answer was lost. Rejected: botocore's own `standard`
mode, which sees no bodies, hides that last fact, and waits half a second on average before its first retry.
"""

import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import boto3
import botocore
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from hardmoe.errors import StorageError
from hardmoe.storage.s3_errors import ANSWERS, is_passing
from hardmoe.storage.s3_silence import heard
from hardmoe.storage.s3_uri import S3Access

PATIENCE_SECONDS = 60.0
"""So long a request is sent again and again, and no longer. A number of attempts would not do: the pauses between ten were 23 s
together on average and 45 s at most, and an outage of 30 s ended half the runs that met it."""
FIRST_WAIT_SECONDS = 0.1
"""The first pause lasts at most so long, and every further one twice as long."""
LONGEST_WAIT_SECONDS = 10.0
CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0
"""How long a server may be silent in the middle of an answer."""
CONNECTIONS = 64
"""Open connections per client: more than a process has threads that read."""

T = TypeVar("T")


class Patience:
    """How long one request may still be retried."""

    def __init__(self) -> None:
        self.failed = 0
        """Attempts so far whose answer was an error or did not arrive."""
        self._started = time.monotonic()
        heard(PATIENCE_SECONDS)

    def wait(self, error: Exception) -> None:
        """Pause before the next attempt; raises the error itself if it will not pass by waiting, or lasts for too long."""
        self.failed += 1
        if not is_passing(error) or time.monotonic() - self._started > PATIENCE_SECONDS:
            raise error
        most = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** min(self.failed - 1, 30))
        # Spread over the whole interval, so that a thousand units refused together do not come back together.
        time.sleep(random.uniform(0, most))

    def progress(self) -> None:
        """Something arrived: the next failure is the first one again."""
        self.failed, self._started = 0, time.monotonic()
        heard(PATIENCE_SECONDS)


def patiently(request: Callable[[], T]) -> T:
    """Send a request that may be sent twice without harm."""
    patience = Patience()
    while True:
        try:
            return request()
        except ANSWERS as error:
            patience.wait(error)


_clients: dict[S3Access, Any] = {}
_lock = threading.Lock()


def _forget() -> None:
    """In a forked child: the parent's sockets must not be shared, and another thread may have held its lock."""
    global _lock
    _lock = threading.Lock()
    _clients.clear()


os.register_at_fork(after_in_child=_forget)


def client_for(access: S3Access) -> Any:
    """The boto3 client of a store; the same one for every thread of the process.

    Raises:
        StorageError: there is no such profile, or the endpoint is no URL.
    """
    with _lock:
        if access not in _clients:
            try:
                _clients[access] = _new_client(access)
            except (BotoCoreError, ValueError) as error:
                raise StorageError(f"cannot open an S3 store: {error}; correct the URI's options or ~/.aws/config") from error
        return _clients[access]


def _new_client(access: S3Access) -> Any:
    session = boto3.Session(profile_name=access.profile)
    settings: dict[str, Any] = {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "max_pool_connections": CONNECTIONS,
        "tcp_keepalive": True,
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "user_agent_extra": "hardmoe",
        # What is written carries Content-MD5, which every store knows; the newer checksums break some of them.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    if access.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        # A bucket as a part of the host name needs a DNS entry for each, which AWS has and a server of one's own has not.
        settings["s3"] = {"addressing_style": "path"}
    if access.anonymous:
        settings["signature_version"] = botocore.UNSIGNED
    region = access.region or os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
    return session.client("s3", region_name=region, endpoint_url=access.endpoint, config=Config(**settings))
