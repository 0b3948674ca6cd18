"""`hardmoe serve`: real requests over real sockets, against the mixture itself."""

import http.client
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hostile_base import picture, saved
from served import ask, encoded, request, serving
from support import copied_run, invoke, refusal

from hardmoe.cli.main import cli
from hardmoe.mixture import Mixture
from hardmoe.searching.search import SearchIndex
from hardmoe.serving.app import Service
from hardmoe.serving.engine import LocalEngine
from hardmoe.serving.limits import Limits

LIMITS = Limits(max_body_bytes=200_000, max_pixels=1_000_000, max_images=32, body_seconds=1.0)


@pytest.fixture(scope="module")
def root(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run, indexed."""
    root = copied_run(finished, tmp_path_factory.mktemp("serving"))
    assert invoke(root, "index", "--root", str(root)).returncode == 0
    return root


@pytest.fixture(scope="module")
def mixture(root: Path) -> Mixture:
    return Mixture.load(str(root))


@pytest.fixture(scope="module")
def images(finished: Path) -> list[bytes]:
    return pq.read_table(finished / "photos" / "0.parquet")["image"].to_pylist()[:24]


@pytest.fixture(scope="module")
def service(mixture: Mixture, root: Path) -> Service:
    return Service(mixture, LocalEngine(mixture), SearchIndex.open(str(root), mixture), LIMITS)


@pytest.fixture(scope="module")
def port(service: Service) -> Iterator[int]:
    with serving(service) as port:
        yield port


def test_tags_and_places_are_those_of_the_mixture_in_both_forms(port: int, images: list[bytes], mixture: Mixture) -> None:
    told = ask(port, "/predict", {"images": encoded(images), "k": 4})["predictions"]
    for found, expected in zip(told, mixture.predict(images, k=4), strict=True):
        assert found["expert"] == expected.expert and [each["tag"] for each in found["tags"]] == expected.tags
        np.testing.assert_allclose([each["probability"] for each in found["tags"]], expected.probabilities, rtol=1e-5)
    embedded = ask(port, "/embed", {"images": encoded(images)})
    np.testing.assert_allclose(embedded["embeddings"], mixture.embed(images), rtol=1e-5, atol=1e-5)
    assert embedded["experts"] == mixture.route(images).tolist()
    status, body = request(port, "POST", "/predict?k=2", images[0], Content_Type="image/png")
    assert (
        status == 200
        and [each["tag"] for each in json.loads(body)["predictions"][0]["tags"]] == mixture.predict(images[:1], 2)[0].tags
    )


def test_search_by_image_and_by_hashtag(port: int, images: list[bytes], mixture: Mixture, service: Service) -> None:
    near = ask(port, "/search", {"image": encoded(images)[3], "n": 3})["neighbours"]
    assert len(near) == 3 and near[0]["cosine"] > 0.999
    status, thumbnail = request(port, "GET", f"/thumbnails/{near[0]['row']}")
    assert status == 200 and thumbnail.startswith(b"\xff\xd8")
    tag = mixture.tags[2]
    assert service.index is not None
    expected = [each.row for each in service.index.of_tag(tag, 4)]
    assert [each["row"] for each in ask(port, "/search", {"tag": f"#{tag}", "n": 4})["neighbours"]] == expected
    status, body = request(port, "GET", f"/experts/{near[0]['expert']}")
    assert status == 200 and json.loads(body)["typical"][0].startswith("data:image/png;base64,")


def test_requests_at_the_same_time_share_batches_and_are_told_apart(
    port: int, images: list[bytes], mixture: Mixture, service: Service
) -> None:
    expected = mixture.embed(images)
    engine = service.engine
    assert isinstance(engine, LocalEngine)
    before = engine.num_batches
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda at: ask(port, "/embed", {"images": encoded([images[at % 24]])}), range(96)))
    for at, answer in enumerate(answers):
        np.testing.assert_allclose(answer["embeddings"][0], expected[at % 24], rtol=1e-5, atol=1e-5)
    assert engine.num_batches - before < 90, "no batch had two requests"


PNG_BOMB = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xff\xff\0\0\xff\xff\x08\2\0\0\0" + bytes.fromhex("00000000") + b"\0\0\0\0IEND\xaeB`\x82"
)


@pytest.mark.parametrize(
    ("path", "kind", "body", "status"),
    [
        ("/predict", "image/png", b"no image", 400),
        ("/predict", "image/png", b"", 400),
        ("/predict", "image/png", PNG_BOMB, 400),
        ("/predict", "application/json", b"{", 400),
        ("/predict", "application/json", b"[]", 422),
        ("/predict", "application/json", b'{"images": []}', 422),
        ("/predict", "application/json", b'{"images": ["%%%"]}', 422),
        ("/predict", "application/json", b'{"images": ["QUFB"], "k": 0}', 422),
        ("/predict", "application/json", b'{"images": ["QUFB"], "k": 100000}', 413),
        ("/predict", "application/json", b'{"images": ["QUFB"], "more": 1}', 422),
        ("/predict?k=x", "image/png", b"a", 422),
        ("/embed", "application/json", json.dumps({"images": ["QUFB"] * 33}).encode(), 413),
        ("/embed", "text/plain", b"a", 415),
        ("/embed", "image/png", b"a" * 300_000, 413),
        ("/search", "application/json", b'{"tag": "there-is-no-such-hashtag"}', 404),
        ("/search", "application/json", b'{"tag": "a", "image": "QUFB"}', 422),
        ("/search", "application/json", b"{}", 422),
        ("/search", "application/json", b"\xff\xfe", 400),
        ("/search", "application/json", b'{"tag": "\\ud800"}', 400),
        ("/search", "application/json", b'{"tag": 7}', 422),
        ("/search", "application/json", b'{"tag": "a", "n": 1e999}', 422),
        ("/search", "application/json", b'{"tag": "a", "n": ' + b"9" * 5000 + b"}", 400),
        ("/search", "application/json", b'{"tag": "a", "n": ' + b"9" * 30 + b"}", 413),
        ("/predict", "application/json", b"[" * 100_000, 400),
        ("/predict", "application/json", b'{"images": {"0": "QUFB"}}', 422),
        ("/predict", "application/json", b'{"images": ["QUFB"], "' + b"k" * 100_000 + b'": 1}', 422),
        ("/predict?k=" + "9" * 5000, "image/png", b"a", 422),
        ("/embed", "image/png", saved(picture(), "PNG")[:-30], 400),
        ("/embed", "image/jpeg", saved(picture(), "JPEG")[:700], 400),
        ("/nowhere", "application/json", b"{}", 404),
        ("/health", "application/json", b"{}", 405),
    ],
)
def test_request_that_cannot_be_answered_has_its_status_and_a_sentence(
    port: int, path: str, kind: str, body: bytes, status: int
) -> None:
    found, answer = request(port, "POST", path, body, Content_Type=kind)
    assert (found, status) == (status, found), answer
    assert 0 < len(json.loads(answer)["error"]) < 500
    assert request(port, "GET", "/health")[0] == 200


@pytest.mark.parametrize("number", ["-1", "x", "%C2%B2", "1e3", "9" * 5000, "999999999"])
def test_number_that_is_none_of_an_expert_or_a_thumbnail_is_not_found(port: int, number: str) -> None:
    for path in ("/experts", "/thumbnails"):
        status, answer = request(port, "GET", f"{path}/{number}")
        assert status == 404 and json.loads(answer)["error"]


def test_slow_senders_and_silent_connections_are_ended(port: int) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\n"
    for sent, answered in ((head + b"abc", b"HTTP/1.1 408"), (b"POST /pre", b""), (b"", b"")):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(sent)
            started, got = time.monotonic(), b""
            while chunk := connection.recv(1 << 16):
                got += chunk
            assert got.startswith(answered) and (got or not answered)
            assert 0.5 < time.monotonic() - started < 25


def test_body_of_a_gigabyte_is_refused_before_it_is_read(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 1073741824\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_more_connections_than_allowed_are_told_to_come_back(mixture: Mixture) -> None:
    limits = replace(LIMITS, max_connections=8, body_seconds=5.0)
    with serving(Service(mixture, LocalEngine(mixture), None, limits)) as port, ExitStack() as held:
        for _ in range(12):
            held.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert request(port, "GET", "/health")[0] == 503
        held.close()
        until = time.monotonic() + 20
        while request(port, "GET", "/health")[0] != 200:
            assert time.monotonic() < until


def test_request_that_is_on_its_way_when_the_end_is_asked_for_is_answered(mixture: Mixture) -> None:
    """uvicorn's own protocol resets every connection on which it has not read a request by then."""
    server = ExitStack()
    port = server.enter_context(serving(Service(mixture, LocalEngine(mixture), None)))
    with ThreadPoolExecutor(1) as pool, socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        assert request(port, "GET", "/health")[0] == 200, "the connection was accepted before this one"
        ending = pool.submit(server.close)
        with pytest.raises((ConnectionRefusedError, ConnectionResetError)):
            while True:
                socket.create_connection(("127.0.0.1", port), timeout=30).close()
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        ending.result(60)


def test_whoever_has_asked_when_the_end_is_asked_for_is_answered(mixture: Mixture, images: list[bytes]) -> None:
    """Of a hundred clients of a busy server, up to 84 had their connections reset: those that uvicorn had not quite accepted."""
    server = ExitStack()
    port = server.enter_context(serving(Service(mixture, LocalEngine(mixture), None)))
    warm = Barrier(61)

    def until_refused() -> list[int]:
        statuses: list[int] = []
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                connection.connect()
            except OSError:
                return statuses
            with closing(connection):
                connection.request("POST", "/predict", images[0], {"Content-Type": "image/png"})
                statuses.append(connection.getresponse().status)
            if len(statuses) == 2:
                warm.wait(60)

    with ThreadPoolExecutor(60) as pool:
        clients = [pool.submit(until_refused) for _ in range(60)]
        warm.wait(60)
        server.close()
        statuses = [status for client in clients for status in client.result(60)]
    assert len(statuses) >= 120 and set(statuses) == {200}


def test_token_is_asked_for_and_search_without_an_index_says_what_to_do(mixture: Mixture, images: list[bytes]) -> None:
    with serving(Service(mixture, LocalEngine(mixture), None, LIMITS, token="secret")) as port:
        for given in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
            assert request(port, "POST", "/predict", images[0], Content_Type="image/png", **given)[0] == 401
        sent = {"Content_Type": "image/png", "Authorization": "Bearer secret"}
        assert request(port, "POST", "/predict", images[0], **sent)[0] == 200
        status, body = request(port, "POST", "/search", images[0], **sent)
        assert status == 503 and "hardmoe index" in json.loads(body)["error"]
        assert request(port, "GET", "/")[0] == 200 and request(port, "GET", "/metrics")[0] == 401


def test_description_names_every_route_and_metrics_count_requests(port: int, images: list[bytes]) -> None:
    described = json.loads(request(port, "GET", "/openapi.json")[1])
    posts, gets = {"/predict", "/embed", "/search"}, {"/experts/{number}", "/thumbnails/{row}", "/health", "/metrics"}
    assert set(described["paths"]) == posts | gets

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from ([node["$ref"]] if "$ref" in node else [])
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    names = {reference.removeprefix("#/components/schemas/") for reference in references(described)}
    assert names and names <= set(described["components"]["schemas"])
    request(port, "POST", "/embed", images[0], Content_Type="image/png")
    text = request(port, "GET", "/metrics")[1].decode()
    assert 'hardmoe_requests_total{route="/embed",status="200"}' in text and "hardmoe_experts_in_memory" in text


def test_pages_load_nothing_from_elsewhere(port: int) -> None:
    for path in ("/", "/docs"):
        status, page = request(port, "GET", path)
        assert status == 200 and b"<!doctype html>" in page
        assert b"https://" not in page and b"//cdn" not in page


def test_command_refuses_other_machines_without_a_token(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("secret\n", "two words", "sécret", "\t"):
        monkeypatch.setenv("HARDMOE_TOKEN", token)
        sentence = refusal(invoke(root, "serve", "--root", str(root)))
        assert "a character that no header can carry" in sentence and token not in sentence
    monkeypatch.delenv("HARDMOE_TOKEN", raising=False)
    assert "HARDMOE_TOKEN" in refusal(invoke(root, "serve", "--root", str(root), "--host", "0.0.0.0"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = invoke(root, "serve", "--root", str(root), "--port", str(taken.getsockname()[1]))
        assert "cannot be listened on" in refusal(result)
    assert "serve" in cli.commands
