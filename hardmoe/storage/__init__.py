"""Where a run's root and a collection's files are: one protocol, a local directory or an object store behind it."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from hardmoe.errors import StorageError
from hardmoe.storage.base import (
    Entry,
    OutputFile,
    Storage,
    check_content,
    check_entry,
    check_size,
    join,
    read_checked,
    read_if_there,
    sha256_of,
)
from hardmoe.storage.local import HashedFile, LocalStorage

__all__ = [
    "Entry",
    "HashedFile",
    "LocalStorage",
    "OutputFile",
    "Storage",
    "check_content",
    "check_entry",
    "check_size",
    "join",
    "open_storage",
    "read_checked",
    "read_if_there",
    "sha256_of",
]


def open_storage(uri: str) -> Storage:
    """Open a root given as a path, a `file://` URI or `s3://bucket/prefix`.

    An S3 root takes the options endpoint, region, profile and anonymous (`s3://photos/run?region=eu-west-1`); what is not
    given, and credentials always, come from boto3's standard environment variables and files.

    Raises:
        StorageError: the URI is empty, its scheme is not one that hardmoe can use, or its options are wrong.
    """
    if not uri.strip():
        raise StorageError("the root is empty; give a directory, such as runs/photos")
    if uri.lower().startswith("s3://"):
        # boto3 takes a third of a second to import, which most commands need not spend.
        from hardmoe.storage.s3 import S3Storage

        return S3Storage(uri)
    parts = urlsplit(uri)
    if not parts.scheme:
        return LocalStorage(Path(uri).expanduser())
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return LocalStorage(Path(unquote(parts.path)))
    place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    if parts.scheme in ("gs", "gcs"):
        raise StorageError(f"cannot use the root '{place}{parts.path}': gs:// is not supported yet; use s3:// or a local path")
    raise StorageError(f"cannot use the root '{place}{parts.path}': '{place}' is not supported; give a local path, or s3://")
