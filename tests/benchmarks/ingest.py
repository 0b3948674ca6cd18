"""Millions of rows through ingest, deduplication, split, features and partition: throughput, and the memory of every process.

    python tests/benchmarks/ingest.py --rows 5000000        (about half an hour on two cores, 8 GB of disk)

The images are tiny on purpose: what is measured is what every row costs whatever its image costs. They are bitmaps of random
pixels, every twentieth a copy of another one; hashtags are drawn from 5,000 words with Zipf's weights. Features come from
outside (`features.path`), so that no network's time is in it. The command line runs as its users run it, on a Ray of its own,
and every process below it is asked for its resident memory four times a second. `--scale` runs a tenth of the rows first:
what start-up costs must not grow with them.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

PIXELS, FILE_ROWS, FEATURES = 8, 500_000, 16
FILE_BYTES = 54 + 3 * PIXELS**2
STAGES = ("dataset", "features", "router", "partition")
COMMAND = [sys.executable, "-c", "from hardmoe.cli.main import main; main()"]


def bitmaps(rng: np.random.Generator, count: int) -> np.ndarray:
    """Distinct bitmap files, one per row; uint8 [count, FILE_BYTES]."""
    header = bytearray(54)
    header[:2] = b"BM"
    for offset, value in ((2, FILE_BYTES), (10, 54), (14, 40), (18, PIXELS), (22, PIXELS)):
        header[offset : offset + 4] = value.to_bytes(4, "little")
    header[26:30] = b"\x01\x00\x18\x00"
    files = np.empty((count, FILE_BYTES), np.uint8)
    files[:, :54] = np.frombuffer(bytes(header), np.uint8)
    files[:, 54:] = rng.integers(0, 256, (count, FILE_BYTES - 54), np.uint8)
    return files


def write_collection(folder: Path, rows: int) -> None:
    """Parquet files of images and hashtags, and beside them the features of every image, by the id it will get."""
    from hashlib import sha256

    rng = np.random.default_rng(0)
    words = np.array([f"tag{number:04d}" for number in range(5000)])
    weights = 1 / np.arange(1, 5001)
    weights /= weights.sum()
    (folder / "photos").mkdir(parents=True)
    (folder / "features").mkdir()
    for number, start in enumerate(range(0, rows, FILE_ROWS)):
        count = min(FILE_ROWS, rows - start)
        files = bitmaps(rng, count)
        copies = np.arange(0, count, 20)
        files[copies] = files[(copies + 1) % count]
        lengths = rng.integers(1, 6, count)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        chosen = pa.array(words[rng.choice(5000, offsets[-1], p=weights)])
        image = pa.array(list(map(bytes, files)), pa.binary())
        columns = {"image": image, "hashtags": pa.ListArray.from_arrays(offsets, chosen)}
        pq.write_table(pa.table(columns), folder / "photos" / f"{number:03d}.parquet", row_group_size=50_000)
        ids = pa.array([sha256(data).digest()[:16] for data in image.to_pylist()], pa.binary(16))
        vectors = rng.standard_normal((count, FEATURES)).astype(np.float16)
        vectors[copies] = vectors[(copies + 1) % count]
        feature = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), FEATURES)
        pq.write_table(pa.table({"example_id": ids, "feature": feature}), folder / "features" / f"{number:03d}.parquet")


def write_recipe(folder: Path, shard_rows: int, near: str) -> None:
    """A recipe whose partition stands on the features from outside."""
    recipe = {
        "root": "run",
        "dataset": {"path": "photos/*.parquet", "shard_rows": shard_rows, "near_duplicates": near},
        "hashtags": {"min_count": 20, "max_tags": 2000},
        "features": {"path": "features/*.parquet"},
        "partition": {"experts": 8, "max_passes": 5},
    }
    (folder / "hardmoe.yaml").write_text(yaml.safe_dump(recipe))


class MemoryWatch:
    """The largest resident memory of every kind of process below this one, in bytes, shared pages counted."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = defaultdict(int)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        this = psutil.Process()
        while not self._stop.wait(0.25):
            for process in this.children(recursive=True):
                try:
                    kind = _kind(" ".join(process.cmdline()))
                    self.peaks[kind] = max(self.peaks[kind], process.memory_info().rss)
                except psutil.Error:
                    continue  # it ended between the listing and the look


def _kind(command: str) -> str:
    if "hardmoe.cli" in command:
        return "driver"
    if command.startswith("ray::"):
        name = command.removeprefix("ray::").partition("/")[0].strip()
        return f"worker: {name}" if name in STAGES else "worker: others" if name == "IDLE" else "Ray's own"
    return "Ray's own"


def run(folder: Path, *arguments: str) -> tuple[float, str]:
    """Seconds of a command, and what it said."""
    started = time.perf_counter()
    result = subprocess.run([*COMMAND, *arguments], cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(result.stderr[-2000:])
    return time.perf_counter() - started, result.stderr


def measure(rows: int, shard_rows: int, near: str) -> None:
    """One collection, from nothing to its partition, and a second look at it."""
    folder = Path(tempfile.mkdtemp(prefix="hardmoe-ingest-"))
    try:
        started = time.perf_counter()
        write_collection(folder, rows)
        write_recipe(folder, shard_rows, near)
        size = sum(path.stat().st_size for path in (folder / "photos").iterdir())
        print(f"\n{rows:,} rows, {size / 1e6:,.0f} MB of Parquet, made in {time.perf_counter() - started:.0f} s; near: {near}")
        with MemoryWatch() as watch:
            seconds, _ = run(folder, "partition")
        print(f"{'stage':<12} {'seconds':>8} {'rows/s':>10}")
        for name, spent in _stage_seconds(folder):
            print(f"{name:<12} {spent:>8.1f} {rows / spent:>10,.0f}")
        print(f"{'all':<12} {seconds:>8.1f} {rows / seconds:>10,.0f}")
        for kind, peak in sorted(watch.peaks.items()):
            print(f"peak memory of {kind:<20} {peak / 2**20:>8,.0f} MiB   {peak / 2**31:.2f} of 2 GiB")
        plan, _ = run(folder, "run", "--dry-run")
        again, _ = run(folder, "partition")
        print(f"start-up: run --dry-run {plan:.2f} s, the finished command again {again:.2f} s")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _stage_seconds(folder: Path) -> list[tuple[str, float]]:
    found = []
    for name in STAGES:
        body = json.loads((folder / "run" / name / "provenance.json").read_text())
        found.append((name, float(body["seconds"])))
    return found


def main() -> None:
    """Print one table per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--shard-rows", type=int, default=65_536)
    parser.add_argument("--near", default="held_out", choices=["none", "held_out", "all"])
    parser.add_argument("--scale", action="store_true", help="a tenth of the rows first")
    options = parser.parse_args()
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    for rows in (options.rows // 10, options.rows) if options.scale else (options.rows,):
        measure(rows, options.shard_rows, options.near)


if __name__ == "__main__":
    main()
