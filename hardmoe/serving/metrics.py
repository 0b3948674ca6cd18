"""Numbers for Prometheus, in a registry of their own, so that two servers in one process do not share them.

Rejected: labels with what clients send (paths, statuses of their own), of which there are any number.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)


class Metrics:
    """See the module."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("hardmoe_requests", "Requests answered.", ["route", "status"], registry=self.registry)
        self._seconds = Histogram(
            "hardmoe_request_seconds", "Time from headers to answer.", ["route"], buckets=_BUCKETS, registry=self.registry
        )
        self._open = Gauge("hardmoe_requests_open", "Requests being answered.", registry=self.registry)
        self.images = Counter("hardmoe_images", "Images decoded.", registry=self.registry)
        self.experts_held = Gauge("hardmoe_experts_in_memory", "Experts in memory.", registry=self.registry)

    @contextmanager
    def measured(self, route: str) -> Iterator[Callable[[int], None]]:
        """Measure a request; what is given is to be called with its status."""
        started, status = time.perf_counter(), 500

        def outcome(code: int) -> None:
            nonlocal status
            status = code

        self._open.inc()
        try:
            yield outcome
        finally:
            self._open.dec()
            self._requests.labels(route, str(status)).inc()
            self._seconds.labels(route).observe(time.perf_counter() - started)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        data: bytes = generate_latest(self.registry)
        return data
