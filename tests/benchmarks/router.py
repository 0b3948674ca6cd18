"""Tens of millions of features on disk, fitted and assigned: seconds per stage and per pass, and the memory of every process.

    python tests/benchmarks/router.py --rows 40000000        (about a quarter of an hour on two cores, 12 GB of disk)

The features are float16 vectors in shards, as the features stage writes them, drawn from blobs of unequal sizes; the images
beside them are one byte each, since what is measured is what a row costs whatever its image costs. The router and the partition
are the stages of a run, on a Ray of their own. The floor printed is one read of the features' bytes from the page cache.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from ingest import MemoryWatch

from hardmoe.data.schemas import EXAMPLES, FEATURES
from hardmoe.hashing import derive_seed
from hardmoe.partitioning.config import PartitionConfig
from hardmoe.partitioning.stages import partition_stage, router_stage
from hardmoe.stage import Finished, Phase, Stage, Unit
from hardmoe.tables import build_table, ids_from_array, vectors_from_array, write_table

SHARD_ROWS = 262_144
GIVEN, MADE = ("dataset", "features"), ("router", "partition")


class CollectionWork:
    """The dataset, or its features; every shard is drawn from a seed of its own."""

    def phases(self, context: Any) -> Generator[Any, Any, Any]:
        """One unit per shard."""
        rows, dim = context.stage.config["rows"], context.stage.config["dim"]
        yield Phase("draw", [Unit(f"{number:05d}", {"number": number}) for number in range(math.ceil(rows / SHARD_ROWS))])
        return Finished({"rows": {"train": rows, "validation": 0, "test": 0}, "dim": dim, "store": "copy"})

    def run(self, context: Any) -> Any:
        """One shard."""
        config, number = context.stage.config, context.unit.arguments["number"]
        count = min(SHARD_ROWS, config["rows"] - number * SHARD_ROWS)
        ids_N16 = np.random.default_rng(derive_seed(0, "ids", number)).integers(0, 256, (count, 16), np.uint8)
        path = f"split=train/part-{number:05d}.parquet"
        if context.stage.name == "dataset":
            images = pa.array([b"."] * count, pa.binary())
            tags = pa.array([["photo"]] * count, pa.list_(pa.string()))
            columns = {"example_id": ids_from_array(ids_N16), "image": images, "tags": tags}
            write_table(context.output(path), build_table(EXAMPLES, columns), row_group_size=65_536)
            return {"rows": count}
        centres_CD = np.random.default_rng(0).standard_normal((48, config["dim"]), np.float32)
        shares_C = 1 / np.arange(1, len(centres_CD) + 1)
        rng = np.random.default_rng(derive_seed(0, "features", number))
        vectors_ND = centres_CD[rng.choice(len(centres_CD), count, p=shares_C / shares_C.sum())]
        vectors_ND += rng.standard_normal(vectors_ND.shape, np.float32)
        feature = vectors_from_array(vectors_ND.astype(np.float16))
        schema = pa.schema([FEATURES.field("example_id"), pa.field("feature", feature.type)])
        table = build_table(schema, {"example_id": ids_from_array(ids_N16), "feature": feature})
        write_table(context.output(path), table)
        return {"rows": count}


def stages(rows: int, dim: int, parts: int) -> list[Stage]:
    """The collection, the fit, the parts."""
    shown = {"rows": rows, "dim": dim}
    given = [Stage(name, name, 1, shown, "router:CollectionWork") for name in GIVEN]
    config = PartitionConfig(experts=parts)
    return [
        given[0],
        dataclasses.replace(given[1], inputs={"dataset": "dataset"}),
        router_stage(config, 0),
        partition_stage(config, 0),
    ]


def run(folder: Path, wanted: list[Stage]) -> None:
    """Build what is missing."""
    from hardmoe.artifacts.store import ArtifactStore
    from hardmoe.execution.display import make_display
    from hardmoe.execution.plan import make_plan
    from hardmoe.execution.progress import Reporter
    from hardmoe.execution.ray.backend import RayBackend
    from hardmoe.execution.runner import Runner, RunnerOptions
    from hardmoe.storage import open_storage

    store = ArtifactStore(open_storage(str(folder)))
    reporter = Reporter(store.storage, make_display())
    Runner(store, lambda: RayBackend("local"), reporter, RunnerOptions()).run(make_plan(store, wanted))


def one_read(folder: Path) -> tuple[float, int]:
    """Seconds to read the features' files, once they are in the page cache as far as they fit, and their bytes."""
    files = sorted((folder / "features").rglob("*.parquet"))
    buffer = bytearray(1 << 22)
    size, started = 0, time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as source:
            while count := source.readinto(buffer):
                size += count
    return time.perf_counter() - started, size


def told(folder: Path, name: str, file: str) -> Any:
    """A file of an artifact."""
    return json.loads((folder / name / file).read_text())


def main() -> None:
    """Print one collection's figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--parts", type=int, default=32)
    options = parser.parse_args()
    # Workers find this file by its name.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    print(f"{options.rows:,} rows of {options.dim} dimensions, {options.parts} parts\n")
    folder = Path(tempfile.mkdtemp(prefix="hardmoe-router-"))
    try:
        wanted = stages(options.rows, options.dim, options.parts)
        run(folder, wanted[: len(GIVEN)])
        with MemoryWatch() as watch:
            run(folder, wanted)
        seconds, size = one_read(folder)
        passes = len(told(folder, "router", "artifact.json")["payload"]["objective"])
        print(f"features on disk: {size / 1e9:.2f} GB; one read of them takes {seconds:.1f} s")
        for name in MADE:
            spent = float(told(folder, name, "provenance.json")["seconds"])
            print(f"{name:<12} {spent:>8.1f} s {options.rows / spent:>12,.0f} rows/s {spent / seconds:>8.1f} reads")
        print(f"passes over all rows: {passes}, and one that draws the sample")
        watch.peaks["driver"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for kind, peak in sorted(watch.peaks.items()):
            print(f"peak memory of {kind:<20} {peak / 2**20:>8,.0f} MiB   {peak / 2**31:.2f} of 2 GiB")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
