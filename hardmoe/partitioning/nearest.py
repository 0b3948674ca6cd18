"""The k nearest experts of every held-out image, with their distances: what several experts at use go by.

Only the validation and the test split, by the features that are there; of a second dataset the training split as well. The
nearest one is the expert that the router sends the image to, whatever part the dataset gives it.

Shape letters: N examples, D trunk features, k experts of each.
"""

from collections.abc import Generator

import numpy as np

from hardmoe.config import Json
from hardmoe.data.schemas import NEAREST, SPLITS
from hardmoe.partitioning.fit import read_features
from hardmoe.partitioning.regroup import load_router
from hardmoe.stage import Completion, DriverContext, Finished, Phase, Unit, UnitContext, name_within
from hardmoe.tables import build_table, ids_from_array, write_table

_HELD_OUT = ("validation", "test")


class NearestWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Every shard of the splits."""
        features = context.input("features")
        splits = SPLITS if context.stage.config.get("training") else _HELD_OUT
        paths = [name_within(features, path) for split in splits for path in features.files(f"split={split}/")]
        done = yield Phase("route", [Unit(f"{index:05d}", {"path": path}) for index, path in enumerate(paths)])
        return Finished({"rows": sum(d.payload["rows"] for d in done), "top_k": context.stage.config["top_k"]})

    def run(self, context: UnitContext) -> Json:
        """One shard."""
        features, relative = context.input("features"), context.unit.arguments["path"]
        router, top_k = load_router(context.input("router")), context.stage.config["top_k"]
        ids, experts, distances = [], [], []
        for ids_N16, features_ND in read_features(features, features.path(relative)):
            nearest_Nk, squared_Nk = router.nearest(features_ND, top_k)
            ids.append(np.repeat(ids_N16, top_k, axis=0))
            experts.append(nearest_Nk.ravel())
            distances.append(squared_Nk.ravel())
        columns = {
            "example_id": ids_from_array(np.concatenate([np.zeros((0, 16), np.uint8), *ids])),
            "expert": np.concatenate([np.zeros(0, np.int32), *experts]),
            "squared_distance": np.concatenate([np.zeros(0), *distances]),
        }
        write_table(context.output(relative), build_table(NEAREST, columns))
        return {"rows": sum(len(some) for some in ids) // top_k}
