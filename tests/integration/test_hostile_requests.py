"""12,000 hostile requests to a `hardmoe serve`, drawn from its own description, and then thousands of connections.

Bodies are what the description allows and what it forbids, by schemathesis; images in them are real ones, the hostile ones of
`hostile_images`, and bytes of any kind. Every answer must be one that the description has for its operation, of its content type
and shape, and none a 5xx: one client that waits for its answers never makes a server busy. `HARDMOE_REQUESTS=…` is for another
number, `HARDMOE_REQUESTS_SEED=…` repeats one.
"""

import base64
import json
import os
import random
import resource
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from hostile_images import hostile_images
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from served import Command, commanded, request
from support import copied_run, invoke, real_images

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

NUM_REQUESTS = int(os.environ.get("HARDMOE_REQUESTS", "12000"))
SHARES = {("/predict", "POST"): 0.3, ("/embed", "POST"): 0.25, ("/search", "POST"): 0.3, ("/experts/{number}", "GET"): 0.05} | {
    ("/thumbnails/{row}", "GET"): 0.06, ("/health", "GET"): 0.02, ("/metrics", "GET"): 0.02,
}  # fmt: skip
MOST_GROWTH_BYTES = 256 * 2**20
"""Of the server's resident memory after the first thousand requests, which load every expert and every decoder."""
NUM_CONNECTIONS = 3000


@pytest.fixture(scope="module")
def door(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    root = copied_run(finished, tmp_path_factory.mktemp("hostile-requests"))
    assert invoke(root, "index", "--root", str(root)).returncode == 0
    with commanded(root) as door:
        yield door


def image_bytes() -> st.SearchStrategy[bytes]:
    """Encoded images, and what only claims to be one."""
    real = [example.image for example in real_images(40)]
    hostile = [image.data for image in hostile_images()]
    cut = st.tuples(st.sampled_from(real), st.integers(0, 400)).map(lambda drawn: drawn[0][: drawn[1]])
    return st.one_of(st.sampled_from(hostile), st.sampled_from(hostile), st.sampled_from(real), cut, st.binary(max_size=300))


@st.composite
def with_images(draw: st.DrawFn, cases: st.SearchStrategy[Any], images: st.SearchStrategy[bytes]) -> Any:
    """Cases, in three of four of which strings where images belong have become images."""
    case = draw(cases)

    def maybe(value: Any) -> Any:
        swap = isinstance(value, str) and draw(st.integers(0, 3))
        return base64.b64encode(draw(images)).decode() if swap else value

    if isinstance(case.body, dict):
        body = dict(case.body)
        if isinstance(body.get("images"), list):
            body["images"] = [maybe(value) for value in body["images"]]
        if "image" in body:
            body["image"] = maybe(body["image"])
        case.body = body
    return case


def test_every_hostile_request_has_an_answer_that_the_description_knows(door: Command) -> None:
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    number = int(os.environ.get("HARDMOE_REQUESTS_SEED", random.SystemRandom().randrange(10**9)))
    print(f"hostile requests, HARDMOE_REQUESTS_SEED={number}")
    images = image_bytes()
    schemathesis.openapi.media_type("application/octet-stream", images)
    schemathesis.openapi.media_type("image/*", images)
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{door.port}/openapi.json")
    assert {(path, method) for path, methods in schema.raw_schema["paths"].items() for method in map(str.upper, methods)} == set(
        SHARES
    )
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    server, statuses, held = psutil.Process(door.process.pid), Counter[tuple[str, int]](), list[int]()

    def campaign(path: str, method: str, mode: GenerationMode, count: int) -> None:
        @seed(number)
        @settings(max_examples=count, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(case=with_images(schema[path][method].as_strategy(generation_mode=mode), images))
        def ask(case: Any) -> None:
            response = case.call()
            statuses[path, response.status_code] += 1
            if not statuses.total() % 500:
                held.append(server.memory_info().rss)
            case.validate_response(response, checks=checks)

        ask()

    for (path, method), share in SHARES.items():
        modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE] if method == "POST" else [GenerationMode.POSITIVE]
        missing = round(share * NUM_REQUESTS)
        # Hypothesis ends a campaign early where it has drawn all there is to draw.
        while missing > 0:
            before = statuses.total()
            for mode in modes:
                campaign(path, method, mode, -(-missing // len(modes)))
            assert statuses.total() > before, "nothing is drawn"
            missing -= statuses.total() - before
            number += 1
    print(json.dumps({f"{path} {status}": count for (path, status), count in sorted(statuses.items())}, indent=1))
    print("resident MiB, every 500 requests:", [size // 2**20 for size in held])
    assert statuses.total() >= NUM_REQUESTS
    assert {status for path, status in statuses if path == "/predict"} >= {200, 400, 422}
    assert max(held[2:], default=0) - max(held[:2], default=0) < MOST_GROWTH_BYTES
    assert request(door.port, "GET", "/health")[0] == 200 and door.process.poll() is None


def test_thousands_of_connections_are_outlived(door: Command) -> None:
    """Half of them silent, half in the middle of a header; whoever comes meanwhile may be told to come back, and can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with ExitStack() as held:
            for number in range(min(NUM_CONNECTIONS, hard - 200)):
                connection = held.enter_context(socket.create_connection(("127.0.0.1", door.port), timeout=60))
                if number % 2:
                    connection.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nX-")
            assert request(door.port, "GET", "/health")[0] in (200, 503)
        until = time.monotonic() + 60
        while request(door.port, "GET", "/health")[0] != 200:
            assert time.monotonic() < until
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert door.process.poll() is None
