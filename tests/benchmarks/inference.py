"""What a mixture costs in use: images/s in bulk by the number of experts, and latency and throughput when served.

    python tests/benchmarks/inference.py            (about three minutes on two quiet cores)

Mixtures of 1, 8 and 64 experts of one size and of random weights, each loaded from a file of its own; every image passes a trunk
and one expert, so that images/s should not depend on their number. In bulk means encoded images to places in the unified space,
as `hardmoe embed` does, by one thread, with all experts in memory. Served means `/embed` of one encoded image a request, over
keep-alive connections of as many clients, by a server process that batches and by one that does not (`most_images=1`); beside
them the bare passes of trunk and expert, in this process, at a batch of as many images as there are clients. What is compared
takes turns in every round; figures are medians with the least and the most of the rounds.
"""

import argparse
import contextlib
import hashlib
import http.client
import io
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import safetensors.torch
import torch
from PIL import Image

from hardmoe.artifacts.names import expert_name
from hardmoe.artifacts.record import Record
from hardmoe.artifacts.store import ArtifactStore
from hardmoe.bulk.answers import Decoding, answer
from hardmoe.data.config import PILLOW_MAX_PIXELS
from hardmoe.data.schemas import TAGS
from hardmoe.data.sources.base import RawExample
from hardmoe.mixture import Mixture
from hardmoe.models.shared_decoder import SharedDecoder
from hardmoe.partitioning.router import Router
from hardmoe.partitioning.transform import FeatureTransform
from hardmoe.stage import FileEntry
from hardmoe.storage import open_storage
from hardmoe.tables import build_table, write_table
from hardmoe.training.network import Architecture, build_network

NUM_TAGS = 500
SERVER = """
import sys, torch
from hardmoe.mixture import Mixture
from hardmoe.serving.app import Service, build_app
from hardmoe.serving.engine import LocalEngine
from hardmoe.serving.limits import Limits
from hardmoe.serving.server import make_server
torch.set_num_threads(1)
mixture = Mixture.load(sys.argv[1])
service = Service(mixture, LocalEngine(mixture, most_images=int(sys.argv[3])), None)
make_server(build_app(service), Limits(), "127.0.0.1", int(sys.argv[2])).run()
"""


def encoded_images(count: int, size: int) -> list[bytes]:
    """JPEGs twice as large as the networks are shown them, of smooth random colours."""
    generator, images = np.random.default_rng(0), []
    for _ in range(count):
        small = Image.fromarray(generator.integers(0, 256, (5, 5, 3), np.uint8))
        buffer = io.BytesIO()
        small.resize((2 * size, 2 * size), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        images.append(buffer.getvalue())
    return images


class Root:
    """A root in which artifacts are put as stages write them, as far as a mixture reads them."""

    def __init__(self, directory: Path) -> None:
        self.store = ArtifactStore(open_storage(str(directory)))

    def put(self, name: str, files: dict[str, bytes], config: dict | None = None, payload: dict | None = None) -> None:
        """An artifact of these files."""
        for path, data in files.items():
            self.store.storage.write_bytes(f"{name}/{path}", data)
        entries = [FileEntry(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in files.items()]
        self.store.commit(name, Record(name, 1, name, config or {}, {}, entries, payload or {}), b"{}")


def make_mixture(directory: Path, num_experts: int, architecture: Architecture, images: list[bytes]) -> Mixture:
    """A mixture of random weights whose centroids are the features of some of the images, so that every expert has work."""
    root = Root(directory)
    payload = {"architecture": architecture.to_json()}
    for name in ("trunk", *(f"experts/{expert_name(expert)}" for expert in range(num_experts))):
        network = build_network(architecture, seed=0 if name == "trunk" else 1)
        weights = safetensors.torch.save({key: tensor.contiguous() for key, tensor in network.state_dict().items()})
        root.put(name, {"model.safetensors": weights}, {"experts": {}}, payload)
    root.put("partition", {}, {"partition": {"method": "kmeans"}})
    tags = build_table(TAGS, {"index": range(NUM_TAGS), "tag": map(str, range(NUM_TAGS)), "count": [1] * NUM_TAGS})
    write_table(root.store.storage.open_output("vocabulary/tags.parquet"), tags)
    root.put("vocabulary", {"tags.parquet": root.store.storage.read_bytes("vocabulary/tags.parquet")})
    width = network.backbone.num_features
    start = torch.randn(NUM_TAGS, width, generator=torch.Generator().manual_seed(0))
    decoder = SharedDecoder.initial(num_experts, width, start, torch.zeros(NUM_TAGS), seed=0)
    weights = safetensors.torch.save({key: tensor.contiguous() for key, tensor in decoder.state_dict().items()})
    root.put("decoder", {"decoder.safetensors": weights})
    mixture = Mixture(root.store)
    chosen = mixture._routing_features(mixture.see(mixture.pixels(images[:num_experts])))
    root.put("router", Router(FeatureTransform("none"), chosen).to_files())
    return Mixture.load(str(directory))


def spread(values: list[float], digits: int = 0) -> str:
    """Median, and from where to where."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def load_all(mixture: Mixture) -> None:
    """Every expert into memory."""
    for expert in range(mixture.num_experts):
        mixture.experts.get(expert)


def bulk(mixtures: dict[int, Mixture], images: list[bytes], rounds: int) -> None:
    """Print images/s for every number of experts, and what the experts take."""
    rows = [RawExample(source_uri=str(number), image=image, tags=()) for number, image in enumerate(images)]
    rates: dict[int, list[float]] = {count: [] for count in mixtures}
    memory, loading = {}, {}
    for count, mixture in mixtures.items():
        before = psutil.Process().memory_info().rss
        loading[count] = timed(partial(load_all, mixture))
        memory[count] = psutil.Process().memory_info().rss - before
        answer(mixture, rows[:256], Decoding(PILLOW_MAX_PIXELS))
    for _ in range(rounds):
        for count, mixture in mixtures.items():
            rates[count].append(len(rows) / timed(partial(answer, mixture, rows, Decoding(PILLOW_MAX_PIXELS))))
    first = rates[min(mixtures)]
    print("| experts | images/s in bulk | of the first's | weights, MiB | resident, MiB | loading, s | images an expert |")
    print("|---|---|---|---|---|---|---|")
    for count, mixture in mixtures.items():
        ratios = [rate / one for rate, one in zip(rates[count], first, strict=True)]
        shares = np.bincount(mixture.route(images), minlength=count)
        sizes = f"{mixture.experts.held_bytes / 2**20:,.0f} | {memory[count] / 2**20:,.0f} | {loading[count]:.1f}"
        print(
            f"| {count} | {spread(rates[count])} | {spread(ratios, 2)} | {sizes} | {shares.min()} to {shares.max()} |", flush=True
        )


@dataclass
class Server:
    """A server process, and what its clients saw in each round."""

    name: str
    port: int

    def ask(self, clients: int, images: list[bytes], seconds: float) -> tuple[float, list[float]]:
        """Images/s, and the milliseconds of every request, of so many clients for so long."""
        took: list[list[float]] = [[] for _ in range(clients)]
        start = threading.Barrier(clients + 1)

        def client(number: int) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            start.wait()
            until, at = time.perf_counter() + seconds, number
            while (began := time.perf_counter()) < until:
                connection.request("POST", "/embed", images[at % len(images)], {"Content-Type": "image/jpeg"})
                answered = connection.getresponse()
                assert answered.read() and answered.status == 200
                took[number].append(1000 * (time.perf_counter() - began))
                at += clients
            connection.close()

        threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        start.wait()
        whole = timed(lambda: [thread.join() for thread in threads])
        every = [each for some in took for each in some]
        return len(every) / whole, every


@contextlib.contextmanager
def server(name: str, root: Path, port: int, most_images: int) -> Iterator[Server]:
    """A server of a root, ready."""
    with subprocess.Popen([sys.executable, "-c", SERVER, str(root), str(port), str(most_images)]) as process:
        try:
            while True:
                with contextlib.suppress(OSError):
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                    connection.request("GET", "/health")
                    if connection.getresponse().status == 200:
                        break
                assert process.poll() is None, "the server ended"
                time.sleep(0.1)
            yield Server(name, port)
        finally:
            process.terminate()


def bare(mixture: Mixture, pixels: np.ndarray, batch: int, seconds: float) -> float:
    """Images/s of trunk and experts alone, batch by batch."""
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        seen = mixture.see(pixels[np.arange(done, done + batch) % len(pixels)])
        mixture.embed_seen(seen, mixture.route_seen(seen))
        done += batch
    return done / (time.perf_counter() - began)


def served(mixture: Mixture, servers: list[Server], images: list[bytes], options: argparse.Namespace) -> None:
    """Print latency and throughput of every server, for every number of clients, beside the bare passes."""
    pixels = np.ascontiguousarray(mixture.pixels(images[:1024]))
    print("\n| clients | system | images/s | of the bare passes | p50, ms | p99, ms |\n|---|---|---|---|---|---|")
    for clients in options.clients:
        rates: dict[str, list[float]] = {each.name: [] for each in servers}
        alone: list[float] = []
        latencies: dict[str, list[float]] = {each.name: [] for each in servers}
        for number in range(options.rounds + 1):
            passes = bare(mixture, pixels, clients, options.seconds)
            asked = {each.name: each.ask(clients, images, options.seconds) for each in servers}
            if number:  # the first round loads experts
                alone.append(passes)
                for name, (rate, took) in asked.items():
                    rates[name].append(rate)
                    latencies[name] += took
        print(f"| {clients} | bare passes | {spread(alone)} | 1 | {1000 * clients / statistics.median(alone):.2f} | |")
        for name, found in rates.items():
            ratios = [rate / passes for rate, passes in zip(found, alone, strict=True)]
            p50, p99 = np.percentile(latencies[name], [50, 99])
            print(f"| {clients} | {name} | {spread(found)} | {spread(ratios, 2)} | {p50:.2f} | {p99:.2f} |", flush=True)
        together, single = (rates[each.name] for each in servers)
        gain = [one / other for one, other in zip(together, single, strict=True)]
        print(f"| {clients} | batching's gain | {spread(gain, 2)} times | | | |", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--images", type=int, default=8192, help="in bulk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backbone", default="quicknet_w32")
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=2.0, help="of every measurement when served")
    parser.add_argument("--port", type=int, default=8731, help="this and the next one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    architecture = Architecture(options.backbone, "auto", options.size, NUM_TAGS, "full")
    images = encoded_images(options.images, options.size)
    print(f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}; {options.backbone}, {options.size} pixels\n")
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        roots = {count: Path(directory) / str(count) for count in options.experts}
        mixtures = {count: make_mixture(root, count, architecture, images) for count, root in roots.items()}
        bulk(mixtures, images, options.rounds)
        count = sorted(options.experts)[len(options.experts) // 2]
        kinds = (("served, batches of what waits", 64), ("served, most_images=1", 1))
        servers = [
            stack.enter_context(server(name, roots[count], options.port + at, most)) for at, (name, most) in enumerate(kinds)
        ]
        served(mixtures[count], servers, images, options)


if __name__ == "__main__":
    main()
