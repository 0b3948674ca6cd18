"""The check for drift: another dataset, seen through this run's trunk and sent by its router, beside its training examples.

One unit per shard of assignments and per shard of the other dataset's features; the driver adds up their tables. What the
run held out (validation and test) is measured by the same rule: trunk and centroids never saw it either, so it says how
large the differences are where nothing drifted. Rejected: comparing with the training examples alone, to which a trunk fits
closer than to any other image.

Shape letters: N examples, K parts.
"""

import math
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardmoe.arrays import load_arrays, save_arrays
from hardmoe.config import Json
from hardmoe.data.schemas import ASSIGNMENTS, SPLITS
from hardmoe.partitioning.distances import DistanceTable
from hardmoe.partitioning.fit import read_features
from hardmoe.partitioning.regroup import load_router
from hardmoe.partitioning.shares import chance_total_variation, chi_square_p, total_variation
from hardmoe.stage import Completion, DriverContext, Finished, Phase, Unit, UnitContext
from hardmoe.tables import read_table

TRAINING, HELD_OUT, NEW = "training", "held_out", "new"
FAR = 0.99
"""Beyond this quantile of its part's training distances an example is far out."""
_AT_ONCE = 64
"""So many shards' tables are joined at a time."""


class DriftWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Count this run's examples and the others; compare."""
        features = context.input("features")
        theirs = [path for split in SPLITS for path in features.files(f"split={split}/")]
        places = [("own", path) for path in context.input("partition").files("assignments/")] + [(NEW, p) for p in theirs]
        counted = yield Phase("count", [Unit(f"{who}-{i:05d}", {"who": who, "path": p}) for i, (who, p) in enumerate(places)])
        num_parts: int = context.input("partition").payload["experts"]
        tables = {}
        for who in (TRAINING, HELD_OUT, NEW):
            tables[who] = DistanceTable.empty(num_parts)
            paths = [done.scratch[who] for done in counted if who in done.scratch]
            for start in range(0, len(paths), _AT_ONCE):
                loaded = [load_arrays(context.storage, path) for path in paths[start : start + _AT_ONCE]]
                tables[who] = DistanceTable.joined([tables[who], *map(DistanceTable.from_arrays, loaded)])
        return Finished(compare(tables))

    def run(self, context: UnitContext) -> Json:
        """A shard of either."""
        num_parts: int = context.input("partition").payload["experts"]
        found = _own(context) if context.unit.arguments["who"] == "own" else _new(context)
        for who, (part_N, distance_N) in found.items():
            save_arrays(context.scratch(who), DistanceTable.of(part_N, distance_N, num_parts).to_arrays())
        return {"rows": sum(len(part_N) for part_N, _ in found.values())}


_Assigned = tuple[NDArray[np.int32], NDArray[np.float32]]


def _own(context: UnitContext) -> dict[str, _Assigned]:
    """Part and distance of this run's examples, as the partition has them, but that each is where it would be served.

    A balanced or given part may be farther away than the second, and the other dataset's examples all go to the nearest.
    """
    columns = ["split", "primary", "expert", "distance", "second", "second_distance"]
    table = read_table(context.input("partition").storage, context.unit.arguments["path"], ASSIGNMENTS, columns)
    split_N, primary_N, part_N, distance_N, second_N, second_distance_N = (
        table.column(name).to_numpy(zero_copy_only=False) for name in columns
    )
    is_elsewhere_N = second_distance_N < distance_N
    part_N, distance_N = np.where(is_elsewhere_N, second_N, part_N), np.where(is_elsewhere_N, second_distance_N, distance_N)
    is_train_N, is_primary_N = (split_N == "train").astype(bool), primary_N.astype(bool)
    chosen = {TRAINING: is_train_N & is_primary_N, HELD_OUT: ~is_train_N & is_primary_N}
    return {who: (part_N[rows_N], distance_N[rows_N]) for who, rows_N in chosen.items()}


def _new(context: UnitContext) -> dict[str, _Assigned]:
    """The same of another dataset's examples, as the router sends them."""
    router, parts, distances = load_router(context.input("router")), [], []
    for _, features_ND in read_features(context.input("features"), context.unit.arguments["path"]):
        assignment = router.route(features_ND)
        parts.append(assignment.primary_N)
        distances.append(np.sqrt(assignment.squared_distance_N).astype(np.float32))
    return {NEW: (np.concatenate(parts), np.concatenate(distances))}


def compare(tables: dict[str, DistanceTable]) -> dict[str, Json]:
    """The record's payload: per part and per set sizes, mean distances and how many are far out, then both comparisons."""
    training = tables[TRAINING]
    limits_K = training.limits(FAR)
    sets = {
        who: {"sizes": table.sizes_K.tolist(), "mean_distance": table.means(), "far": table.beyond(limits_K).tolist()}
        for who, table in tables.items()
    }
    against = {who: _against(training, sets[TRAINING], tables[who], sets[who]) for who in (NEW, HELD_OUT)}
    return {"parts": len(limits_K), "sets": sets, "against_training": against}


def _against(training: DistanceTable, trained: Any, table: DistanceTable, found: Any) -> dict[str, Json] | None:
    if not table.num_examples or not training.num_examples:
        return None
    known_K = training.sizes_K > 0  # an expert without training examples has no distance to compare with
    placed = int(table.sizes_K[known_K].sum())
    return {
        "examples": table.num_examples,
        "total_variation": total_variation(trained["sizes"], found["sizes"]),
        "chance_total_variation": chance_total_variation(trained["sizes"], found["sizes"]),
        "chi_square_p": chi_square_p(trained["sizes"], found["sizes"]),
        "distance_ratio": _distance_ratio(trained["mean_distance"], found["mean_distance"], found["sizes"]),
        "far_share": sum(found["far"]) / placed if placed else None,
        "in_parts_without_training": table.num_examples - placed,
    }


def _distance_ratio(trained: Sequence[float | None], found: Sequence[float | None], sizes: Sequence[int]) -> float | None:
    """How many times as far out the examples are as training examples of the same parts are on average."""
    rows = zip(trained, found, sizes, strict=True)
    known = [(size * there, size * here) for there, here, size in rows if there is not None and here is not None]
    usual = math.fsum(there for there, _ in known)
    return math.fsum(here for _, here in known) / usual if usual else None
