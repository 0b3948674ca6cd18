"""Ingesting one shard of a source: every row becomes a row of metadata, or a row in quarantine with its reason.

Images are looked at one at a time; what is kept of each is a few hundred bytes, and those that are to be copied are appended
to one file as they come. So memory does not grow with the size of images or of the shard. Rejected: holding a shard's images
to sort them, which a 10 GB tar would not survive.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardmoe.config import Json
from hardmoe.data.config import DatasetConfig
from hardmoe.data.given_parts import distinct_values
from hardmoe.data.ids import content_id
from hardmoe.data.images import UndecodableImageError, decode, shrink
from hardmoe.data.isolation import IsolatedDecoder
from hardmoe.data.perceptual import THUMBNAIL_PIXELS, perceptual_hashes, thumbnail
from hardmoe.data.schemas import INGESTED, QUARANTINE, SPLITS
from hardmoe.data.shuffle import write_buckets
from hardmoe.data.sources.base import BadExample, RawExample, SourceShard
from hardmoe.data.sources.registry import open_source
from hardmoe.errors import DataError
from hardmoe.stage import UnitContext
from hardmoe.storage import OutputFile
from hardmoe.tables import build_table, ids_to_array, write_table

_HASHED_AT_ONCE = 1024
_NUMBERS = re.compile(r"\b\d+\b")
_MOST_LOGGED = 1000
Decoder = Callable[[bytes], NDArray[np.uint8]]
logger = logging.getLogger("hardmoe")


@dataclass
class _Rows:
    """The columns of `INGESTED`, growing."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in INGESTED.names})

    def append(self, **values: Any) -> None:
        for name, column in self.columns.items():
            column.append(values[name])

    def __len__(self) -> int:
        return len(self.columns["content_id"])


def ingest_shard(context: UnitContext, config: DatasetConfig) -> Json:
    """Read, check, hash and put by the rows of one shard."""
    arguments = context.unit.arguments
    shard = SourceShard(arguments["shard"]["name"], arguments["shard"]["items"])
    copying = arguments["store"] == "copy"
    rows, bad = _Rows(), list[BadExample]()
    with ExitStack() as stack:
        images = stack.enter_context(context.scratch("images")) if copying else None
        decoder: Decoder = partial(decode, max_pixels=config.max_pixels)
        if context.is_isolated:
            decoder = stack.enter_context(IsolatedDecoder(config.max_pixels))
        for count, row in enumerate(open_source(config).read(shard)):
            checked = _checked(row, config, decoder, images, arguments)
            if isinstance(checked, BadExample):
                bad.append(checked)
            else:
                rows.append(**checked)
            context.progress(count, max(count + 1, config.shard_rows))
        size = images.size if images is not None else 0
    _write_rows(context, rows)
    if bad:
        _log(bad)
        name = f"quarantine/part-{arguments['index']:05d}-of-{arguments['of']:05d}.parquet"
        columns = {"source_uri": [row.source_uri for row in bad], "reason": [row.reason for row in bad]}
        write_table(context.output(name), build_table(QUARANTINE, columns))
    tagged = sum(1 for tags in rows.columns["tags"] if tags)
    return {
        "rows": len(rows),
        "tagged": tagged,
        "bytes": size,
        "parts": [] if config.part_column is None else distinct_values(rows.columns["part"]),
        "reasons": dict(sorted(Counter(_kind(row.reason) for row in bad).items())),
    }


def _log(bad: Sequence[BadExample]) -> None:
    """Name the bad rows in the unit's log: their tables have no place of their own before the dataset is finished."""
    for row in bad[:_MOST_LOGGED]:
        logger.warning("%s: %s", row.source_uri, row.reason)
    if len(bad) > _MOST_LOGGED:
        logger.warning("... and %d more", len(bad) - _MOST_LOGGED)


def _write_rows(context: UnitContext, rows: _Rows) -> None:
    num_buckets = context.unit.arguments["buckets"]
    if context.unit.arguments["near"] and len(rows):
        rows.columns["hash"] = _hashes(rows.columns["thumbnail"]).tolist()
    table = build_table(INGESTED, rows.columns).sort_by([("content_id", "ascending"), ("source_uri", "ascending")])
    # The leading bits of the id; there are at most 1024 buckets, a power of two.
    ids_N16 = ids_to_array(table.column("content_id"))
    head_N = ids_N16[:, 0].astype(np.int64) << 8 | ids_N16[:, 1]
    write_buckets(context.scratch("rows"), table, head_N * num_buckets >> 16, num_buckets)


def _hashes(thumbnails: Sequence[bytes]) -> NDArray[np.uint64]:
    """In blocks: on a thousand thumbnails at once it takes a tenth of what it does one by one."""
    blocks = [b"".join(thumbnails[start : start + _HASHED_AT_ONCE]) for start in range(0, len(thumbnails), _HASHED_AT_ONCE)]
    return np.concatenate([perceptual_hashes(np.frombuffer(b, np.uint8).reshape(-1, THUMBNAIL_PIXELS)) for b in blocks])


def _checked(
    row: RawExample | BadExample, config: DatasetConfig, decoder: Decoder, images: OutputFile | None, arguments: Json
) -> dict[str, Any] | BadExample:
    """The row of `INGESTED`, its image put by; or why there is none."""
    if isinstance(row, BadExample):
        return row
    if row.split is not None and row.split not in SPLITS:
        return BadExample(row.source_uri, f"the split is {row.split!r}, not one of {', '.join(SPLITS)}")
    if row.part is None and config.part_column is not None:
        return BadExample(row.source_uri, f"the source {config.source!r} gives no part")
    try:
        image_HW3 = decoder(row.image) if row.pixels is None else row.pixels
    except UndecodableImageError as error:
        return BadExample(row.source_uri, str(error))
    return {
        "content_id": content_id(row.image),
        "tags": sorted(set(row.tags)),
        "source_uri": row.source_uri,
        "license": row.license,
        "key": row.key,
        "split": row.split,
        "part": row.part,
        "shard": arguments["index"],
        **(_put_by(row, image_HW3, config, images) if images is not None else _referred(row, config)),
        "hash": None,
        "thumbnail": thumbnail(image_HW3).tobytes() if arguments["near"] else None,
        "pixels": image_HW3.shape[0] * image_HW3.shape[1],
        "size": len(row.image),
    }


def _put_by(row: RawExample, image_HW3: Any, config: DatasetConfig, images: OutputFile) -> dict[str, Any]:
    data = row.image
    if config.store_size is not None:
        data = shrink(data, image_HW3, config.store_size)
    offset = images.size
    images.write(data)
    return {"file": None, "offset": offset, "length": len(data)}


def _referred(row: RawExample, config: DatasetConfig) -> dict[str, Any]:
    if row.location is None:
        raise DataError(
            f"{row.source_uri} cannot be read again by itself (compressed, or its name is no Unicode); set dataset.store: copy"
        )
    return {"file": row.location.file, "offset": row.location.offset, "length": row.location.length}


def _kind(reason: str) -> str:
    """A reason without the numbers that would make every broken image a kind of its own."""
    head, bracket, details = reason.partition("(")
    return re.sub(r"\d+ x \d+", "N x N", head) + bracket + _NUMBERS.sub("N", details)
