"""Asking an index: for the neighbours of an image, or of a hashtag.

A hashtag is looked for by its row of the decoder: the images whose direction is nearest to it are those of which it is most
likely, up to the length of their vectors and its bias. Rejected: a second index of unscaled vectors for the inner product, which
favours images with long vectors whatever is on them.

Shape letters: Z unified dims, Q queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hardmoe.artifacts.store import Artifact, ArtifactStore
from hardmoe.data.hashtags import normalise
from hardmoe.errors import DataError, MissingRecordError
from hardmoe.mixture import Mixture
from hardmoe.neighbours.vector_index import VectorIndex, unit_rows
from hardmoe.searching.stage import INDEX, INDEX_FILE, ROWS_FILE, THUMBNAILS_FILE
from hardmoe.searching.vectors import ROWS
from hardmoe.storage import open_storage
from hardmoe.tables import read_table


@dataclass(frozen=True)
class Neighbour:
    """One image that was found."""

    row: int
    """Its number in the index."""
    example_id: str
    """In hexadecimal digits."""
    source_uri: str
    expert: int
    """In whose part it is, or which expert embedded it."""
    cosine: float
    """Of its vector and the query's: 1 for the same direction."""


class SearchIndex:
    """A finished index, ready to be asked.

    Args:
        index: the artifact.
        mixture: whose unified space it is in.

    Raises:
        DataError: it is of another mixture.
    """

    def __init__(self, index: Artifact, mixture: Mixture) -> None:
        if index.record.config["mixture"] != mixture.identity():
            raise DataError(
                f"{index.home.where(index.name)} is of another mixture, or of this one before it was trained again; delete it "
                "and run 'hardmoe index' again"
            )
        self._artifact, self._mixture = index, mixture
        path = index.path(INDEX_FILE)
        self._index = VectorIndex.from_bytes(index.read(INDEX_FILE), index.storage.where(path))
        self._index.set_probes(index.payload.get("probes", 1))
        self._rows = read_table(index.storage, index.path(ROWS_FILE), ROWS)

    @classmethod
    def open(cls, root: str, mixture: Mixture) -> "SearchIndex":
        """The index in a root.

        Raises:
            MissingRecordError: there is none.
        """
        store = ArtifactStore(open_storage(root))
        found = store.find(INDEX)
        if found is None:
            raise MissingRecordError(f"there is no index in {store.storage.where()}; make one with 'hardmoe index'")
        return cls(found, mixture)

    def __len__(self) -> int:
        return len(self._index)

    def of_vectors(self, unified_QZ: NDArray[np.float32], count: int) -> list[list[Neighbour]]:
        """The nearest images of points of the unified space, float32 [Q, Z], nearest first."""
        numbers_QC, cosines_QC = self._index.search(unit_rows(unified_QZ), count)
        return [
            [self._neighbour(row, cosine) for row, cosine in zip(numbers, cosines, strict=True) if row >= 0]
            for numbers, cosines in zip(numbers_QC.tolist(), cosines_QC.tolist(), strict=True)
        ]

    def of_tag(self, text: str, count: int) -> list[Neighbour]:
        """The images to which a hashtag is nearest.

        Raises:
            DataError: the vocabulary has no such hashtag; says which are like it.
        """
        weight_VZ = self._mixture.decoder.decoder.weight.detach().numpy()
        row = tag_index(self._mixture.tags, text)
        return self.of_vectors(weight_VZ[row : row + 1], count)[0]

    def thumbnail(self, row: int) -> bytes | None:
        """A small JPEG of an image, if the index has them."""
        return self._thumbnails.get(row)

    @cached_property
    def _thumbnails(self) -> dict[int, bytes]:
        import pyarrow as pa

        if not self._artifact.files(THUMBNAILS_FILE):
            return {}
        schema = pa.schema([("row", pa.int64()), ("image", pa.binary())])
        table = read_table(self._artifact.storage, self._artifact.path(THUMBNAILS_FILE), schema)
        return dict(zip(table.column("row").to_pylist(), table.column("image").to_pylist(), strict=True))

    def _neighbour(self, row: int, cosine: float) -> Neighbour:
        (found,) = self._rows.slice(row, 1).to_pylist()
        assert found["row"] == row
        return Neighbour(row, found["example_id"].hex(), found["source_uri"], found["expert"], cosine)


def tag_index(tags: Sequence[str], text: str) -> int:
    """The place of a hashtag in the vocabulary, whatever its spelling (`#Golden_Hour` is `golden-hour`).

    Raises:
        DataError: it is not there; says which are like it.
    """
    wanted = normalise(text)
    if wanted in tags:
        return tags.index(wanted)
    close = get_close_matches(wanted, tags, n=3, cutoff=0.6)
    nearest = f"; there is {', '.join(close)}" if close else ""
    raise DataError(f"the vocabulary has no hashtag '{wanted or text}'{nearest}")
