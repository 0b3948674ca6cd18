"""A partition that a column of the dataset gives: the parts of a shard's examples, and the router that comes of them.

The column is the truth for every example it names, in training, validation and test alike. A router is needed for images that
come later: its centroids are the means of every part's training features, as one pass of k-means from this assignment would
have them, from the same exact sums. Where a part's examples lie together it sends them back there; the partition's record
says how many it would send elsewhere.

Shape letters: N examples, D feature dim, K experts.
"""

from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray

from hardmoe.arrays import load_arrays, save_arrays
from hardmoe.config import Json
from hardmoe.data.given_parts import check_parts
from hardmoe.data.schemas import PARTS, PARTS_FOLDER
from hardmoe.errors import CorruptFileError, DataError
from hardmoe.neighbours.assignment import Assignment
from hardmoe.partitioning.config import PartitionConfig
from hardmoe.partitioning.exact_sums import ClusterSums
from hardmoe.partitioning.fit import read_features
from hardmoe.partitioning.router import Router
from hardmoe.partitioning.transform_fit import TRANSFORM_PHASES, load_transform, run_transform, transform_phases
from hardmoe.stage import Completion, DriverContext, Finished, InputArtifact, Phase, Unit, UnitContext, name_within
from hardmoe.tables import ids_to_array, read_table


class GivenRouterWork:
    """The router stage of a given partition: one pass over the training features."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Sum every part's features, shard by shard, and take the means."""
        config = context.stage.section(PartitionConfig, "partition")
        parts = context.input("dataset").payload["parts"]
        check_parts(parts, config.experts)
        features = context.input("features")
        paths = [name_within(features, path) for path in features.files("split=train/")]
        fitted = yield from transform_phases(context, config, paths, features.payload["dim"])
        summed = yield Phase("sum", [Unit(f"{i:05d}", {"path": path, **fitted.arguments}) for i, path in enumerate(paths)])
        total = ClusterSums.zero(config.experts, fitted.transform.width(features.payload["dim"]))
        for done in summed:
            total += ClusterSums.from_arrays(load_arrays(context.storage, done.scratch["sums"]))
        if len(empty := np.flatnonzero(total.counts_K == 0)):
            raise DataError(
                f"no training example is in part {parts['values'][empty[0]]!r} by dataset.part_column {parts['column']!r}, "
                "so it has no centroid; add examples to it, or join it with another part and lower partition.experts"
            )
        centroids_KD = (total.totals_KD / total.counts_K[:, None]).astype(np.float32)
        router = Router(fitted.transform, centroids_KD)
        # No k-means was fitted, so there is no objective that could have converged.
        payload = {"experts": config.experts, "dim": router.dim, "objective": [], "converged": True, "reseeded": []}
        payload |= fitted.facts
        return Finished(payload, router.to_files())

    def run(self, context: UnitContext) -> Json:
        """The sums of one shard, or what the transform's fit consists of."""
        config = context.stage.section(PartitionConfig, "partition")
        features = context.input("features")
        if context.phase in TRANSFORM_PHASES:
            paths = [features.path(path) for path in context.unit.arguments.get("paths", [])]
            return run_transform(context, (vectors for path in paths for _, vectors in read_features(features, path)), config)
        path, transform = context.unit.arguments["path"], load_transform(context, config)
        ids_N16, parts_N = read_parts(context.input("dataset"), path)
        total = ClusterSums.zero(config.experts, transform.width(features.payload["dim"]))
        start = 0
        for ids_n16, features_nD in read_features(features, features.path(path)):
            rows = slice(start, start + len(ids_n16))
            parts_n = aligned_parts(path, ids_n16, ids_N16[rows], parts_N[rows])
            total += ClusterSums.from_batch(transform(features_nD), _nowhere_else(parts_n), config.experts)
            start = rows.stop
        aligned_parts(path, ids_N16[:0], ids_N16[start:], parts_N[start:])
        save_arrays(context.scratch("sums"), total.to_arrays())
        return {"rows": total.num_rows}


def read_parts(dataset: InputArtifact, path: str) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Ids uint8 [N, 16] and parts int32 [N] of one shard of the dataset, by its path there."""
    table = read_table(dataset.storage, dataset.path(f"{PARTS_FOLDER}/{path}"), PARTS)
    return ids_to_array(table.column("example_id")), table.column("part").to_numpy().astype(np.int32)


def aligned_parts(
    path: str, wanted_N16: NDArray[np.uint8], ids_N16: NDArray[np.uint8], parts_N: NDArray[np.int32]
) -> NDArray[np.int32]:
    """The parts, if they are of the wanted examples.

    Raises:
        CorruptFileError: they are of others.
    """
    if not np.array_equal(wanted_N16, ids_N16):
        raise CorruptFileError(f"the features of {path} are of other examples than the dataset's; rebuild the features")
    return parts_N


def _nowhere_else(parts_N: NDArray[np.int32]) -> Assignment:
    """An assignment to these parts, of which nothing but the parts is known."""
    return Assignment(parts_N, np.full(len(parts_N), -1, np.int32), np.zeros(len(parts_N)))
