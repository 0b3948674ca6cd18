"""How fast k-means is beside faiss and scikit-learn, and how good: seconds per pass over all features, and to a stated objective.

    python tests/benchmarks/kmeans.py [--rows 1000000] [--seeds 5] [--clusters 8 32 256] [--sklearn]

Unit features of width 256 in memory, all cores. Two collections: `blobs`, of very unequal sizes (Zipf's) and half as many
again as clusters; `icons`, what a freshly initialised ResNet sees in the glyphs of eight icon fonts, each repeated with noise
until there are enough. The goal of each seed is the objective that 25 passes of `faiss.Kmeans` over all features end with;
reached is what comes within 0.1 % of it. Ours begins with starts and rungs on a part of the features, which are counted. The
floors are measured: one read of the features, and their matrix product with the centroids. scikit-learn's KMeans runs 25
passes from its own seeds, for the first seed only, as it takes minutes; MiniBatchKMeans runs to its own end.
"""

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import faiss
import numpy as np
import torch

from hardmoe.neighbours.engine import choose_engine
from hardmoe.partitioning.config import default_starts
from hardmoe.partitioning.in_memory import FitOptions
from hardmoe.partitioning.kmeans import PassSums, refine_with, scan_batch
from hardmoe.partitioning.scan import blas_threads
from hardmoe.partitioning.starting import Ladder, best_start

DIM, PASSES, NEAR = 256, 25, 1.001
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Fit:
    """One fit of one system."""

    per_pass: float
    reached: float | None
    """Seconds until the objective came near the goal."""
    objective: float


def unit(features_ND: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    features_ND /= np.linalg.norm(features_ND, axis=1, keepdims=True)
    return features_ND


def blobs(rows: int, clusters: int, seed: int) -> np.ndarray:
    """Gaussian blobs whose sizes fall like 1 / rank."""
    rng = np.random.default_rng(seed)
    count = clusters * 3 // 2
    weights = 1 / np.arange(1, count + 1)
    centres = rng.standard_normal((count, DIM), dtype=np.float32)
    features_ND = centres[rng.choice(count, rows, p=weights / weights.sum())]
    features_ND += 0.9 * rng.standard_normal((rows, DIM), dtype=np.float32)
    return unit(features_ND)


def icons(rows: int, clusters: int, seed: int) -> np.ndarray:
    """Features of real drawings, repeated with noise of a tenth of their spread."""
    rng = np.random.default_rng(seed)
    known_MD = _icon_features()
    features_ND = known_MD[rng.integers(0, len(known_MD), rows)]
    features_ND += 0.3 * known_MD.std(axis=0) * rng.standard_normal((rows, DIM), dtype=np.float32)
    return unit(features_ND)


def _icon_features(cache: dict[str, np.ndarray] = {}) -> np.ndarray:  # noqa: B006
    if "features" not in cache:
        from hardmoe.data.config import DatasetConfig
        from hardmoe.data.images import load_square
        from hardmoe.data.sources.base import RawExample
        from hardmoe.data.sources.icons import IconsSource
        from hardmoe.models.backbones import build_backbone
        from hardmoe.training.inference import predict_features

        source = IconsSource(DatasetConfig(source="icons", icon_size=32))
        rows = (row for shard in source.shards() for row in source.read(shard))
        images = np.stack([load_square(row.image, 32, 10**6) for row in rows if isinstance(row, RawExample)])
        backbone = build_backbone("quicknet_w32", image_size=32, seed=0)
        found = predict_features(backbone, [images], 256, torch.device("cpu"))
        features_MD = torch.cat(list(found)).numpy()
        cache["features"] = features_MD - features_MD.mean(axis=0)
    return cache["features"]


def run_faiss(features_ND: np.ndarray, clusters: int, seed: int) -> tuple[Fit, float]:
    """25 passes over everything; also the objective that they end with."""
    kmeans = faiss.Kmeans(DIM, clusters, niter=PASSES, max_points_per_centroid=len(features_ND), seed=seed + 1)
    kmeans.train(features_ND)
    stats = kmeans.iteration_stats
    goal = float(stats[-1]["obj"])
    reached = next(one["time"] for one in stats if one["obj"] <= NEAR * goal)
    return Fit(stats[-1]["time"] / PASSES, reached, goal), goal


def run_ours(features_ND: np.ndarray, clusters: int, seed: int, goal: float) -> Fit:
    """`in_memory.fit`, with a clock between its passes."""
    ids_N16 = np.random.default_rng(seed).integers(0, 256, (len(features_ND), 16), dtype=np.uint8)
    engine, seconds, objectives = choose_engine(), [], []
    began = time.perf_counter()
    with blas_threads(1), ThreadPoolExecutor(CORES) as pool:

        def scan_all(centroids_KD: np.ndarray) -> PassSums:
            started = time.perf_counter()

            def scan_from(start: int) -> PassSums:
                rows = slice(start, start + FitOptions.batch_size)
                return scan_batch(features_ND[rows], ids_N16[rows], centroids_KD, engine)

            starts = range(0, len(features_ND), FitOptions.batch_size)
            total = sum(pool.map(scan_from, starts), start=PassSums.zero(*centroids_KD.shape))
            seconds.append(time.perf_counter() - started)
            objectives.append((total.sums.objective, time.perf_counter() - began))
            return total

        ladder = Ladder(ids_N16, features_ND.__getitem__, clusters, seed)
        fits = list(pool.map(ladder.start, range(default_starts(clusters))))
        climbed = ladder.climb(best_start(fits).centroids_KD, pool.map)
        refine_with(scan_all, climbed.centroids_KD, PASSES, 1e-4)
    reached = next((moment for objective, moment in objectives if objective <= NEAR * goal), None)
    return Fit(statistics.median(seconds), reached, objectives[-1][0])


def run_sklearn(features_ND: np.ndarray, clusters: int, seed: int, mini: bool) -> Fit:
    """scikit-learn, from k-means++."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    began = time.perf_counter()
    if mini:
        model = MiniBatchKMeans(clusters, n_init=1, random_state=seed, batch_size=4096).fit(features_ND)
    else:
        model = KMeans(clusters, n_init=1, random_state=seed, max_iter=PASSES, tol=0.0, algorithm="lloyd").fit(features_ND)
    spent = time.perf_counter() - began
    found = faiss.IndexFlatL2(DIM)
    found.add(model.cluster_centers_.astype(np.float32))
    objective = float(found.search(features_ND, 1)[0].astype(np.float64).sum())
    return Fit(spent / max(1, model.n_iter_), spent, objective)


def floors(features_ND: np.ndarray, clusters: int) -> tuple[float, float]:
    """Seconds to read everything once, and to multiply it with as many centroids."""
    some = torch.from_numpy(features_ND)
    began = time.perf_counter()
    some.sum()
    read = time.perf_counter() - began
    centroids_DK = np.ascontiguousarray(features_ND[:clusters].T)
    began = time.perf_counter()
    for start in range(0, len(features_ND), 65_536):
        features_ND[start : start + 65_536] @ centroids_DK
    return read, time.perf_counter() - began


def measure(name: str, make: Callable[[int, int, int], np.ndarray], options: argparse.Namespace, clusters: int) -> Iterator[str]:
    """The lines of one collection and number of clusters."""
    ours, theirs = list[Fit](), list[Fit]()
    for seed in range(options.seeds):
        features_ND = make(options.rows, clusters, seed)
        if seed == 0:
            read, product = floors(features_ND, clusters)
            scan_batch(features_ND[:4096], np.zeros((4096, 16), np.uint8), features_ND[:clusters].copy(), choose_engine())
        fit, goal = run_faiss(features_ND, clusters, seed)
        theirs.append(fit)
        ours.append(run_ours(features_ND, clusters, seed, goal))
        if options.sklearn and seed == 0:
            for mini in (False, True):
                other = run_sklearn(features_ND, clusters, seed, mini)
                label = "MiniBatchKMeans" if mini else "KMeans, 25 passes"
                yield f"{'':24} scikit-learn {label}: {other.reached:.1f} s, objective {other.objective / goal:.4f} of faiss's"
    pass_ratio = statistics.median(one.per_pass / other.per_pass for one, other in zip(ours, theirs, strict=True))
    factors = [other.reached / one.reached if one.reached else 0.0 for one, other in zip(ours, theirs, strict=True)]
    yield (
        f"{name:8} K = {clusters:<4} per pass: ours {statistics.median(f.per_pass for f in ours):.3f} s, faiss "
        f"{statistics.median(f.per_pass for f in theirs):.3f} s, ratio {pass_ratio:.2f}; floors: read {read:.3f} s, "
        f"product {product:.3f} s"
    )
    finals = [one.objective / other.objective for one, other in zip(ours, theirs, strict=True)]
    yield (
        f"{'':17} to faiss's objective: ours {_listed(f.reached for f in ours)} s, faiss {_listed(f.reached for f in theirs)} s; "
        f"sooner by {_listed(factors)}; final objective "
        f"{_listed(finals)} of faiss's"
    )


def _listed(values: Iterator[float | None] | list[float]) -> str:
    return " ".join("never" if value is None else f"{value:.3g}" for value in values)


def main() -> None:
    """Print two lines per collection and number of clusters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--clusters", type=int, nargs="+", default=[8, 32, 256])
    parser.add_argument("--sklearn", action="store_true")
    options = parser.parse_args()
    faiss.omp_set_num_threads(CORES)
    print(
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {CORES} cores, {platform.machine()}; {options.rows:,} x {DIM}",
        flush=True,
    )
    for clusters in options.clusters:
        for name, make in (("blobs", blobs), ("icons", icons)):
            for line in measure(name, make, options, clusters):
                print(line, flush=True)


if __name__ == "__main__":
    main()
