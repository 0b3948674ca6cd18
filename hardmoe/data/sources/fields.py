"""From the values that a row came with (of a table, of JSON) to an example, by the same rules in every source.

A value that only spoils its own row becomes a `BadExample`; a split with another name stops the run, because the split of
one row cannot be told from the split of all of them, and a wrong one is found out by nobody. Rejected: one conversion per
source, whose ids and hashtags would differ with the container that the same images came in.
"""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from hardmoe.data.config import DatasetConfig
from hardmoe.data.hashtags import split_tags
from hardmoe.data.schemas import SPLITS
from hardmoe.data.sources.base import BadExample, Location, RawExample
from hardmoe.errors import DataError, HardmoeError

IMAGE_ENDINGS = frozenset({"avif", "bmp", "gif", "heic", "jfif", "jpe", "jpeg", "jpg", "png", "tif", "tiff", "webp"})
"""What a file's name ends in, in lower case, if it is an image; one that cannot be decoded is quarantined, not overlooked."""

MOST_IMAGE_BYTES = 1 << 30
"""A file of more is not read: no image within `dataset.max_pixels` needs them."""

TOO_LARGE = "the file is larger than 1 GiB"

_LIKE_AN_ESCAPE = re.compile(r"\\(?=x[0-9a-f]{2}|u[0-9a-f]{4})")


class UnusableRowError(HardmoeError):
    """One row cannot be used; the message is a short reason that is the same for all rows of the kind."""


def make_example(
    config: DatasetConfig, image: bytes | None, values: Mapping[str, Any], uri: str, location: Location | None = None
) -> RawExample | BadExample:
    """The example of one row.

    Args:
        config: names the columns.
        image: the encoded bytes.
        values: what the row has in these columns; a column that is not there counts as null.
        uri: where the row came from, without absolute places.
        location: where `fetch` finds the image again.

    Raises:
        DataError: the split is none of train, validation and test.
    """
    if image is None:
        return BadExample(printable(uri), "null image")
    try:
        return RawExample(
            image,
            tags_of(values.get(config.tags_column)),
            printable(uri),
            key=None if config.id_column is None else _key(values.get(config.id_column), config.id_column),
            split=None if config.split_column is None else split_of(values.get(config.split_column), config.split_column, uri),
            license=None if config.license_column is None else _license(values.get(config.license_column)),
            location=location,
            part=None if config.part_column is None else part_of(values.get(config.part_column), config.part_column),
        )
    except UnusableRowError as error:
        return BadExample(printable(uri), str(error))


def tags_of(value: Any) -> tuple[str, ...]:
    """The hashtags in a list of strings, nulls left out, or in one string.

    Raises:
        UnusableRowError: they are something else.
    """
    if value is None:
        return ()
    tags = split_tags(value) if isinstance(value, str) else value
    if not isinstance(tags, list | tuple) or not all(tag is None or isinstance(tag, str) for tag in tags):
        raise UnusableRowError("the hashtags are neither a string nor a list of strings")
    return tuple(_unicode(tag) for tag in tags if tag is not None)


def split_of(value: Any, column: str, uri: str) -> str:
    """The split, which must be one of the three.

    Raises:
        DataError: it is not.
    """
    if not isinstance(value, str) or value not in SPLITS:
        found = "null" if value is None else repr(value)[:80]
        raise DataError(f"{printable(uri)}: split {found} in column {column!r} is none of {', '.join(SPLITS)}; correct the data")
    return value


def part_of(value: Any, column: str) -> str:
    """The part as text: a name, or a whole number's digits, so that a table of text means the same as one of numbers.

    Raises:
        UnusableRowError: there is none, or it can be neither.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UnusableRowError(f"no part in the column {column!r}")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UnusableRowError(f"the part in {column!r} is neither a whole number nor a string")
    text = _unicode(str(value).strip())
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal()):
        return text
    if text.startswith("-"):
        raise UnusableRowError(f"the part in {column!r} is a negative number")
    return digits.lstrip("0") or "0"


def printable(text: str) -> str:
    r"""Text that any table can hold: what is no Unicode, such as a file name in Latin-1, is written `\xe9`."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape" if _only_escaped(text) else "backslashreplace").decode(
            "utf-8", "backslashreplace"
        )
    return text


def escaped(text: str) -> str:
    r"""A file's name as `printable` has it, but never as another file's: to be called once on a name.

    A backslash that reads like the beginning of an escape is one itself, `\x5c`: there may be a file whose name has the four
    characters `\xe9` beside one that has that byte.
    """
    return printable(_LIKE_AN_ESCAPE.sub(r"\\x5c", text) if "\\" in text else text)


def missing_column(place: str, key: str, column: str, there: Iterable[str]) -> DataError:
    """The refusal of a column that is not there, with the nearest that is."""
    names = list(there)
    nearest = get_close_matches(column, names, n=1)
    suggestion = f", perhaps to {nearest[0]!r}" if nearest else ""
    return DataError(f"{place} has no column {column!r}, only {', '.join(names)}; set dataset.{key}{suggestion}")


def _only_escaped(text: str) -> bool:
    """Whether every surrogate stands for a byte of a file name that is not UTF-8."""
    return all(not "\ud800" <= character <= "\udfff" or "\udc80" <= character <= "\udcff" for character in text)


def _unicode(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UnusableRowError("the text is not valid Unicode") from error
    return text


def _key(value: Any, column: str) -> str:
    if value is None:
        raise UnusableRowError(f"null in the id column {column!r}")
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UnusableRowError(f"the id in {column!r} is neither a string nor an integer")
    return _unicode(str(value))


def _license(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UnusableRowError("the licence is neither a string nor an integer")
    return _unicode(str(value))
