"""What the bulk stages write: tables of tags or of places in the unified space, as Parquet or as JSON Lines.

Shape letters: N images, Z unified dims.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pyarrow as pa

from hardmoe.bulk.answers import Answers
from hardmoe.bulk.stage import Format
from hardmoe.config import Json
from hardmoe.data.schemas import QUARANTINE
from hardmoe.data.sources.base import BadExample
from hardmoe.mixture import Mixture
from hardmoe.storage import OutputFile
from hardmoe.tables import ID_TYPE, build_table, write_table

_ROWS_AT_ONCE = 1024
"""Rows whose probabilities of all tags are in memory together."""

_SOURCE = [("source_uri", pa.string()), ("example_id", ID_TYPE), ("expert", pa.int32())]
PREDICTED = pa.schema([*_SOURCE, ("tags", pa.list_(pa.string())), ("probabilities", pa.list_(pa.float32()))])
"""`predictions/`: of every image the k most probable tags, best first; none of an image that is refused."""


def embedded_schema(dim: int) -> Any:
    """`embeddings/`: of every image its place in the unified space."""
    return pa.schema([*_SOURCE, ("embedding", pa.list_(pa.float32(), dim))])


def predicted_rows(mixture: Mixture, answers: Answers, k: int) -> Iterator[dict[str, Json]]:
    """The k best tags of every image, as plain values."""
    for start in range(0, len(answers.uris), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        probabilities_nV = mixture.decode(answers.unified_NZ[some])
        best = mixture.best(probabilities_nV, answers.experts_N[some], k, answers.refused_N[some])
        for uri, identity, found in zip(answers.uris[some], answers.ids[some], best, strict=True):
            row = {"source_uri": uri, "example_id": identity, "expert": found.expert}
            yield {**row, "tags": found.tags, "probabilities": found.probabilities}


def embedded_rows(answers: Answers) -> Iterator[dict[str, Json]]:
    """The place of every image, as plain values."""
    vectors = answers.unified_NZ.numpy()
    for uri, identity, expert, vector in zip(answers.uris, answers.ids, answers.experts_N.tolist(), vectors, strict=True):
        yield {"source_uri": uri, "example_id": identity, "expert": expert, "embedding": vector.tolist()}


def json_line(row: dict[str, Json]) -> str:
    """A row as a line of JSON, its id in hexadecimal digits; floats with the nine digits that tell any two float32 apart."""
    shown = {key: value.hex() if isinstance(value, bytes) else value for key, value in row.items()}
    for key in ("probabilities", "embedding"):
        if key in shown:
            shown[key] = [float(f"{value:.9g}") for value in shown[key]]
    return json.dumps(shown, ensure_ascii=False) + "\n"


def write_predictions(out: AbstractContextManager[OutputFile], mixture: Mixture, answers: Answers, k: int, kind: Format) -> None:
    """One shard of `predictions/`."""
    rows = predicted_rows(mixture, answers, k)
    if kind == "jsonl":
        _write_lines(out, rows)
        return
    listed = list(rows)
    write_table(out, build_table(PREDICTED, {name: [row[name] for row in listed] for name in PREDICTED.names}))


def write_embeddings(out: AbstractContextManager[OutputFile], answers: Answers, kind: Format) -> None:
    """One shard of `embeddings/`."""
    if kind == "jsonl":
        _write_lines(out, embedded_rows(answers))
        return
    dim = answers.unified_NZ.shape[1]
    flat = pa.array(np.ascontiguousarray(answers.unified_NZ.numpy()).reshape(-1))
    columns = {
        "source_uri": answers.uris,
        "example_id": answers.ids,
        "expert": answers.experts_N,
        "embedding": pa.FixedSizeListArray.from_arrays(flat, dim),
    }
    write_table(out, build_table(embedded_schema(dim), columns))


def write_bad(out: AbstractContextManager[OutputFile], bad: Sequence[BadExample], kind: Format) -> None:
    """One shard of `quarantine/`."""
    rows = [{"source_uri": row.source_uri, "reason": row.reason} for row in bad]
    if kind == "jsonl":
        _write_lines(out, iter(rows))
    else:
        write_table(out, build_table(QUARANTINE, {name: [row[name] for row in rows] for name in QUARANTINE.names}))


def _write_lines(out: AbstractContextManager[OutputFile], rows: Iterator[dict[str, Json]]) -> None:
    with out as sink:
        for row in rows:
            sink.write(json_line(row).encode())
