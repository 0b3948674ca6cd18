"""The balanced partition of features in memory, with what the phases of a run do in a loop; and hard cases to balance."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardmoe.neighbours.assignment import assign
from hardmoe.neighbours.torch_engine import TorchEngine
from hardmoe.partitioning.balance import capacity_of, find_plan, most_rows
from hardmoe.partitioning.balance_pass import Plan
from hardmoe.partitioning.balance_phases import sample_rows, scan_rows
from hardmoe.partitioning.balance_placement import Balanced, place_rows, summarise
from hardmoe.partitioning.cost_grid import CostGrid
from hardmoe.partitioning.router import Router
from hardmoe.partitioning.transform import FeatureTransform

SEED = 3
ENGINE = TorchEngine("cpu")


@dataclass(frozen=True)
class Outcome:
    """The plan, the part of every row in the order of the rows, and what the record would say."""

    plan: Plan
    parts: NDArray[np.int32]
    record: dict[str, Any]


def balanced(
    features: NDArray[np.float32], ids: NDArray[np.uint8], centroids: NDArray[np.float32], slack: float = 0.0, shards: int = 1
) -> Outcome:
    """Balance rows that lie in so many shards, cut as evenly as that goes."""
    router = Router(FeatureTransform("none"), centroids)
    grid, num_rows, num_parts = CostGrid.of(centroids, SEED), len(features), len(centroids)
    bounds = np.linspace(0, num_rows, min(shards, num_rows) + 1).astype(int)
    cut = [slice(low, high) for low, high in pairwise(bounds.tolist())]
    fraction = min(1.0, most_rows(num_parts) / num_rows)
    sampled = [sample_rows([(ids[rows], features[rows])], grid, fraction) for rows in cut]
    unit = grid.unit_exponent(max(largest for _, _, largest in sampled))
    sample_ids = np.concatenate([each for each, _, _ in sampled])
    costs = grid.to_integers(np.concatenate([each for _, each, _ in sampled]), sample_ids, unit)
    capacity = capacity_of(num_rows, num_parts, slack)
    finding = find_plan(sample_ids, costs, num_rows, capacity, SEED)
    try:
        scan = next(finding)
        while True:
            found = [scan_rows([(ids[rows], features[rows])], grid, unit, scan) for rows in cut]
            scan = finding.send(sum(found[1:], start=found[0]))
    except StopIteration as stop:
        plan = Plan.from_arrays(stop.value.to_arrays())
    placed, tallies = [], []
    for rows in cut:
        nearest = assign(features[rows], centroids, ENGINE)
        assignment, tally = place_rows([(ids[rows], features[rows])], grid, router, (plan, unit), nearest)
        placed.append(assignment.primary_N)
        tallies.append(tally)
    parts = np.concatenate(placed)
    sizes = np.bincount(parts, minlength=num_parts).tolist()
    return Outcome(plan, parts, summarise(Balanced(plan, unit, capacity, slack, ""), tallies, sizes))


def random_ids(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 16), dtype=np.uint8)


def squared(features: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.float64]:
    """All squared distances, by brute force."""
    return ((features[:, None].astype(np.float64) - centroids[None].astype(np.float64)) ** 2).sum(axis=2)


def collections() -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
    """Names, features and centroids."""
    rng = np.random.default_rng(1)

    def some(features: NDArray[np.float64], count: int) -> NDArray[np.float64]:
        return features[rng.choice(len(features), count, replace=False)]

    centers = rng.standard_normal((7, 5)) * 4
    shares = 1 / np.arange(1, 8) ** 1.5
    blobs = centers[rng.choice(7, 400, p=shares / shares.sum())] + rng.standard_normal((400, 5))
    giant = np.concatenate([rng.standard_normal((360, 3)) * 0.01, rng.standard_normal((40, 3)) * 5 + 10])
    copies = np.repeat(rng.standard_normal((10, 4)), 40, axis=0)
    few = rng.standard_normal((60, 4))
    outlier = rng.standard_normal((400, 2)) * np.repeat([1e-4, 1.0], 200)[:, None]
    outlier[0] = 6e4
    sphere = rng.standard_normal((400, 64))
    sphere /= np.linalg.norm(sphere, axis=1)[:, None]
    line = np.sort(rng.standard_normal(400))[:, None]
    offset = rng.standard_normal((400, 3)) * 1e-3 + 1000.0
    every = {
        "blobs of very unequal sizes": (blobs, centers),
        "one giant tight cluster": (giant, np.concatenate([giant[:1], giant[-5:]])),
        "copies": (copies, copies[::60]),
        "all rows identical": (np.ones((400, 4)), rng.standard_normal((6, 4))),
        "points of a grid": (rng.integers(0, 3, (400, 3)).astype(float), rng.integers(0, 3, (9, 3)) + 0.25),
        "rows no multiple of parts": (rng.standard_normal((103, 4)), rng.standard_normal((10, 4))),
        "as many parts as rows": (few, few),
        "as many parts as rows, copies": (np.repeat(few[:20], 3, axis=0), few),
        "one part": (few, few[:1]),
        "an outlier and a speck": (outlier, some(outlier, 8)),
        "a sphere": (sphere, some(sphere, 12)),
        "centroids all on one side": (line, np.linspace(-3, -2, 10)[:, None]),
        "coinciding centroids": (some(blobs, 300), np.repeat(centers[:3], 2, axis=0)),
        "far from the origin": (offset, some(offset, 5)),
    }
    for name, (features, centroids) in every.items():
        yield name, features.astype(np.float32), centroids.astype(np.float32)
