"""The examples of one part, held ready for training: decoded once, shuffled by hash, served in batches.

Every image is decoded and resized once and kept as uint8, in memory or, past a limit, in a scratch file that the system
pages; so an epoch costs no decoding and the pass order is free. Batches are a pure function of the step (see `resampling`), and
a position in the training is therefore just that. Rejected: torch's `DataLoader`, whose workers' state cannot be resumed
inside an epoch, and whose order depends on positions and so on the sharding.

Rows are sorted by example id, whatever order they arrived in; pixels stay where they were put and are found through
`storage_rows_N`, so neither sorting nor a subset copies an image.

Shape letters: N examples, M stored images, n examples of one piece of the stream, S side in pixels, B batch, L labels, V tags.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hardmoe.data.ids import order_of_distinct
from hardmoe.data.images import UndecodableImageError, load_square
from hardmoe.data.ragged import offsets_of, take_rows
from hardmoe.data.resampling import Schedule, repeat_factors
from hardmoe.errors import DataError, StorageError


@dataclass(frozen=True)
class EncodedBatch:
    """A piece of the stream that an `ExampleSet` is built from; labels are in compressed sparse rows."""

    ids_n16: NDArray[np.uint8]
    images: Sequence[bytes]
    label_indices_L: NDArray[np.int32]
    label_offsets: NDArray[np.int64]

    @classmethod
    def from_lists(cls, ids_n16: NDArray[np.uint8], images: Sequence[bytes], labels: Sequence[Sequence[int]]) -> "EncodedBatch":
        """Build from one list of tag indices per image."""
        offsets = np.cumsum([0, *map(len, labels)], dtype=np.int64)
        return cls(ids_n16, images, np.array([tag for tags in labels for tag in tags], dtype=np.int32), offsets)

    def __post_init__(self) -> None:
        if not len(self.ids_n16) == len(self.images) == len(self.label_offsets) - 1:
            raise ValueError(f"{len(self.ids_n16)} ids, {len(self.images)} images, {len(self.label_offsets) - 1} label rows")


@dataclass(frozen=True)
class SparseTargets:
    """The targets of a batch: 1/k on each of an example's k tags, sparse until they are on the device."""

    num_rows: int
    rows_L: Tensor
    """int64, the row of the batch that each label belongs to."""
    indices_L: Tensor
    """int64, its tag."""
    weights_L: Tensor
    """float32, 1/k."""

    @classmethod
    def from_rows(cls, indices_L: NDArray[np.int32], offsets: NDArray[np.int64]) -> "SparseTargets":
        """Of every row's tags one after another, which begin and end at the offsets."""
        lengths_B = np.diff(offsets)
        return cls(
            num_rows=len(lengths_B),
            rows_L=torch.from_numpy(np.repeat(np.arange(len(lengths_B)), lengths_B)),
            indices_L=torch.from_numpy(indices_L.astype(np.int64)),
            weights_L=torch.from_numpy(np.repeat(1 / np.maximum(lengths_B, 1), lengths_B).astype(np.float32)),
        )

    def dense(self, num_tags: int, device: torch.device) -> Tensor:
        """float32 [B, V] on the device; the rows of labelled examples sum to 1."""
        targets_BV = torch.zeros(self.num_rows, num_tags, device=device)
        where = (self.rows_L.to(device), self.indices_L.to(device))
        return targets_BV.index_put_(where, self.weights_L.to(device), accumulate=True)


@dataclass(frozen=True)
class TrainingBatch:
    """One batch."""

    images_B3SS: Tensor
    """uint8."""
    targets: SparseTargets
    ids_B16: NDArray[np.uint8]


@dataclass(frozen=True)
class ExampleSet:
    """Decoded examples sorted by id, with their labels in compressed sparse rows."""

    ids_N16: NDArray[np.uint8]
    storage_M3SS: NDArray[np.uint8]
    storage_rows_N: NDArray[np.int64]
    label_indices_L: NDArray[np.int32]
    label_offsets: NDArray[np.int64]
    times_N: NDArray[np.int64] | None = None
    """How often an epoch shows each, before any repeats for rare tags; None for once."""
    budget: int | None = None
    """How many samples a training shows, whatever its epochs; None for as many as those have."""

    def __len__(self) -> int:
        return len(self.ids_N16)

    @property
    def image_size(self) -> int:
        """S, the side of the images in pixels."""
        return int(self.storage_M3SS.shape[-1])

    @classmethod
    def from_stream(
        cls,
        batches: Iterable[EncodedBatch],
        *,
        image_size: int,
        max_pixels: int,
        num_threads: int = 1,
        scratch_path: Path | None = None,
        memory_limit_bytes: int = 2 << 30,
        reduced: bool = False,
    ) -> "ExampleSet":
        """Decode a stream of encoded examples; beside the result, one piece of the stream is in memory at a time.

        Args:
            batches: pieces in any order.
            image_size: S, the side to resize to.
            max_pixels: larger images are refused by the decoder.
            num_threads: images decoded at once.
            scratch_path: an existing folder for the pixels once they exceed `memory_limit_bytes`; the file is unlinked
                at once and vanishes with the process. None keeps everything in memory.
            memory_limit_bytes: decoded bytes to keep in memory if there is a scratch folder.
            reduced: let JPEGs be decoded at a smaller size where that is enough; see `load_square`.

        Raises:
            DataError: an image cannot be decoded; names its example.
            StorageError: the scratch folder is full or not writable.
        """
        ids, indices, lengths = [np.empty((0, 16), np.uint8)], [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        with ExitStack() as stack:
            run = map if num_threads == 1 else stack.enter_context(ThreadPoolExecutor(num_threads)).map
            pixels = stack.enter_context(_PixelBuffer(image_size, scratch_path, memory_limit_bytes))
            for batch in batches:
                decode = partial(_decode_square, image_size, max_pixels, reduced)
                for image_3SS in run(decode, batch.ids_n16, batch.images):
                    pixels.append(image_3SS)
                ids.append(batch.ids_n16)
                indices.append(batch.label_indices_L)
                lengths.append(np.diff(batch.label_offsets))
            storage_M3SS = pixels.finish()
        offsets = offsets_of(np.concatenate(lengths))
        arrived = cls(np.concatenate(ids), storage_M3SS, np.arange(len(storage_M3SS)), np.concatenate(indices), offsets)
        return arrived._sorted_by_id()

    def take(self, positions: NDArray[np.int64]) -> "ExampleSet":
        """The examples at these positions, in this order, sharing the pixels."""
        indices, offsets = take_rows(self.label_indices_L, self.label_offsets, positions)
        times = None if self.times_N is None else self.times_N[positions]
        rows = self.storage_rows_N[positions]
        return ExampleSet(self.ids_N16[positions], self.storage_M3SS, rows, indices, offsets, times, self.budget)

    def labelled(self) -> "ExampleSet":
        """The examples with at least one label."""
        return self.take(np.flatnonzero(np.diff(self.label_offsets)))

    def shown(self, times_N: NDArray[np.int64]) -> "ExampleSet":
        """The same examples, each shown so many times an epoch, int64 [N]; where that is once for all, nothing changes."""
        return replace(self, times_N=None if (times_N == 1).all() else times_N)

    def images_at(self, positions_B: NDArray[np.int64]) -> NDArray[np.uint8]:
        """A copy of the images at these positions, uint8 [B, 3, S, S]."""
        return np.take(self.storage_M3SS, self.storage_rows_N[positions_B], axis=0)

    def targets_at(self, positions_B: NDArray[np.int64]) -> SparseTargets:
        """The targets of the examples at these positions."""
        return SparseTargets.from_rows(*take_rows(self.label_indices_L, self.label_offsets, positions_B))

    def schedule(self, batch_size: int, epochs: int, seed: int, repeat_threshold: float | None = None) -> Schedule:
        """The steps of a training on these examples; `repeat_threshold` shows those with rare tags more often."""
        factors_N = repeat_factors(self.label_indices_L, self.label_offsets, repeat_threshold)
        if self.times_N is not None:
            times_N = self.times_N.astype(np.float64)
            factors_N = times_N if factors_N is None else times_N * factors_N
        if self.budget is None or not len(self):
            return Schedule(self.ids_N16, factors_N, batch_size, epochs, seed)
        if factors_N is not None:
            raise ValueError("a budget of samples is for examples of which an epoch shows each once")
        epochs = max(1, -(-self.budget // len(self)))
        return Schedule(self.ids_N16, None, batch_size, epochs, seed, self.budget - (epochs - 1) * len(self))

    def training_batches(self, schedule: Schedule, start_step: int = 0) -> Iterator[TrainingBatch]:
        """Batches of all epochs from a step on; the same step always gives the same batch."""
        for positions_B in schedule.batches(start_step):
            images_B3SS = torch.from_numpy(self.images_at(positions_B))
            yield TrainingBatch(images_B3SS, self.targets_at(positions_B), self.ids_N16[positions_B])

    def sequential_images(self, batch_size: int) -> Iterator[NDArray[np.uint8]]:
        """All images in order of their ids, uint8 [B, 3, S, S] at a time."""
        for start in range(0, len(self), batch_size):
            yield self.images_at(np.arange(start, min(start + batch_size, len(self))))

    def _sorted_by_id(self) -> "ExampleSet":
        return self.take(order_of_distinct(self.ids_N16))


def _decode_square(image_size: int, max_pixels: int, reduced: bool, id_16: NDArray[np.uint8], data: bytes) -> NDArray[np.uint8]:
    try:
        return load_square(data, image_size, max_pixels, reduced=reduced)
    except UndecodableImageError as error:
        example_id = id_16.tobytes().hex()
        raise DataError(f"the image of example {example_id} cannot be decoded: {error}; exclude the example") from error


class _PixelBuffer:
    """Images one after another: in memory or, once they exceed a limit and a folder is given, in an unlinked scratch file."""

    def __init__(self, image_size: int, scratch_path: Path | None, memory_limit_bytes: int) -> None:
        self._scratch_path = scratch_path
        self._limit = max(1, memory_limit_bytes // (3 * image_size**2)) if scratch_path else None
        self._memory = np.empty((0, 3, image_size, image_size), np.uint8)
        self._filled = 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "_PixelBuffer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def append(self, image_3SS: NDArray[np.uint8]) -> None:
        """Add an image."""
        if self._filled == len(self._memory):
            self._make_room()
        self._memory[self._filled] = image_3SS
        self._filled += 1

    def finish(self) -> NDArray[np.uint8]:
        """All images, uint8 [M, 3, S, S]; a read-only map of the scratch file if there is one."""
        if self._file is None:
            self._resize(self._filled)
            return self._memory
        self._spill()
        # The map keeps its own descriptor, so the file may be closed; being unlinked, it goes when the map does.
        return np.asarray(np.memmap(self._file, np.uint8, mode="r").reshape(-1, *self._memory.shape[1:]))

    def _make_room(self) -> None:
        capacity = max(64, 2 * len(self._memory))
        if self._limit is None or len(self._memory) < self._limit:
            self._resize(min(capacity, self._limit or capacity))
        else:
            self._spill()

    def _resize(self, capacity: int) -> None:
        # In place (realloc), where concatenating would hold everything twice; nothing else refers to the array yet.
        self._memory.resize((capacity, *self._memory.shape[1:]), refcheck=False)

    def _spill(self) -> None:
        try:
            self._file = self._file or cast(IO[bytes], TemporaryFile(dir=self._scratch_path))  # noqa: SIM115
            self._file.write(self._memory[: self._filled].data)
            self._file.flush()
        except OSError as error:
            reason = error.strerror or error
            raise StorageError(f"cannot write decoded images to the scratch folder {self._scratch_path}: {reason}") from error
        self._filled = 0
