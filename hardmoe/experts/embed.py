"""The embeddings stage: every example through its own expert, once, cached as float16.

Everything after it (the shared decoder, the controls, the evaluation) reads these tables, so no expert runs twice. The dense
baseline's embeddings are the same stage over the undivided dataset with a single network.
"""

from collections.abc import Generator

import numpy as np
import pyarrow as pa

from hardmoe.artifacts.names import expert_name
from hardmoe.config import Json
from hardmoe.data.reading import example_shards, open_examples
from hardmoe.data.schemas import SPLITS
from hardmoe.errors import DataError
from hardmoe.stage import Completion, Context, DriverContext, Finished, InputArtifact, Phase, Unit, UnitContext, name_within
from hardmoe.tables import ID_TYPE, build_table, ids_from_array, vector_type, vectors_from_array, write_table


class EmbeddingsWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Every shard of every part."""
        networks = _networks(context)
        dims = sorted({network.payload["num_features"] for network in networks})
        if len(dims) > 1:
            raise DataError(f"the experts have features of different widths {dims}; one decoder needs one width")
        examples = context.input("examples")
        partitioned: bool = context.stage.config["partitioned"]
        units = []
        for split in SPLITS:
            shards = [
                (expert, name_within(examples, path))
                for expert in range(len(networks))
                for path in example_shards(examples, split, expert if partitioned else None)
            ]
            for index, (expert, path) in enumerate(shards):
                output = f"split={split}/part-{index:05d}-of-{len(shards):05d}.parquet"
                units.append(Unit(f"{split}-{index:05d}", {"path": path, "expert": expert, "output": output}))
        done = yield Phase("embed", units)
        return Finished({"rows": sum(d.payload["rows"] for d in done), "dim": dims[0], "experts": len(networks)})

    def run(self, context: UnitContext) -> Json:
        """One shard of one part."""
        # Not for the driver, which only lists shards.
        from hardmoe.training.extract import extract_shard
        from hardmoe.training.network import architecture_of, load_network, unit_device

        arguments, examples = context.unit.arguments, open_examples(context, "examples")
        network = context.input(expert_name(arguments["expert"]))
        device, model = unit_device(context), load_network(network)
        seen = architecture_of(network)
        path = examples.path(arguments["path"])
        ids_N16, embeddings_ND = extract_shard(context, model.backbone, seen.image_size, examples, path, device, seen.reduced)
        schema = pa.schema([("example_id", ID_TYPE), ("expert", pa.int32()), ("embedding", vector_type(embeddings_ND.shape[1]))])
        columns = {
            "example_id": ids_from_array(ids_N16),
            "expert": np.full(len(ids_N16), arguments["expert"], np.int32),
            "embedding": vectors_from_array(embeddings_ND),
        }
        write_table(context.output(arguments["output"]), build_table(schema, columns))
        return {"rows": len(ids_N16)}


def _networks(context: Context) -> list[InputArtifact]:
    return [context.input(expert_name(expert)) for expert in range(context.stage.config["experts"])]
