"""Balanced parts of millions of rows: cost against the certified lower bound, seconds per pass, memory, and two baselines.

    python tests/benchmarks/balance.py --rows 5000000        (three minutes on two cores, 1 GB of disk)

Features are drawn from clusters whose sizes follow Zipf's law, so that the unconstrained parts are very unequal, and stored as
the features stage stores them; the centroids come from k-means over the first shard. Every pass reads all shards anew in two
worker processes with one thread each, through the functions of the partition stage's units; images are in none of it. The
greedy baseline takes the rows in the order of their hashes, each to the nearest part that has room left.
"""

import argparse
import math
import multiprocessing
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hardmoe.data.schemas import FEATURES
from hardmoe.hashing import derive_seed, hash_ids
from hardmoe.partitioning.balance import capacity_of, find_plan, most_rows
from hardmoe.partitioning.balance_pass import Found, Plan, Scan
from hardmoe.partitioning.balance_phases import sample_rows, scan_rows
from hardmoe.partitioning.balance_placement import Balanced, place_rows, summarise
from hardmoe.partitioning.cost_grid import CostGrid
from hardmoe.partitioning.in_memory import FitOptions, fit
from hardmoe.partitioning.router import Router
from hardmoe.partitioning.transform import FeatureTransform
from hardmoe.storage import LocalStorage
from hardmoe.tables import (
    build_table,
    ids_from_array,
    ids_to_array,
    iterate_table,
    vectors_from_array,
    vectors_to_array,
    write_table,
)

SEED, SHARD_ROWS, BATCH_ROWS, WINDOW = 0, 131_072, 65_536, 200_000
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Collection:
    """Shards of features, read as the stage reads them."""

    folder: str
    rows: int
    dim: int
    parts: int

    @property
    def shards(self) -> range:
        return range(math.ceil(self.rows / SHARD_ROWS))

    def write_shard(self, number: int) -> None:
        """Draw one shard's rows; in every shard from the same clusters."""
        rng = np.random.default_rng(SEED)
        centers_CD = rng.standard_normal((3 * self.parts, self.dim)).astype(np.float32)
        shares_C = 1 / np.arange(1, len(centers_CD) + 1)
        rng = np.random.default_rng(derive_seed(SEED, "shard", number))
        count = min(SHARD_ROWS, self.rows - number * SHARD_ROWS)
        vectors_ND = centers_CD[rng.choice(len(centers_CD), count, p=shares_C / shares_C.sum())]
        vectors_ND += rng.standard_normal((count, self.dim), np.float32)
        feature = vectors_from_array(vectors_ND)
        ids = ids_from_array(rng.integers(0, 256, (count, 16), np.uint8))
        schema = pa.schema([FEATURES.field("example_id"), pa.field("feature", feature.type)])
        table = build_table(schema, {"example_id": ids, "feature": feature})
        write_table(LocalStorage(Path(self.folder)).open_output(f"{number}.parquet"), table)

    def read(self, number: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float32]]]:
        """Ids and features of unit length, in pieces."""
        transform = FeatureTransform("l2")
        for table in iterate_table(LocalStorage(Path(self.folder)), f"{number}.parquet", FEATURES, rows=BATCH_ROWS):
            vectors_ND = vectors_to_array(table.column("feature")).astype(np.float32)
            yield ids_to_array(table.column("example_id")), transform(vectors_ND)

    def fit(self) -> NDArray[np.float32]:
        """Centroids of the first shard."""
        ids, features = (np.concatenate(each) for each in zip(*self.read(0), strict=True))
        return fit(features, ids, self.parts, SEED, FitOptions(max_passes=20)).centroids_KD


def sample(collection: Collection, grid: CostGrid, fraction: float, number: int) -> Any:
    """A unit of the sample."""
    return sample_rows(collection.read(number), grid, fraction)


def scan(collection: Collection, grid: CostGrid, unit: int, wanted: Scan, number: int) -> Found:
    """A unit of a pass."""
    return scan_rows(collection.read(number), grid, unit, wanted)


def place(collection: Collection, grid: CostGrid, centroids_KD: NDArray[np.float32], plan: tuple[Plan, int], number: int) -> Any:
    """What `assign` does with a shard: sizes of its parts, the sizes by nearest centroid, and the tally."""
    pieces = list(collection.read(number))
    router = Router(FeatureTransform("none"), centroids_KD)
    nearest = router.route(np.concatenate([features for _, features in pieces]))
    assignment, tally = place_rows(pieces, grid, router, plan, nearest)
    counts = [np.bincount(each.primary_N, minlength=router.num_experts) for each in (assignment, nearest)]
    return *counts, tally


def distances(collection: Collection, centroids_KD: NDArray[np.float32], number: int) -> Any:
    """Hashes of a shard's rows, and their squared distances in float32."""
    ids, features_ND = (np.concatenate(each) for each in zip(*collection.read(number), strict=True))
    norms_K = np.square(centroids_KD).sum(axis=1)
    return hash_ids(ids, SEED, "greedy"), np.square(features_ND).sum(axis=1)[:, None] - 2 * features_ND @ centroids_KD.T + norms_K


def greedy_cost(distances_NK: NDArray[np.float32], order_N: NDArray[np.intp], capacity: int) -> float:
    """Sum of squared distances where every row, in this order, takes the nearest part that still has room."""
    room_K = np.full(distances_NK.shape[1], capacity)
    cost, start = 0.0, 0
    while start < len(order_N):
        window = distances_NK[order_N[start : start + WINDOW]]
        window[:, room_K == 0] = np.inf
        chosen = window.argmin(axis=1)
        # As far as no part is full: after that, the rows choose again.
        stops = [
            hits[room_K[part] - 1] for part in np.unique(chosen) if len(hits := np.flatnonzero(chosen == part)) >= room_K[part]
        ]
        taken = min(stops, default=len(chosen) - 1) + 1
        cost += float(window[np.arange(taken), chosen[:taken]].sum(dtype=np.float64))
        room_K -= np.bincount(chosen[:taken], minlength=len(room_K))
        start += taken
    return cost


def timed(what: str, work: Callable[[], ResultT]) -> ResultT:
    """Do it, and print how long it took."""
    started = time.perf_counter()
    result = work()
    print(f"{what:<58}{time.perf_counter() - started:>8.1f} s", flush=True)
    return result


def peak(_: int = 0) -> int:
    """Most resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(collection: Collection, slack: float, pool: ProcessPoolExecutor) -> None:
    """Everything, from drawing the features to the comparison."""

    def everywhere(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        return list(pool.map(partial(function, *arguments), collection.shards))

    timed("(draw and write the features)", lambda: everywhere(collection.write_shard))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:  # whose memory is not counted
        centroids_KD = timed("(k-means of the first shard)", lambda: other.submit(collection.fit).result())
    grid, began = CostGrid.of(centroids_KD, SEED), time.perf_counter()
    fraction = min(1.0, most_rows(collection.parts) / collection.rows)
    sampled = timed("sample: a pass over all rows", lambda: everywhere(sample, collection, grid, fraction))
    unit = grid.unit_exponent(max(largest for _, _, largest in sampled))
    ids = np.concatenate([each for each, _, _ in sampled])
    costs = grid.to_integers(np.concatenate([each for _, each, _ in sampled]), ids, unit)
    del sampled
    capacity = capacity_of(collection.rows, collection.parts, slack)
    finding = find_plan(ids, costs, collection.rows, capacity, SEED)
    try:
        wanted = timed(f"driver: solve a sample of {len(ids):,}", lambda: next(finding))
        while True:
            name = f"pass {wanted.number}: all rows, collect {wanted.rate:.2f} of those near a border"
            joined = Found.joined(timed(name, partial(everywhere, scan, collection, grid, unit, wanted)))
            excess = int(np.maximum(joined.counts_K - capacity, 0).sum())
            name = f"driver: solve {len(joined.ids_M16):,} near rows, {excess:,} too many"
            wanted = timed(name, partial(finding.send, joined))
    except StopIteration as stop:
        plan: Plan = stop.value
    print(f"{'the plan, together':<58}{time.perf_counter() - began:>8.1f} s")
    placed = timed("assign: a pass over all rows", lambda: everywhere(place, collection, grid, centroids_KD, (plan, unit)))
    sizes_K, nearest_K = (np.sum([each[index] for each in placed], axis=0) for index in (0, 1))
    record = summarise(Balanced(plan, unit, capacity, slack, ""), [each[2] for each in placed], sizes_K.tolist())
    workers = max(pool.map(peak, range(16)))
    print(f"peak resident memory: driver {peak() / 2**20:,.0f} MiB, worker {workers / 2**20:,.0f} MiB\n")
    found = everywhere(distances, collection, centroids_KD)
    order_N = np.argsort(np.concatenate([hashes for hashes, _ in found]), kind="stable")
    greedy = greedy_cost(np.concatenate([each for _, each in found]), order_N, capacity)
    mean = collection.rows / collection.parts
    bound, elsewhere = record["lower_bound"], sum(record["serve_elsewhere"]) / collection.rows
    print(f"{'':<34}{'cost':>14}{'of the bound':>14}{'largest part, of the mean':>28}")
    for name, cost, sizes in (
        ("nearest centroid, no limit", record["unconstrained_cost"], nearest_K.max()),
        ("certified lower bound", bound, capacity),
        ("balanced", record["cost"], sizes_K.max()),
        ("greedy, nearest with room", greedy, capacity),
    ):
        print(f"{name:<34}{cost:>14,.1f}{cost / bound:>14.6f}{sizes / mean:>28.4f}")
    print(
        f"\n{record['passes']} passes, {record['exceptions']} exceptions; {100 * elsewhere:.1f} % trained elsewhere than served"
    )


def main() -> None:
    """Print what one collection comes to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--parts", type=int, default=32)
    parser.add_argument("--slack", type=float, default=0.05)
    options = parser.parse_args()
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    print(f"{options.rows:,} rows of {options.dim} dimensions, {options.parts} parts, slack {options.slack:g}\n")
    # One thread each, as the units have; spawned, so that a worker's memory is its own.
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    folder = tempfile.mkdtemp(prefix="hardmoe-balance-")
    try:
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            measure(Collection(folder, options.rows, options.dim, options.parts), options.slack, pool)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
