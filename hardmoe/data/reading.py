"""How the stages after the dataset read examples and labels: by split, by part, joined on the id.

A dataset that stores no image says where each lies in the source; whoever reads it through `open_examples` sees no
difference, but for the error when the source has changed since: every image is held against its digest.

Shape letters: N examples, L labels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hardmoe.config import Json
from hardmoe.data.config import DatasetConfig
from hardmoe.data.ids import content_id, sortable
from hardmoe.data.label_ranges import tables_that_may_hold
from hardmoe.data.ragged import offsets_of, take_rows
from hardmoe.data.schemas import EXAMPLES, EXTRA_FOLDER, LABELS, REFERENCES, TAGS
from hardmoe.data.sources.base import Location, ReferableSource
from hardmoe.data.sources.registry import open_source
from hardmoe.data.stages import SOURCE
from hardmoe.errors import CorruptFileError, DataError
from hardmoe.stage import Context, InputArtifact
from hardmoe.storage import Storage
from hardmoe.tables import ids_to_array, iterate_table, lists_to_csr, read_table


@dataclass(frozen=True)
class Labels:
    """Tag indices of examples in compressed sparse rows, in the order of the ids that were asked for."""

    indices_L: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def rows(self, rows: slice) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Those of some examples that follow one another, likewise."""
        offsets = self.offsets[rows.start : rows.stop + 1]
        return self.indices_L[offsets[0] : offsets[-1]], offsets - offsets[0]


def example_shards(examples: InputArtifact, split: str, expert: int | None) -> list[str]:
    """Storage paths of a split's shards in the dataset (expert None) or of one part of it in a partition."""
    part = "" if expert is None else f"expert={expert:04d}/"
    return examples.files(f"split={split}/{part}")


def training_shards(examples: InputArtifact, expert: int | None) -> list[str]:
    """Storage paths of what a network trains on: a part's own shards, and its expert's copies of other parts' examples."""
    own = example_shards(examples, "train", expert)
    return own if expert is None else own + examples.files(f"{EXTRA_FOLDER}/expert={expert:04d}/")


def num_trained_on(partition: InputArtifact, ids_N16: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How many experts of a partition train on each of these examples, int64 [N].

    Args:
        partition: the partition.
        ids_N16: ids of training examples in ascending order, uint8 [N, 16].
    """
    experts_N = np.ones(len(ids_N16), np.int64)
    keys_N = sortable(ids_N16)
    for path in partition.files(f"{EXTRA_FOLDER}/"):
        for table in read_examples(partition, [path], columns=["example_id"], rows=1 << 16):
            keys_P = sortable(ids_to_array(table.column("example_id")))
            at_P = np.searchsorted(keys_N, keys_P)
            known_P = at_P < len(keys_N)
            known_P[known_P] = keys_N[at_P[known_P]] == keys_P[known_P]
            experts_N += np.bincount(at_P[known_P], minlength=len(keys_N))
    return experts_N


@dataclass(frozen=True)
class ReferringExamples:
    """A dataset whose images are read from the source; an `InputArtifact` like the dataset itself."""

    dataset: InputArtifact
    config: DatasetConfig
    """Which source, and where it is now."""

    @property
    def storage(self) -> Storage:
        """Where the tables lie."""
        return self.dataset.storage

    @property
    def payload(self) -> Json:
        """What the dataset's record says."""
        return self.dataset.payload

    def path(self, relative: str) -> str:
        """A file's path in `storage`."""
        return self.dataset.path(relative)

    def files(self, prefix: str = "", suffix: str = "") -> list[str]:
        """Sorted storage paths of the files that the record vouches for."""
        return self.dataset.files(prefix, suffix)

    def read(self, relative: str) -> bytes:
        """A whole file, if it is what the record says."""
        return self.dataset.read(relative)


def open_examples(context: Context, role: str) -> InputArtifact:
    """An input that holds examples: a dataset or a partition."""
    examples = context.input(role)
    if examples.payload.get("store") != "reference":
        return examples
    return ReferringExamples(examples, DatasetConfig.model_validate(context.stage.operational[SOURCE]))


def read_examples(
    examples: InputArtifact, paths: Sequence[str], columns: Sequence[str] | None = None, rows: int = 1024
) -> Iterator[Any]:
    """Tables of at most `rows` rows with some or all of example_id, image and raw tags, shard after shard.

    Raises:
        DataError: an image in the source is not the one that was ingested.
    """
    names = list(columns or EXAMPLES.names)
    for path in paths:
        if isinstance(examples, ReferringExamples):
            yield from _read_referred(examples, path, names, rows)
        else:
            yield from iterate_table(examples.storage, path, EXAMPLES, names, rows=rows)


def _read_referred(examples: ReferringExamples, path: str, names: Sequence[str], rows: int) -> Iterator[Any]:
    if "image" not in names:
        yield from iterate_table(examples.storage, path, REFERENCES, names, rows=rows)
        return
    table = read_table(examples.storage, path, REFERENCES)
    source = open_source(examples.config)
    assert isinstance(source, ReferableSource)
    places = places_of(table)
    images = source.fetch(places)
    expected = ids_to_array(table.column("content_id"))
    for start in range(0, table.num_rows, rows):
        piece = table.slice(start, rows)
        fetched = list(islice(images, piece.num_rows))
        for position, (data, digest) in enumerate(zip(fetched, expected[start : start + rows], strict=True), start):
            if content_id(data) != digest.tobytes():
                raise DataError(
                    f"the image at {described(places[position])}, is not the one that was ingested; put the source's files back, "
                    "or build from the new ones in a new root"
                )
        yield pa.table({name: pa.array(fetched, pa.binary()) if name == "image" else piece.column(name) for name in names})


def places_of(references: Any) -> list[Location]:
    """Where the images of a table of references lie."""
    columns = (references.column(name).to_pylist() for name in ("file", "offset", "length"))
    return [Location(*place) for place in zip(*columns, strict=True)]


def described(place: Location) -> str:
    """Where an image lies, for people: `photos/3.parquet, row 17`."""
    return f"{place.file}, {'row' if place.length is None else 'byte'} {place.offset}"


def num_tags(vocabulary: InputArtifact) -> int:
    """Size of the vocabulary."""
    count: int = vocabulary.payload["num_tags"]
    return count


def tag_names(vocabulary: InputArtifact) -> list[str]:
    """The canonical tags, by index."""
    names: list[str] = read_table(vocabulary.storage, vocabulary.path("tags.parquet"), TAGS).column("tag").to_pylist()
    return names


def tag_counts(vocabulary: InputArtifact) -> NDArray[np.int64]:
    """Training images of every canonical tag, by index, int64 [V]."""
    counts_V: NDArray[np.int64] = read_table(vocabulary.storage, vocabulary.path("tags.parquet"), TAGS).column("count").to_numpy()
    return counts_V


def labels_of(
    vocabulary: InputArtifact,
    ids_N16: NDArray[np.uint8],
    paths: Sequence[str] | None = None,
    *,
    split: str | None = None,
    near: tuple[int, int] | None = None,
) -> Labels:
    """The labels of these examples, found by id in those of the vocabulary's tables that can hold them.

    Args:
        vocabulary: the vocabulary artifact.
        ids_N16: the ids, uint8 [N, 16], each once.
        paths: storage paths of the tables to look in, where it is known that they hold all of them.
        split: the split that the examples are all of, if that is known.
        near: which of how many shards of the split they came from, if it is cut like the dataset; only a guess.

    Raises:
        CorruptFileError: an example has no row there.
    """
    keys_N = sortable(ids_N16)
    order_N = np.argsort(keys_N)
    sorted_N = keys_N[order_N]
    found: list[NDArray[np.int64]] = []
    values: list[NDArray[np.int32]] = []
    lengths: list[NDArray[np.int64]] = []
    missing = len(ids_N16)
    for path in tables_that_may_hold(vocabulary, sorted_N, split, near) if paths is None else paths:
        if not missing:
            break
        table = read_table(vocabulary.storage, path, LABELS)
        at = np.searchsorted(sorted_N, keys := sortable(ids_to_array(table.column("example_id"))))
        here = np.flatnonzero(sorted_N[np.minimum(at, len(sorted_N) - 1)] == keys) if len(sorted_N) else np.zeros(0, np.int64)
        if not len(here):
            continue
        indices, offsets = lists_to_csr(table.column("tags").take(here))
        found.append(order_N[at[here]])
        values.append(indices)
        lengths.append(np.diff(offsets))
        missing -= len(here)
    if missing:
        raise CorruptFileError(
            f"{vocabulary.storage.where(vocabulary.path('labels'))} has labels of {len(ids_N16) - missing} of {len(ids_N16)} "
            "examples; delete the vocabulary and what stands on it, and run again"
        )
    return _in_order(found, values, lengths, len(ids_N16))


def _in_order(
    found: list[NDArray[np.int64]], values: list[NDArray[np.int32]], lengths: list[NDArray[np.int64]], count: int
) -> Labels:
    """Bring rows that were found in the tables' order into the order asked for."""
    if not count:
        return Labels(np.zeros(0, np.int32), np.zeros(1, np.int64))
    order = np.argsort(np.concatenate(found))
    return Labels(*take_rows(np.concatenate(values), offsets_of(np.concatenate(lengths)), order))
