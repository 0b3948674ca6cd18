"""Whether the images that a dataset refers to are still those that were ingested: all of them read and held against digests.

They are fetched some hundreds at a time, as training fetches them. A piece that cannot be read is halved until what is wrong
stands alone, so one missing file costs a dozen more reads and hides no other. Rejected: image by image, which reads a row group
of a Parquet file again for each of its rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hardmoe.data.ids import content_id
from hardmoe.data.reading import ReferringExamples, described, places_of
from hardmoe.data.schemas import REFERENCES
from hardmoe.data.sources.base import Location, ReferableSource
from hardmoe.data.sources.registry import open_source
from hardmoe.errors import DataError
from hardmoe.tables import iterate_table

_AT_ONCE = 512


@dataclass
class ImageCheck:
    """What was found."""

    num_images: int = 0
    num_missing: int = 0
    """They cannot be read any more."""
    num_altered: int = 0
    """They are other images by now."""
    first: str = ""
    """What is wrong with the first bad one, and where it is."""


def check_images(dataset: ReferringExamples, progress: Callable[[int], None]) -> ImageCheck:
    """Read every image that a dataset refers to.

    Args:
        dataset: it, and where its source is now.
        progress: told now and then how many images were looked at.

    Raises:
        DataError: the source as a whole is not there.
        StorageError: it cannot be reached.
    """
    source = open_source(dataset.config)
    assert isinstance(source, ReferableSource)
    source.files()  # or the absence of the whole source would be found out at every single image
    check = ImageCheck()
    for path in dataset.files("split="):
        for table in iterate_table(dataset.storage, path, REFERENCES, rows=_AT_ONCE):
            places = places_of(table)
            expected: list[bytes] = table.column("content_id").to_pylist()
            for place, wanted, found in zip(places, expected, _digests(source, places), strict=True):
                _count(check, place, wanted, found)
            progress(check.num_images)
    return check


def _count(check: ImageCheck, place: Location, wanted: bytes, found: bytes | DataError) -> None:
    check.num_images += 1
    if isinstance(found, DataError):
        check.num_missing += 1
        check.first = check.first or str(found)
    elif found != wanted:
        check.num_altered += 1
        check.first = check.first or f"{described(place)}, is not the image that was ingested"


def _digests(source: ReferableSource, places: Sequence[Location]) -> Iterator[bytes | DataError]:
    """The digest of every image, or why it cannot be read."""
    try:
        # Digests and not images: the piece as a whole may not fit into memory.
        yield from [content_id(image) for image in source.fetch(places)]
    except DataError as error:
        if len(places) == 1:
            yield error
            return
        half = len(places) // 2
        yield from _digests(source, places[:half])
        yield from _digests(source, places[half:])
