"""Where a run's root and a collection's files are: one protocol, a local directory or an object store behind it."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from hardmoe.errors import StorageError
from hardmoe.storage.base import Entry, OutputFile, Storage, check_entry, join, sha256_of
from hardmoe.storage.local import HashedFile, LocalStorage

__all__ = [
    "Entry",
    "HashedFile",
    "LocalStorage",
    "OutputFile",
    "Storage",
    "check_entry",
    "join",
    "open_storage",
    "sha256_of",
]


def open_storage(uri: str) -> Storage:
    """Open a root given as a path or a `file://` URI.

    Raises:
        StorageError: the URI is empty, or its scheme is not one that hardmoe can use.
    """
    if not uri.strip():
        raise StorageError("the root is empty; give a directory, such as runs/photos")
    parts = urlsplit(uri)
    if not parts.scheme:
        return LocalStorage(Path(uri).expanduser())
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return LocalStorage(Path(unquote(parts.path)))
    raise StorageError(f"cannot use the root '{uri}': '{parts.scheme}://{parts.netloc}' is not supported; give a local path")
