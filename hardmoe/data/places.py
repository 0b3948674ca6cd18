"""Single files of the user's beside the dataset, given by a path or a URI: opened, or read whole.

Everything goes through `open_storage`, so a file in an object store is read like one on disk. Rejected: `fsspec`'s URLs,
whose credentials and options come from elsewhere than a root's own.
"""

from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit, urlunsplit

from hardmoe.errors import DataError, StorageError
from hardmoe.storage import open_storage


def split_place(place: str) -> tuple[str, str]:
    """The folder of a path or URI, which keeps the URI's options, and the name in it.

    `s3://b/x/a.csv?region=eu` is `a.csv` in `s3://b/x?region=eu`; whatever has no folder is in the current one.
    """
    if "://" not in place:
        local = Path(place).expanduser()
        return str(local.parent), local.name
    scheme, host, path, options, _ = urlsplit(place, allow_fragments=False)
    folder, _, name = path.rpartition("/")
    return urlunsplit((scheme, host, folder, options, "")), name


def read_place(place: str, what: str, key: str) -> bytes:
    """The whole content of a file.

    Args:
        place: its path or URI.
        what: what it is, for the message: `the aliases`.
        key: the recipe's key that names it.

    Raises:
        DataError: it cannot be read.
    """
    try:
        if "://" not in place:
            return Path(place).expanduser().read_bytes()
        folder, name = split_place(place)
        return open_storage(folder).read_bytes(unquote(name))
    except OSError as error:
        raise DataError(f"{what} {place} cannot be read ({error.strerror or error}); correct {key}") from error
    except StorageError as error:
        raise DataError(f"{what} {place} cannot be read ({error}); correct {key}") from error


def open_place(place: str) -> BinaryIO:
    """Open a file for reading at any offset; close it after use.

    Raises:
        StorageError: it cannot be read.
    """
    folder, name = split_place(place)
    return open_storage(folder).open_input(unquote(name) if "://" in place else name)
