"""`hardmoe serve --replicas`: the same answers through every door, and through deaths of replicas."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import psutil
import pyarrow.parquet as pq
import pytest
from served import Command, ask, commanded, encoded, request, serving
from support import invoke

from hardmoe.mixture import Mixture, Prediction
from hardmoe.serving.app import Service
from hardmoe.serving.engine import LocalEngine

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

K = 4


@pytest.fixture(scope="module")
def images(finished: Path) -> list[bytes]:
    return pq.read_table(finished / "photos" / "0.parquet", use_threads=False)["image"].to_pylist()[:24]


@pytest.fixture(scope="module")
def mixture(root: Path) -> Mixture:
    return Mixture.load(str(root))


@pytest.fixture(scope="module")
def on_ray(root: Path) -> Iterator[Command]:
    """A server with replicas, each of which may hold two of the three experts."""
    budget = 2.5 * (root / "experts" / "expert-0000" / "model.safetensors").stat().st_size / 2**30
    with commanded(root, "--replicas", "1", "--memory-gib", f"{budget:.9f}", patience=600) as door:
        yield door


def replicas(door: Command, deployment: str) -> list[psutil.Process]:
    """Processes of a deployment's replicas, which are among the server's descendants, as its Ray is."""
    found = []
    for process in psutil.Process(door.process.pid).children(recursive=True):
        try:
            if f":{deployment}" in "".join(process.cmdline()) and "ServeReplica" in process.cmdline()[0]:
                found.append(process)
        except (psutil.Error, IndexError):
            continue
    return found


def over_http(port: int, images: list[bytes]) -> tuple[list[Prediction], np.ndarray]:
    told = ask(port, "/predict", {"images": encoded(images), "k": K})["predictions"]
    predictions = [
        Prediction(each["expert"], [tag["tag"] for tag in each["tags"]], [tag["probability"] for tag in each["tags"]])
        for each in told
    ]
    return predictions, np.array(ask(port, "/embed", {"images": encoded(images)})["embeddings"])


def on_the_command_line(root: Path, images: list[bytes], directory: Path) -> tuple[list[Prediction], np.ndarray]:
    paths = [str(directory / f"{number:02d}.png") for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Path(path).write_bytes(image)
    lines = [invoke(directory, *said, "--root", str(root)) for said in (("predict", *paths, "-k", str(K)), ("embed", *paths))]
    predicted, embedded = [[json.loads(line) for line in each.stdout.splitlines()] for each in lines]
    assert [Path(row["source_uri"]).name for row in predicted] == [Path(path).name for path in paths]
    return [Prediction(row["expert"], row["tags"], row["probabilities"]) for row in predicted], np.array(
        [row["embedding"] for row in embedded]
    )


def test_every_door_gives_the_same_tags_and_places(
    root: Path, images: list[bytes], mixture: Mixture, on_ray: Command, exported: Path, tmp_path: Path
) -> None:
    expected, vectors = mixture.predict(images, k=K), mixture.embed(images)
    assert len({each.expert for each in expected}) > 1
    with serving(Service(mixture, LocalEngine(mixture), None)) as port:
        doors = {"http": over_http(port, images)}
    doors["command line"] = on_the_command_line(root, images, tmp_path)
    doors["ray"] = over_http(on_ray.port, images)
    for name, (predictions, found) in doors.items():
        np.testing.assert_allclose(found, vectors, rtol=1e-5, atol=1e-5, err_msg=name)
        for each, other in zip(predictions, expected, strict=True):
            assert (each.expert, each.tags) == (other.expert, other.tags), name
            np.testing.assert_allclose(each.probabilities, other.probabilities, rtol=1e-5, err_msg=name)
    session = onnxruntime.InferenceSession(exported / "onnx" / "mixture.onnx", providers=["CPUExecutionProvider"])
    experts, found, probabilities = session.run(None, {"pixels": np.ascontiguousarray(mixture.pixels(images))})
    assert experts.tolist() == [each.expert for each in expected]
    np.testing.assert_allclose(found, vectors, rtol=1e-4, atol=1e-5)
    for row, other in zip(probabilities, expected, strict=True):
        assert [mixture.tags[at] for at in np.argsort(-row, kind="stable")[:K]] == other.tags
        np.testing.assert_allclose(np.sort(row)[::-1][:K], other.probabilities, rtol=1e-4)


def test_replica_holds_no_more_experts_than_its_budget(on_ray: Command, images: list[bytes], mixture: Mixture) -> None:
    assert len(set(mixture.route(images).tolist())) == 3
    ask(on_ray.port, "/embed", {"images": encoded(images)})
    until = time.monotonic() + 60
    while "hardmoe_experts_in_memory 2.0" not in (told := request(on_ray.port, "GET", "/metrics")[1].decode()):
        assert time.monotonic() < until, told


@pytest.mark.parametrize("deployment", ["experts", "gates"])
def test_no_request_fails_when_a_replica_is_killed_and_it_comes_back(
    deployment: str, on_ray: Command, images: list[bytes], mixture: Mixture
) -> None:
    """Four clients ask one image at a time; the only replica is killed under them, and they ask on until another one answers."""
    expected = mixture.embed(images)
    (victim,) = replicas(on_ray, deployment)
    killed, over, num_before, num_after = threading.Event(), threading.Event(), 0, 0

    def client(number: int) -> int:
        nonlocal num_before, num_after
        asked = 0
        while not over.is_set() or not asked:
            at = (number + asked) % len(images)
            after = killed.is_set()
            answer = ask(on_ray.port, "/embed", {"images": encoded(images[at : at + 1])})
            np.testing.assert_allclose(answer["embeddings"][0], expected[at], rtol=1e-5, atol=1e-5)
            asked += 1
            num_before, num_after = num_before + (not after), num_after + after
        return asked

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, number) for number in range(4)]
        try:
            until = time.monotonic() + 300
            while num_before < 8 and not any(each.done() for each in clients):
                assert time.monotonic() < until
                threading.Event().wait(0.01)
            os.kill(victim.pid, signal.SIGKILL)
            killed.set()
            while num_after < 8 and not any(each.done() for each in clients):
                assert time.monotonic() < until
                threading.Event().wait(0.05)
        finally:
            over.set()
        assert all(each.result() for each in clients)
    (successor,) = replicas(on_ray, deployment)
    assert successor.pid != victim.pid
