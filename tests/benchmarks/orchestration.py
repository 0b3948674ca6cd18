"""What the durable workflow costs: 64 experts that only sleep, on four slots of Ray, beside the best that any order can do.

    python tests/benchmarks/orchestration.py [--experts 64] [--slots 4] [--seconds 64]

Each expert is an artifact of its own, as in a run: its lease is taken, its unit handed over, a file, a completion and a record
are written. They sleep as long as trainings of parts would take whose sizes fall like 1 / rank, cut off at four times the mean;
`--seconds` is the work of a slot. The bound is longest first without any cost: every unit begins the moment that a slot is free.
Overhead of a unit is what its slot did beside sleeping, in the middle of the run, when all slots are taken and the workers are
warm: from one unit's end to the next one's begin on the same worker. The peer is the same units as bare Ray tasks, longest
first. `status` is one look at all artifacts, as `hardmoe status` takes it.
"""

import argparse
import datetime
import heapq
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sleeping import sleep_through, worker_path

from hardmoe.cli.inspect import artifact_status
from hardmoe.config import Json
from hardmoe.execution.ray.backend import RayBackend
from hardmoe.stage import Resources
from hardmoe.storage import LocalStorage, join

_LARGEST = 4.0


def durations(experts: int, slots: int, seconds: float) -> list[float]:
    """Of every expert, in the order of their numbers, which is not that of their sizes."""
    sizes = [1.0 / rank for rank in range(1, experts + 1)]
    mean = sum(sizes) / experts
    cut = [min(size, _LARGEST * mean) for size in sizes]
    scaled = [size * seconds * slots / sum(cut) for size in cut]
    return [scaled[(index * 29) % experts] for index in range(experts)]


def longest_first(lengths: Sequence[float], slots: int) -> float:
    """Makespan of longest first where handing over costs nothing."""
    free = [0.0] * slots
    for length in sorted(lengths, reverse=True):
        heapq.heappush(free, heapq.heappop(free) + length)
    return max(free)


def run_bare(lengths: Sequence[float], slots: int) -> list[Json]:
    """The same as Ray tasks of which `slots` run at a time, nothing written."""
    import ray

    @ray.remote(num_cpus=1)
    def nap(seconds: float) -> Json:
        began = time.time()
        time.sleep(seconds)
        return {"began": began, "ended": time.time(), "worker": os.getpid()}

    waiting, running, done = sorted(lengths, reverse=True), [], []
    while waiting or running:
        while waiting and len(running) < slots:
            running.append(nap.remote(waiting.pop(0)))
        ready, running = ray.wait(running, num_returns=1)
        done += ray.get(ready)
    return done


def makespan(ran: Sequence[Json]) -> float:
    """From the first unit's begin to the last one's end."""
    return max(one["ended"] for one in ran) - min(one["began"] for one in ran)


def gaps(ran: Sequence[Json], slots: int) -> list[float]:
    """Seconds between a unit's end and the next begin anywhere: while units wait, each end frees a slot for one begin."""
    ends = sorted(one["ended"] for one in ran)
    begins = sorted(one["began"] for one in ran)[slots:]
    return [begin - end for end, begin in zip(ends, begins, strict=False)]


def timed(read: Callable[[], object]) -> float:
    """Seconds that it takes, the median of five."""
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        read()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> None:
    """Print a few lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=64.0)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = worker_path()
    today = datetime.datetime.now(datetime.UTC)
    print(f"{today:%Y-%m-%d}, {os.cpu_count()} cores; {options.experts} experts, {options.slots} slots")
    backend = RayBackend("local")
    backend.prepare([Resources(num_cpus=options.slots)])  # a Ray of as many slots, however few cores there are
    lengths = durations(options.experts, options.slots, options.seconds)
    bound = longest_first(lengths, options.slots)
    run_bare([0.5] * options.slots, options.slots)  # begins the workers
    bare = run_bare(lengths, options.slots)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        sleep_through(root / "warm", [0.5] * options.slots, backend, parallel=options.slots)
        began = time.perf_counter()
        ours = sleep_through(root / "run", lengths, backend, parallel=options.slots)
        whole = time.perf_counter() - began
        storage = LocalStorage(root / "run")
        names = [join("experts", f"expert-{index:04d}") for index in range(options.experts)]
        status = timed(lambda: [artifact_status(storage, name) for name in names])
    print(f"units of {min(lengths):.2f} to {max(lengths):.2f} s; longest first would take {bound:.2f} s")
    for name, ran in (("bare Ray tasks", bare), ("ours", ours)):
        between = sorted(gaps(ran, options.slots))
        print(
            f"{name:15} makespan {makespan(ran):.2f} s, {makespan(ran) / bound:.3f} of it; from an end to the next begin "
            f"{1000 * statistics.median(between):.0f} ms (largest {1000 * between[-1]:.0f})"
        )
    print(f"{'ours':15} with the driver's begin and end {whole:.2f} s, {whole / bound:.3f} of it")
    print(f"status of {options.experts} artifacts: {1000 * status:.0f} ms")
    backend.close()


if __name__ == "__main__":
    main()
