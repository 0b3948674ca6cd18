"""The vectors that are indexed, with the rows that say what each is: of a run's own examples, or of tables that were embedded.

A run has the embeddings of all its examples already, in its experts' own spaces; only the alignment is left to do.

Shape letters: N examples, Z unified dims.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from hardmoe.artifacts.store import Artifact, ArtifactStore
from hardmoe.data.ids import sortable
from hardmoe.data.schemas import EMBEDDINGS, ORIGIN, SPLITS
from hardmoe.models.shared_decoder import SharedDecoder, load_shared_decoder
from hardmoe.neighbours.vector_index import unit_rows
from hardmoe.storage import open_storage
from hardmoe.tables import ID_TYPE, ids_to_array, iterate_table, read_table, vectors_to_array

_ROWS_AT_ONCE = 8192
ROWS = pa.schema(
    [
        ("row", pa.int64()),
        ("example_id", ID_TYPE),
        ("source_uri", pa.string()),
        ("expert", pa.int32()),
        ("split", pa.string()),
    ]
)
"""`index/rows.parquet`: what the vector of each number is; `split` is null where there are none."""


@dataclass(frozen=True)
class Piece:
    """Some vectors."""

    ids_N16: NDArray[np.uint8]
    experts_N: NDArray[np.int32]
    vectors_NZ: NDArray[np.float32]
    """Of length 1."""
    uris: list[str | None] | None
    """None where `Origins` knows them."""
    split: str | None


def own_vectors(store: ArtifactStore) -> Iterator[Piece]:
    """A run's examples, from its cached embeddings."""
    embeddings, decoder = store.get("embeddings"), load_shared_decoder(store.get("decoder"))
    for split in SPLITS:
        for path in embeddings.files(f"split={split}/"):
            for table in iterate_table(embeddings.storage, path, EMBEDDINGS, rows=_ROWS_AT_ONCE):
                if table.num_rows:
                    yield _own(table, decoder, split)


def _own(table: Any, decoder: SharedDecoder, split: str) -> Piece:
    experts_N = table.column("expert").to_numpy().astype(np.int32)
    features = torch.from_numpy(vectors_to_array(table.column("embedding")).astype(np.float32))
    with torch.inference_mode():
        unified_NZ = decoder.align(features, torch.from_numpy(experts_N.astype(np.int64))).numpy()
    return Piece(ids_to_array(table.column("example_id")), experts_N, unit_rows(unified_NZ), None, split)


def embedded_vectors(embeddings: Artifact) -> Iterator[Piece]:
    """The rows of tables that `hardmoe embed` wrote."""
    import pyarrow.parquet as pq

    for path in embeddings.files("part-", ".parquet"):
        with embeddings.storage.open_input(path) as source:
            for batch in pq.ParquetFile(source).iter_batches(batch_size=_ROWS_AT_ONCE, use_threads=False):
                column = batch.column("embedding")
                vectors_NZ = column.flatten().to_numpy().reshape(len(column), column.type.list_size)
                ids = ids_to_array(pa.chunked_array([batch.column("example_id")]))
                experts_N = batch.column("expert").to_numpy()
                yield Piece(ids, experts_N, unit_rows(vectors_NZ), batch.column("source_uri").to_pylist(), None)


class Origins:
    """Where a run's examples came from: one place for each, of all its copies the first by name."""

    def __init__(self, store: ArtifactStore) -> None:
        dataset = store.get("dataset")
        tables = [read_table(dataset.storage, path, ORIGIN, ["example_id", "source_uri"]) for path in dataset.files("origin/")]
        table = pa.concat_tables(tables).sort_by([("example_id", "ascending"), ("source_uri", "ascending")])
        self._keys_N = sortable(ids_to_array(table.column("example_id")))
        self._uris = table.column("source_uri").combine_chunks()

    def of(self, ids_N16: NDArray[np.uint8]) -> list[str | None]:
        """The places of some examples."""
        at_N = np.searchsorted(self._keys_N, sortable(ids_N16))
        uris: list[str | None] = self._uris.take(pa.array(np.minimum(at_N, len(self._keys_N) - 1))).to_pylist()
        return uris


def open_embeddings(root: str) -> Artifact:
    """The embeddings that `hardmoe embed` wrote into a directory."""
    return ArtifactStore(open_storage(root)).get("embeddings")
