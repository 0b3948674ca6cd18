"""A stream of rows through a mixture, expert by expert, in memory that grows with neither images nor experts.

    decode     every usable row to a square of S pixels, put by in a file as it comes; others are kept with their reason
    route      the squares in pieces, through trunk and router
    embed      the squares of one expert after another, so that each expert is loaded once for all rows
    (decode)   the places in the unified space become tags when they are written

Experts that are in memory already go first: with room for some of them, a worker's next stream begins with those that the last
one ended with. Where experts share stages with the trunk, those are passed twice here, as maps would take far more disk than
squares. Rejected: the squares in memory, 9 GB for 65,000 images of 224 pixels; embedding row by row, which loads an expert for
every image.

Shape letters: N images, S side in pixels, Z unified dims.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray

from hardmoe.data.ids import content_id, key_id
from hardmoe.data.images import UndecodableImageError, load_square, resize_square
from hardmoe.data.sources.base import BadExample, RawExample
from hardmoe.mixture import Judged, Mixture

_AT_ONCE = 256
"""Rows decoded together."""

Check = Callable[[bytes], object]
"""Raises `UndecodableImageError` on an image that is better not decoded in this process."""


@dataclass(frozen=True)
class Answers:
    """What the mixture found, row by row in the order of the source."""

    uris: list[str]
    """Where each image came from."""
    ids: list[bytes]
    """Sixteen bytes each: of the user's own name of the example, or of its content."""
    experts_N: NDArray[np.int32]
    refused_N: NDArray[np.bool_]
    """Which images get no tag, as they are too far from every centroid; none unless the mixture was opened for it."""
    unified_NZ: torch.Tensor
    """float32, on the CPU."""
    bad: list[BadExample]
    """Rows without a usable image."""


@dataclass
class _Spool:
    """Squares in a file."""

    file: IO[bytes]
    size: int
    uris: list[str] = field(default_factory=list)
    ids: list[bytes] = field(default_factory=list)

    def put(self, row: RawExample, square_3SS: NDArray[np.uint8]) -> None:
        self.file.write(np.ascontiguousarray(square_3SS.transpose(1, 2, 0)).data)
        self.uris.append(row.source_uri)
        self.ids.append(content_id(row.image) if row.key is None else key_id(row.key))

    def pixels_N3SS(self) -> NDArray[np.uint8]:
        self.file.flush()
        shape = (len(self.ids), self.size, self.size, 3)
        if not self.ids:
            return np.zeros(shape, np.uint8).transpose(0, 3, 1, 2)
        return np.memmap(self.file, np.uint8, "r", shape=shape).transpose(0, 3, 1, 2)


@dataclass(frozen=True)
class Decoding:
    """How rows become squares."""

    max_pixels: int
    """Larger images are refused before their pixels are decoded."""
    num_threads: int = 1
    check: Check | None = None
    """Looks at every image first."""


def answer(
    mixture: Mixture,
    rows: Iterable[RawExample | BadExample],
    decoding: Decoding,
    progress: Callable[[int], None] = lambda done: None,
) -> Answers:
    """Route and embed every row that has a usable image.

    Args:
        mixture: the mixture.
        rows: a source's.
        decoding: how images are decoded.
        progress: called now and then with the number of rows that were decoded.
    """
    bad: list[BadExample] = []
    with ExitStack() as stack:
        spool = _Spool(stack.enter_context(tempfile.TemporaryFile(prefix="hardmoe-")), mixture.image_size)
        pool = stack.enter_context(ThreadPoolExecutor(decoding.num_threads, thread_name_prefix="decode"))
        done = 0
        for some in _chunks(rows, _AT_ONCE):
            for row, found in zip(some, pool.map(lambda row: _decoded(row, mixture, decoding), some), strict=True):
                if isinstance(found, BadExample):
                    bad.append(found)
                elif isinstance(row, RawExample):
                    spool.put(row, found)
            done += len(some)
            progress(done)
        pixels_N3SS = spool.pixels_N3SS()
        judged = _judge(mixture, pixels_N3SS)
        unified_NZ = _embed(mixture, pixels_N3SS, judged.experts_N)
        return Answers(spool.uris, spool.ids, judged.experts_N, judged.refused_N, unified_NZ, bad)


def _chunks(rows: Iterable[RawExample | BadExample], size: int) -> Iterator[list[RawExample | BadExample]]:
    iterator = iter(rows)
    while some := list(islice(iterator, size)):
        yield some


def _decoded(row: RawExample | BadExample, mixture: Mixture, decoding: Decoding) -> NDArray[np.uint8] | BadExample:
    if isinstance(row, BadExample):
        return row
    try:
        if row.pixels is not None:
            return resize_square(row.pixels, mixture.image_size)
        if decoding.check is not None:
            decoding.check(row.image)
        return load_square(row.image, mixture.image_size, decoding.max_pixels, reduced=mixture.reduced)
    except UndecodableImageError as error:
        return BadExample(row.source_uri, str(error))


def _judge(mixture: Mixture, pixels_N3SS: NDArray[np.uint8]) -> Judged:
    step = mixture.piece_size
    pieces = (pixels_N3SS[start : start + step] for start in range(0, len(pixels_N3SS), step))
    found = [mixture.judge_seen(mixture.see(np.ascontiguousarray(piece))) for piece in pieces]
    experts_N = np.concatenate([np.zeros(0, np.int32), *(each.experts_N for each in found)])
    return Judged(experts_N, np.concatenate([np.zeros(0, bool), *(each.refused_N for each in found)]))


def _embed(mixture: Mixture, pixels_N3SS: NDArray[np.uint8], experts_N: NDArray[np.int32]) -> torch.Tensor:
    unified_NZ = torch.empty(len(experts_N), mixture.decoder.dim)
    held = set(mixture.experts.numbers)
    for expert in sorted(np.unique(experts_N).tolist(), key=lambda expert: (expert not in held, expert)):
        rows_n = np.flatnonzero(experts_N == expert)
        for start in range(0, len(rows_n), mixture.piece_size):
            some = rows_n[start : start + mixture.piece_size]
            seen = mixture.see(np.ascontiguousarray(pixels_N3SS[some]))
            unified_NZ[some] = mixture.embed_seen(seen, experts_N[some])
    return unified_NZ
