"""The features stage: one unit per dataset shard, decode beside the device, no pixels anywhere else.

The driver, which only lists shards, does without torch: four seconds sooner, the workers start.
"""

from collections.abc import Generator

import pyarrow as pa

from hardmoe.config import Json
from hardmoe.data.reading import open_examples
from hardmoe.data.schemas import SPLITS
from hardmoe.stage import Completion, DriverContext, Finished, Phase, Unit, UnitContext, name_within
from hardmoe.tables import ID_TYPE, build_table, ids_from_array, vector_type, vectors_from_array, write_table


class FeaturesWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Every shard of every split, once."""
        dataset = context.input("dataset")
        units = []
        for split in SPLITS:
            for path in dataset.files(f"split={split}/"):
                relative = name_within(dataset, path)
                units.append(
                    Unit(f"{split}-{relative.rpartition('/')[2].removesuffix('.parquet')}", {"path": relative, "split": split})
                )
        done = yield Phase("extract", units)
        rows = {
            split: sum(d.payload["rows"] for d, u in zip(done, units, strict=True) if u.arguments["split"] == split)
            for split in SPLITS
        }
        return Finished({"rows": rows, "dim": context.input("trunk").payload["num_features"]})

    def run(self, context: UnitContext) -> Json:
        """One shard."""
        from hardmoe.training.extract import extract_shard
        from hardmoe.training.network import architecture_of, load_network, unit_device

        trunk, dataset = context.input("trunk"), open_examples(context, "dataset")
        device, relative = unit_device(context), context.unit.arguments["path"]
        model = load_network(trunk)
        seen = architecture_of(trunk)
        path = dataset.path(relative)
        ids_N16, features_ND = extract_shard(context, model.backbone, seen.image_size, dataset, path, device, seen.reduced)
        schema = pa.schema([("example_id", ID_TYPE), ("feature", vector_type(features_ND.shape[1]))])
        columns = {"example_id": ids_from_array(ids_N16), "feature": vectors_from_array(features_ND)}
        write_table(context.output(relative), build_table(schema, columns))
        return {"rows": len(ids_N16)}
