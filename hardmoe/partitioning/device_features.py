"""Where features lie while a device passes over them: all of them in its memory, or in the host's, sent over piece by piece.

`place` chooses, by their size against the memory that is free, and logs what it chose. Streamed pieces go through two slots:
while the device computes on one, the next is copied into the other on a stream of its own, out of pinned memory (features that
lie in pinned memory already are copied from where they are). Events order it: a slot is written once the computation that read
it is done, and read once its copy is. On a CPU the same code runs without streams, where tests hold it against `scan`.

Rejected: unified memory, which moves pages on faults at a fraction of the copy engines' speed, and keeping as many rows resident
as fit beside a stream of the rest, which saves at most that share of the copies and makes every pass two kinds of pass.

Shape letters: N rows, D feature dim, K clusters, C rows of a piece, M candidates.
"""

import logging
from collections.abc import Generator, Iterable, Iterator
from contextlib import nullcontext
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hardmoe.partitioning.device_pass import DevicePass
from hardmoe.partitioning.exact_sums import ClusterSums, FarthestPoints

logger = logging.getLogger(__name__)

_PIECE_BYTES = {"cpu": 2**18, "cuda": 2**28}
"""Of a streamed piece: a copy of 5 ms, beside which what starting kernels costs is little."""
_WORKSPACE = 2**31
"""Bytes left free beside resident features for a pass's tiles and the rows that are searched twice."""
_PER_ROW = 32
"""Bytes a row for its centroid and its distance, and for what selects rows by them."""
_CANDIDATES = 2**16

Piece = tuple[torch.Tensor, NDArray[np.uint8]]
"""Features float16 or float32 [C, D] on a device, their example ids uint8 [C, 16]."""


class Placed(Protocol):
    """Features that a device can pass over again and again."""

    def pieces(self) -> Iterator[Piece]:
        """All rows, each once; a piece is not looked at after the next one is asked for."""
        ...


def scan_pieces(
    pieces: Iterable[Piece], centroids_KD: NDArray[np.float32], device: torch.device, capacity: int
) -> tuple[ClusterSums, FarthestPoints]:
    """A pass over pieces of features.

    Args:
        pieces: on the device.
        centroids_KD: float32 [K, D], finite.
        device: where the pieces are.
        capacity: of the farthest points.

    Raises:
        DataError: a feature is NaN, infinite or too large to be summed exactly.
    """
    this_pass, farthest = DevicePass(centroids_KD, device), FarthestPoints.none(centroids_KD.shape[1], capacity)
    for features_CD, ids_C16 in pieces:
        _, squared_C = this_pass.take(features_CD)
        farthest += _farthest_points(features_CD, ids_C16, squared_C, capacity)
    return this_pass.sums(), farthest


def place(
    features_ND: NDArray[np.float16] | NDArray[np.float32] | torch.Tensor, ids_N16: NDArray[np.uint8], device: torch.device
) -> Placed:
    """Resident where they fit, streamed where they do not; logs which.

    Args:
        features_ND: float16 or float32 [N, D], in host memory, or such a tensor.
        ids_N16: their example ids, uint8 [N, 16].
        device: where to pass over them.
    """
    source = as_tensor(features_ND)
    size, free = source.nbytes, _free_memory(device)
    fits = size + _PER_ROW * len(source) + _WORKSPACE <= free
    logger.info(
        "%d x %d features in %s, %.3g GB, are %s (%s has %.3g GB free)",
        *source.shape,
        str(source.dtype).removeprefix("torch."),
        size / 1e9,
        "kept on the device" if fits else "streamed from host memory in every pass",
        device,
        free / 1e9,
    )
    return Resident(source, ids_N16, device) if fits else Streamed(source, ids_N16, device)


class Resident:
    """Features copied to the device once; those that are there already stay."""

    def __init__(self, features_ND: torch.Tensor, ids_N16: NDArray[np.uint8], device: torch.device) -> None:
        """See `place`."""
        self._features_ND, self._ids_N16 = features_ND.to(device), ids_N16

    def pieces(self) -> Iterator[Piece]:
        """All in one."""
        yield self._features_ND, self._ids_N16


class Streamed:
    """Features that stay in host memory."""

    def __init__(self, features_ND: torch.Tensor, ids_N16: NDArray[np.uint8], device: torch.device) -> None:
        """See `place`; of a tensor in pinned memory pieces are copied from where they are."""
        self._features_ND, self._ids_N16, self._device = features_ND, ids_N16, device
        bytes_per_row = features_ND.shape[1] * features_ND.element_size()
        self._rows = max(1, _PIECE_BYTES.get(device.type, _PIECE_BYTES["cpu"]) // bytes_per_row)

    def pieces(self) -> Iterator[Piece]:
        """One after the other."""
        spans = (slice(start, start + self._rows) for start in range(0, len(self._features_ND), self._rows))
        return staged(((self._features_ND[rows], self._ids_N16[rows]) for rows in spans), self._device)


def as_tensor(features_ND: NDArray[np.float16] | NDArray[np.float32] | torch.Tensor) -> torch.Tensor:
    """Features as a tensor, [N, D]: the same memory, unless it may not be written, of which torch warns."""
    if isinstance(features_ND, torch.Tensor):
        return features_ND
    array_ND = np.ascontiguousarray(features_ND)
    return torch.from_numpy(array_ND if array_ND.flags.writeable else array_ND.copy())


def staged(batches: Iterable[tuple[torch.Tensor, NDArray[np.uint8]]], device: torch.device) -> Generator[Piece, None, None]:
    """Batches of host memory on a device, each while the one before is computed on; see the module."""
    slots = (_Slot(device), _Slot(device))
    copying = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    waiting: tuple[_Slot, NDArray[np.uint8]] | None = None
    for turn, (features_CD, ids_C16) in enumerate(batches):
        slot = slots[turn % 2]
        slot.send(features_CD, copying)
        if waiting is not None:
            yield waiting[0].receive(), waiting[1]
            waiting[0].release()
        waiting = slot, ids_C16
    if waiting is not None:
        yield waiting[0].receive(), waiting[1]
        waiting[0].release()


class _Slot:
    """A buffer on the device with a pinned one in front of it, and the events between the two streams that use them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned: torch.Tensor | None = None
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._piece_CD = self._buffer
        self._copied, self._used = (torch.cuda.Event() if device.type == "cuda" else None for _ in range(2))  # type: ignore[no-untyped-call]

    def send(self, features_CD: torch.Tensor, copying: "torch.cuda.Stream | None") -> None:
        """Begin to copy a batch here."""
        size = features_CD.nbytes
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
            if copying is not None:  # what was in this memory may still be computed on; and it may be freed while copied to
                copying.wait_stream(torch.cuda.current_stream(self._device))
                self._buffer.record_stream(copying)
        self._piece_CD = self._buffer[:size].view(features_CD.dtype).view(features_CD.shape)
        source_CD = features_CD if features_CD.is_pinned() else self._through_pinned(features_CD)
        with torch.cuda.stream(copying) if copying is not None else nullcontext():
            if copying is not None and self._used is not None:
                copying.wait_event(self._used)
            self._piece_CD.copy_(source_CD, non_blocking=True)
            if copying is not None and self._copied is not None:
                self._copied.record(copying)

    def receive(self) -> torch.Tensor:
        """The batch, for whoever computes on the current stream from here on."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
        return self._piece_CD

    def release(self) -> None:
        """The computation is on its stream: once it is done there, the buffer may be written."""
        if self._used is not None:
            self._used.record(torch.cuda.current_stream(self._device))

    def _through_pinned(self, features_CD: torch.Tensor) -> torch.Tensor:
        """The batch in this slot's pinned buffer, once its last copy out of there is done."""
        if self._copied is not None:
            self._copied.synchronize()
        size = features_CD.nbytes
        if self._pinned is None or len(self._pinned) < size:
            self._pinned = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        pinned_CD = self._pinned[:size].view(features_CD.dtype).view(features_CD.shape)
        return pinned_CD.copy_(features_CD)


def _farthest_points(
    features_CD: torch.Tensor, ids_C16: NDArray[np.uint8], squared_C: torch.Tensor, capacity: int
) -> FarthestPoints:
    """What `FarthestPoints.from_batch` finds, looking at the farthest rows on the device."""
    num_rows, wanted = len(squared_C), capacity
    while True:
        far_C = squared_C > 0.0
        if wanted < num_rows:
            # All as far as the last one wanted: ties at the edge are never cut by position.
            far_C &= squared_C >= squared_C.topk(wanted).values[-1]
        rows_M = torch.nonzero(far_C).squeeze(1)
        kept = FarthestPoints.none(features_CD.shape[1], capacity)
        for some_M in torch.split(rows_M, _CANDIDATES):
            features_MD, squared_M = features_CD[some_M].float().cpu().numpy(), squared_C[some_M].cpu().numpy()
            kept += FarthestPoints.among(features_MD, ids_C16[some_M.cpu().numpy()], squared_M, capacity)
        if len(kept.distances_M) == capacity or wanted >= num_rows:
            return kept
        wanted *= 8  # copies crowded the distinct points out


def _free_memory(device: torch.device) -> int:
    """Bytes that features on the device may take, those counted that torch holds and nobody uses."""
    if device.type != "cuda":
        return 2**62
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held
