"""Held-out images through their k nearest experts: k rows an image, the nearest expert's first.

One unit per shard of the dataset, which reads the shard once for every expert that somebody in it is near to and decodes only
that expert's images. Rejected: a unit per expert, of which each would read every shard.

Shape letters: N examples, k experts of each, P = N k pairs, E features of an expert.
"""

from collections.abc import Generator

import numpy as np
import pyarrow as pa

from hardmoe.artifacts.names import expert_name
from hardmoe.config import Json
from hardmoe.data.ids import sortable
from hardmoe.data.reading import open_examples, read_examples
from hardmoe.data.schemas import NEAREST
from hardmoe.stage import Completion, DriverContext, Finished, Phase, Unit, UnitContext, name_within
from hardmoe.tables import build_table, ids_to_array, read_table, vector_type, vectors_from_array, write_table


class NearestEmbeddingsWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Every shard."""
        nearest = context.input("nearest")
        paths = [name_within(nearest, path) for path in nearest.files("split=")]
        done = yield Phase("embed", [Unit(f"{index:05d}", {"path": path}) for index, path in enumerate(paths)])
        network = context.input(expert_name(0))
        dim, top_k = network.payload["num_features"], nearest.payload["top_k"]
        return Finished({"rows": sum(d.payload["rows"] for d in done), "dim": dim, "top_k": top_k})

    def run(self, context: UnitContext) -> Json:
        """One shard."""
        from hardmoe.training.extract import COLUMNS, ROWS_AT_ONCE, extract_tables
        from hardmoe.training.network import architecture_of, load_network, unit_device

        relative, nearest, dataset = context.unit.arguments["path"], context.input("nearest"), open_examples(context, "dataset")
        table, device = read_table(nearest.storage, nearest.path(relative), NEAREST), unit_device(context)
        keys_P, experts_P = sortable(ids_to_array(table.column("example_id"))), table.column("expert").to_numpy()
        embeddings_PE = np.zeros((len(keys_P), context.input(expert_name(0)).payload["num_features"]), np.float16)
        for expert in np.unique(experts_P).tolist():
            rows = np.flatnonzero(experts_P == expert)
            network, seen = load_network(artifact := context.input(expert_name(expert))), architecture_of(artifact)
            tables = read_examples(dataset, [dataset.path(relative)], columns=COLUMNS, rows=ROWS_AT_ONCE)
            wanted = (table.filter(np.isin(sortable(ids_to_array(table.column("example_id"))), keys_P[rows])) for table in tables)
            ids_n16, found_nE = extract_tables(context, network.backbone, seen.image_size, wanted, relative, device, seen.reduced)
            keys_n = sortable(ids_n16)
            order_n = np.argsort(keys_n)
            embeddings_PE[rows] = found_nE[order_n[np.searchsorted(keys_n[order_n], keys_P[rows])]]
        schema = NEAREST.append(pa.field("embedding", vector_type(embeddings_PE.shape[1])))
        columns = {name: table.column(name) for name in NEAREST.names} | {"embedding": vectors_from_array(embeddings_PE)}
        write_table(context.output(relative), build_table(schema, columns))
        return {"rows": len(keys_P)}
