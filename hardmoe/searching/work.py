"""The code of the stage `index`: one unit, which streams the vectors three times at most.

    count        how many there are, which decides the kind
    fit          to a sample by hash of the id, where the kind needs that
    add          all of them, beside the exact neighbours of some queries by brute force, against which recall is then measured

Thumbnails are made of a run's own images if there are at most 100,000, for the page of `hardmoe serve`. Rejected: an index per
shard, joined: their lists would have different centroids.

Shape letters: N vectors, Z dims, Q queries, C neighbours.
"""

import io
from collections.abc import Callable, Generator, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.config import Json
from hardmoe.data.config import PILLOW_MAX_PIXELS
from hardmoe.data.ids import id_words, sortable
from hardmoe.data.images import load_square
from hardmoe.data.schemas import PART, SPLITS
from hardmoe.errors import DataError
from hardmoe.neighbours.vector_index import (
    FLAT,
    IndexPlan,
    VectorIndex,
    choose_probes,
    exact_neighbours,
    plan_index,
)
from hardmoe.searching.stage import INDEX_FILE, ROWS_FILE, THUMBNAILS_FILE
from hardmoe.searching.vectors import ROWS, Origins, Piece, embedded_vectors, open_embeddings, own_vectors
from hardmoe.stage import Completion, DriverContext, Finished, Phase, Unit, UnitContext
from hardmoe.storage import open_storage
from hardmoe.tables import build_table, ids_from_array, ids_to_array, iterate_table, write_table

_QUERIES = 500
_NEIGHBOURS = 10
_MOST_THUMBNAILS = 100_000
THUMBNAIL = 96
"""Side in pixels."""
_QUALITY = 85


class IndexWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """One unit."""
        (done,) = yield Phase("index", [Unit("index")])
        return Finished(done.payload)

    def run(self, context: UnitContext) -> Json:
        """The whole index."""
        import pyarrow as pa

        store = ArtifactStore(open_storage(context.stage.operational["root"]))
        vectors: str | None = context.stage.operational["vectors"]
        pieces = _pieces(store, vectors)
        count = sum(len(piece.ids_N16) for piece in pieces())
        if not count:
            raise DataError("there is no embedding to index; embed some images first")
        asked = context.stage.config["asked"]
        plan = plan_index(count, asked["kind"])
        # Those with the smallest hashes come first, so one sample serves both.
        sample_QZ = _sample(pieces, count, max(plan.num_trained, _QUERIES))
        index = VectorIndex.fitted(plan, sample_QZ[: max(plan.num_trained, 1)])
        queries_QZ = sample_QZ[:_QUERIES]
        origins, rows, exact, start = Origins(store) if vectors is None else None, [], None, 0
        for piece in pieces():
            numbers_N = np.arange(start, start + len(piece.ids_N16))
            index.add(piece.vectors_NZ, numbers_N)
            exact = exact_neighbours(queries_QZ, exact, piece.vectors_NZ, numbers_N, min(_NEIGHBOURS, count))
            rows.append(_rows(piece, numbers_N, origins))
            start += len(numbers_N)
            context.progress(start, count)
        assert exact is not None
        probes, recall = choose_probes(index, queries_QZ, exact[0], asked["recall"])
        with context.output(INDEX_FILE) as out:
            out.write(index.to_bytes())
        table = pa.concat_tables(rows)
        write_table(context.output(ROWS_FILE), table)
        told = _told(plan, index, probes)
        if vectors is None and count <= _MOST_THUMBNAILS:
            _write_thumbnails(context, store, table)
        return {"rows": count, "dim": index.dim, "recall@10": recall, "queries": len(queries_QZ), **told}


def _told(plan: IndexPlan, index: VectorIndex, probes: int) -> dict[str, Json]:
    return {"kind": plan.kind} | ({} if plan.kind == FLAT else {"lists": index.num_lists, "probes": probes})


def _pieces(store: ArtifactStore, vectors: str | None) -> Callable[[], Iterator[Piece]]:
    if vectors is None:
        return lambda: own_vectors(store)
    embeddings = open_embeddings(vectors)
    if not embeddings.files("part-", ".parquet"):
        raise DataError(
            f"the embeddings in {vectors} are no Parquet tables; embed again without --format jsonl, into another --out"
        )
    return lambda: embedded_vectors(embeddings)


def _sample(pieces: Callable[[], Iterator[Piece]], count: int, wanted: int) -> NDArray[np.float32]:
    """About so many vectors, those with the smallest ids by hash: the same whatever the order."""
    limit = np.uint64(min(1.0, 1.1 * wanted / count) * (2.0**64 - 2.0**12))
    chosen, keys = [], []
    for piece in pieces():
        mixed_N = id_words(piece.ids_N16)[1] * np.uint64(0x9E3779B97F4A7C15)
        rows = np.flatnonzero(mixed_N <= limit) if wanted < count else np.arange(len(mixed_N))
        chosen.append(piece.vectors_NZ[rows])
        keys.append(mixed_N[rows])
    vectors, order = np.concatenate(chosen), np.argsort(np.concatenate(keys), kind="stable")
    return np.ascontiguousarray(vectors[order[:wanted]] if len(order) else next(pieces()).vectors_NZ[:1])


def _rows(piece: Piece, numbers_N: NDArray[np.int64], origins: Origins | None) -> Json:
    uris = piece.uris if origins is None else origins.of(piece.ids_N16)
    columns = {
        "row": numbers_N,
        "example_id": ids_from_array(piece.ids_N16),
        "source_uri": uris,
        "expert": piece.experts_N,
        "split": [piece.split] * len(numbers_N),
    }
    return build_table(ROWS, columns)


def _write_thumbnails(context: UnitContext, store: ArtifactStore, rows: Json) -> None:
    """`thumbnails.parquet`: row and JPEG, in the order of the rows."""
    import pyarrow as pa

    keys_N = sortable(ids_to_array(rows.column("example_id")))
    order_N = np.argsort(keys_N)
    sorted_N = keys_N[order_N]
    images: dict[int, bytes] = {}
    partition = store.get("partition")
    for path in [path for split in SPLITS for path in partition.files(f"split={split}/")]:
        for table in iterate_table(partition.storage, path, PART, ["example_id", "image"]):
            at = np.searchsorted(sorted_N, sortable(ids_to_array(table.column("example_id"))))
            for place, image in zip(at.tolist(), table.column("image"), strict=True):
                images[int(order_N[place])] = _thumbnail(image.as_py())
            context.progress(len(images), len(keys_N))
    numbers = sorted(images)
    schema = pa.schema([("row", pa.int64()), ("image", pa.binary())])
    table = build_table(schema, {"row": numbers, "image": [images[number] for number in numbers]})
    write_table(context.output(THUMBNAILS_FILE), table, row_group_size=256)


def _thumbnail(data: bytes) -> bytes:
    square_3SS = load_square(data, THUMBNAIL, PILLOW_MAX_PIXELS)
    target = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(square_3SS.transpose(1, 2, 0))).save(target, "JPEG", quality=_QUALITY)
    return target.getvalue()
