"""The router stage: k-means over all training features, pass by pass, every pass a set of units with durable sums.

Where the features are to be projected on principal directions, these are fitted first (`transform_fit`). The driver's part is
`kmeans.refine` with the passes yielded as phases, so a killed fit is replayed from the sums of the passes that finished and
costs at most the unfinished shards of one. With `two_level` it looks for many fine clusters, and one more pass counts how many
rows lie between any two of them, by which `grouping` joins them into parts. Rejected: one unit for the whole fit, which uses one
worker and loses everything, and a checkpoint of the centroids alone, which hides which rows they came from.

Shape letters: N examples, D feature dim, S examples of the sample, K clusters, F fine clusters.
"""

import io
import json
from collections.abc import Generator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hardmoe.arrays import load_arrays, save_arrays
from hardmoe.config import Json
from hardmoe.data.schemas import FEATURES
from hardmoe.errors import DataError
from hardmoe.hashing import hash_fractions
from hardmoe.neighbours.assignment import assign
from hardmoe.neighbours.engine import choose_engine
from hardmoe.partitioning.config import PartitionConfig
from hardmoe.partitioning.grouping import Borders, group_clusters
from hardmoe.partitioning.kmeans import KMeansFit, PassSums, refine, scan_batches
from hardmoe.partitioning.router import Router
from hardmoe.partitioning.scan import blas_threads
from hardmoe.partitioning.starting import Ladder, best_start, rung_rows
from hardmoe.partitioning.transform import FeatureTransform
from hardmoe.partitioning.transform_fit import TRANSFORM_PHASES, load_transform, run_transform, transform_phases
from hardmoe.stage import Completion, DriverContext, Finished, InputArtifact, Phase, Unit, UnitContext
from hardmoe.storage import Storage
from hardmoe.tables import ids_to_array, iterate_table, vectors_to_array

_BATCH_ROWS = 65_536
_SPARE = 8
"""So many times the rows that the starts need are sampled, for the case that many of them are copies."""


class RouterWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Draw the sample, choose the seeds, refine until converged."""
        config = context.stage.section(PartitionConfig, "partition")
        features = context.input("features")
        paths = features.files("split=train/")
        num_examples: int = features.payload["rows"]["train"]
        _check_enough(num_examples, config)
        fraction = min(1.0, min(config.sample_size, _SPARE * rung_rows(config.num_clusters)[-1]) / num_examples)
        fitted = yield from transform_phases(context, config, paths, features.payload["dim"])
        shards = [{"path": path, **fitted.arguments} for path in paths]
        sampled = yield Phase("sample", [Unit(f"{i:05d}", {**shard, "fraction": fraction}) for i, shard in enumerate(shards)])
        shared = context.share("samples.json", json.dumps([dict(done.scratch) for done in sampled]).encode())
        attempts = [Unit(f"{i:02d}", {"samples": shared, "attempt": i}) for i in range(config.num_starts)]
        started = yield Phase("start", attempts)
        starts = [_read_fit(context, done) for done in started]
        best = context.share("start.npy", _to_npy(best_start(starts).centroids_KD))
        (climbed,) = yield Phase("climb", [Unit("climb", {"samples": shared, "centroids": best})])
        fit = yield from self._passes(context, shards, _read_fit(context, climbed).centroids_KD, config)
        counts_K, groups = fit.counts_K, None
        if config.method == "two_level":
            borders = yield from self._borders(context, shards, fit.centroids_KD)
            groups = group_clusters(fit.centroids_KD, borders, config.experts)
            counts_K = np.bincount(groups, borders.counts_F).astype(np.int64)
        _check_collapse(counts_K, config)
        router = Router(fitted.transform, fit.centroids_KD, groups)
        payload = {
            "experts": config.experts,
            "dim": router.dim,
            "objective": fit.objective_per_pass,
            "converged": fit.converged,
            "reseeded": [{"pass": number, "expert" if groups is None else "fine_cluster": c} for number, c in fit.reseeded],
            "sample": sum(done.payload["rows"] for done in sampled),
            "starts": [start.objective_per_pass[-1] for start in starts],
            **fitted.facts,
        }
        if fitted.transform.projection is None:  # else such a feature has a direction like any other
            payload["zero_vectors"] = sum(done.payload["zero_vectors"] for done in sampled)
        if groups is not None:
            payload["fine_clusters"] = np.bincount(groups).tolist()
        return Finished(payload, router.to_files())

    def _borders(
        self, context: DriverContext, shards: Sequence[Json], centroids_FD: NDArray[np.float32]
    ) -> Generator[Phase, list[Completion], Borders]:
        """Count the rows between every two fine clusters."""
        shared = context.share("fine-centroids.npy", _to_npy(centroids_FD))
        units = [Unit(f"{i:05d}", {**shard, "centroids": shared}) for i, shard in enumerate(shards)]
        counted = yield Phase("borders", units)
        loaded = (Borders.from_arrays(load_arrays(context.storage, done.scratch["borders"])) for done in counted)
        return sum(loaded, start=Borders.none(len(centroids_FD)))

    def _passes(
        self, context: DriverContext, shards: Sequence[Json], start_KD: NDArray[np.float32], config: PartitionConfig
    ) -> Generator[Phase, list[Completion], KMeansFit]:
        """Drive `refine`: each pass that it asks for becomes a phase, and the phase's sums are its answer."""
        refining = refine(start_KD, config.max_passes, config.tolerance, config.spherical)
        try:
            number, centroids_KD = next(refining)
            while True:
                shared = context.share(f"centroids-{number:04d}.npy", _to_npy(centroids_KD))
                units = [Unit(f"{i:05d}", {**shard, "centroids": shared}) for i, shard in enumerate(shards)]
                done = yield Phase(f"pass-{number:04d}", units)
                total = PassSums.zero(*centroids_KD.shape)
                for completion in done:
                    total += PassSums.from_arrays(load_arrays(context.storage, completion.scratch["sums"]))
                number, centroids_KD = refining.send(total)
        except StopIteration as stop:
            fit: KMeansFit = stop.value
            return fit

    def run(self, context: UnitContext) -> Json:
        """A shard's share of the sample, of a pass or of the borders; a start; or what the transform's fit consists of."""
        with blas_threads(context.stage.resources.num_cpus):
            return self._run(context)

    def _run(self, context: UnitContext) -> Json:
        if context.phase in ("start", "climb"):
            return _start(context)
        config = context.stage.section(PartitionConfig, "partition")
        features = context.input("features")
        if context.phase in TRANSFORM_PHASES:
            paths = context.unit.arguments.get("paths", [])
            return run_transform(context, (vectors for path in paths for _, vectors in read_features(features, path)), config)
        path, transform = context.unit.arguments["path"], load_transform(context, config)
        if context.phase == "sample":
            return _sample(context, features, path, transform)
        centroids_KD, engine = _read_centroids(context), choose_engine()
        if context.phase == "borders":
            borders, size = Borders.none(len(centroids_KD)), len(centroids_KD)
            for _, features_ND in read_features(features, path):
                borders += Borders.of(assign(transform(features_ND), centroids_KD, engine), size)
            save_arrays(context.scratch("borders"), borders.to_arrays())
            return {"rows": int(borders.counts_F.sum())}
        batches = ((transform(features_ND), ids_N16) for ids_N16, features_ND in read_features(features, path))
        total = scan_batches(batches, centroids_KD, engine)
        save_arrays(context.scratch("sums"), total.to_arrays())
        return {"rows": total.sums.num_rows}


def read_features(features: InputArtifact, path: str) -> Generator[tuple[NDArray[np.uint8], NDArray[np.float32]], None, None]:
    """Ids uint8 [N, 16] and features float32 [N, D] of a shard, in pieces that fit in memory."""
    for table in iterate_table(features.storage, path, FEATURES, rows=_BATCH_ROWS):
        vectors_ND = vectors_to_array(table.column("feature"))
        yield ids_to_array(table.column("example_id")), vectors_ND.astype(np.float32)


def _sample(context: UnitContext, features: InputArtifact, path: str, transform: FeatureTransform) -> Json:
    """The rows whose hash falls under the sample's share: the same rows however they are sharded."""
    seed, fraction = context.stage.config["seed"], context.unit.arguments["fraction"]
    ids, kept, zeros = [], [], 0
    for ids_N16, features_ND in read_features(features, path):
        chosen_N = hash_fractions(ids_N16, seed, "router-sample") < fraction
        ids.append(ids_N16[chosen_N])
        kept.append(transform(features_ND[chosen_N]))
        zeros += int((~features_ND.any(axis=1)).sum())
    save_arrays(context.scratch("ids"), {"ids": np.concatenate(ids)})
    save_arrays(context.scratch("features"), {"features": np.concatenate(kept)})
    return {"rows": sum(map(len, ids)), "zero_vectors": zeros}


def _start(context: UnitContext) -> Json:
    """One of several starts, or the best one refined; both on rows of the sample."""
    arguments, config = context.unit.arguments, context.stage.section(PartitionConfig, "partition")
    sample = _Sample(context.storage, json.loads(context.storage.read_bytes(arguments["samples"])))
    ladder = Ladder(sample.ids_S16, sample.read, config.num_clusters, context.stage.config["seed"], config.spherical)
    found = ladder.climb(_read_centroids(context)) if context.phase == "climb" else ladder.start(arguments["attempt"])
    save_arrays(context.scratch("centroids"), {"centroids": found.centroids_KD})
    return {"objective": found.objective_per_pass, "converged": found.converged}


class _Sample:
    """The files that the sample's units left, one shard's at a time in memory.

    Args:
        storage: the run's root.
        files: of every shard the paths of its `ids` and its `features`.
    """

    def __init__(self, storage: Storage, files: Sequence[Mapping[str, str]]) -> None:
        ids = [load_arrays(storage, file["ids"])["ids"] for file in files]
        self.ids_S16: NDArray[np.uint8] = np.concatenate(ids)
        self._storage, self._files = storage, files
        self._starts = np.cumsum([0, *map(len, ids)])

    def read(self, rows_n: NDArray[np.intp]) -> NDArray[np.float32]:
        """Features of some rows, in the order asked for, float32 [n, D]."""
        found, places = [], []
        shards_n = np.searchsorted(self._starts, rows_n, side="right") - 1
        for shard in np.unique(shards_n).tolist():
            places.append(np.flatnonzero(shards_n == shard))
            features_SD = load_arrays(self._storage, self._files[shard]["features"])["features"]
            found.append(features_SD[rows_n[places[-1]] - self._starts[shard]])
        features_nD: NDArray[np.float32] = np.concatenate(found)[np.argsort(np.concatenate(places))]
        return features_nD


def _read_centroids(context: UnitContext) -> NDArray[np.float32]:
    """The centroids that the driver shared with the unit."""
    shared = io.BytesIO(context.storage.read_bytes(context.unit.arguments["centroids"]))
    centroids_KD: NDArray[np.float32] = np.load(shared, allow_pickle=False)
    return centroids_KD


def _read_fit(context: DriverContext, done: Completion) -> KMeansFit:
    centroids_KD = load_arrays(context.storage, done.scratch["centroids"])["centroids"]
    return KMeansFit(centroids_KD, done.payload["objective"], [], done.payload["converged"], np.zeros(0, np.int64))


def _check_enough(num_examples: int, config: PartitionConfig) -> None:
    """Raise if there are fewer examples than clusters to be found."""
    if num_examples < config.experts:
        raise DataError(
            f"partition.experts is {config.experts} but there are only {num_examples} training examples; "
            f"ask for {num_examples} experts at most, or add data"
        )
    if num_examples < config.num_clusters:
        raise DataError(
            f"partition.method two_level looks for {config.num_clusters} fine clusters, but there are only {num_examples} "
            f"training examples; set partition.fine_clusters to {num_examples} or less, or add data"
        )


def _check_collapse(counts_K: NDArray[np.int64], config: PartitionConfig) -> None:
    """Raise if nearly all examples went to one expert."""
    share = float(counts_K.max() / counts_K.sum())
    if config.experts > 1 and share > config.max_share:
        reason = "the features hardly differ; train the trunk longer, set partition.transform to l2"
        if config.method == "two_level":
            reason = "hardly any border runs through them; set partition.method: kmeans, ask for more experts"
        raise DataError(
            f"one of {config.experts} parts holds {100 * share:.1f} % of the examples, more than partition.max_share="
            f"{config.max_share:g}: {reason}, or raise max_share"
        )


def _to_npy(array: NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
