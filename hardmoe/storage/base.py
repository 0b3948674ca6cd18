"""A run's root, wherever it is: bytes in, bytes out, and the two conditional writes that make concurrency safe.

Everything in a run is named by a '/'-separated path relative to the root, so that a root on another kind of storage is a
matter of the URI. Every write is atomic (readers see the old file or the whole new one) and `create`/`replace` are
compare-and-swap, which is all that leases, completions and records need. Collections are read through the same protocol.
Rejected: `fsspec`, whose local and object stores differ in exactly these two points, and file locks held for long, which
die differently on every network mount.
"""

import contextlib
import hashlib
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from hardmoe.errors import CorruptFileError, MissingFileError, StorageError


class OutputFile(Protocol):
    """A file being written; it appears under its name, whole, when the block that opened it ends well."""

    size: int

    def write(self, data: bytes, /) -> int:
        """Append bytes."""
        ...

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of what was written so far."""
        ...


class HashingWriter:
    """What an `OutputFile` of any store has in common: it counts, hashes, and answers what pyarrow's writers ask."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.size = 0
        self.closed = False

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of what was written so far."""
        return self._digest.hexdigest()

    def note(self, data: bytes) -> memoryview:
        """Take bytes into size and digest; returns them as plain bytes."""
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self.size += view.nbytes
        return view

    def flush(self) -> None:
        """Nothing to do, unless the store has something to hand over."""

    def writable(self) -> bool:
        """Always true."""
        return True

    def readable(self) -> bool:
        """Always false."""
        return False

    def seekable(self) -> bool:
        """Always false."""
        return False

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size

    def close(self) -> None:
        """Called by pyarrow's writers; the block that opened the file closes it for good."""


@dataclass(frozen=True)
class Entry:
    """A file as a listing shows it."""

    path: str
    """Relative to the prefix that was listed."""
    size: int
    """In bytes."""
    version: str
    """Changes whenever the content is replaced: the time of modification, or an object's ETag or generation."""
    digest: str | None = None
    """What the store itself knows of the content (an object's ETag or checksum); None where it would have to be read."""


class Storage(Protocol):
    """One place for files; see `LocalStorage` for the meaning of each method. Paths are relative to `uri`."""

    uri: str
    """Opens the same place again, on any machine; may carry options (`s3://bucket/run?region=eu-west-1`), never credentials."""

    def where(self, path: str = "") -> str: ...  # noqa: D102
    def child_uri(self, path: str) -> str: ...  # noqa: D102
    def read_bytes(self, path: str) -> bytes: ...  # noqa: D102
    def open_input(self, path: str) -> BinaryIO: ...  # noqa: D102
    def write_bytes(self, path: str, data: bytes) -> None: ...  # noqa: D102
    def open_output(self, path: str) -> contextlib.AbstractContextManager[OutputFile]: ...  # noqa: D102
    def create(self, path: str, data: bytes) -> bool: ...  # noqa: D102
    def replace(self, path: str, expected: bytes, data: bytes | None) -> bool: ...  # noqa: D102
    def exists(self, path: str) -> bool: ...  # noqa: D102
    def size(self, path: str) -> int: ...  # noqa: D102
    def entries(self, prefix: str) -> list[Entry]: ...  # noqa: D102
    def list(self, prefix: str) -> list[str]: ...  # noqa: D102
    def move(self, source: str, target: str) -> None: ...  # noqa: D102
    def delete_tree(self, path: str) -> None: ...  # noqa: D102
    def sweep(self, prefix: str) -> None: ...  # noqa: D102
    def free_bytes(self) -> int | None: ...  # noqa: D102


def join(*parts: str) -> str:
    """Join storage paths; empty parts vanish."""
    return "/".join(part.strip("/") for part in parts if part.strip("/"))


def read_if_there(storage: Storage, path: str) -> bytes | None:
    """The whole file, or None if there is none; one look, since a lease may come and go between two."""
    try:
        return storage.read_bytes(path)
    except MissingFileError:
        return None
    except StorageError:
        # Something that is no file has the name, or the file cannot be read.
        if storage.exists(path):
            raise
        return None


def sha256_of(storage: Storage, path: str, chunk_bytes: int = 1 << 20) -> str:
    """Hexadecimal SHA-256 of a stored file, read in pieces."""
    digest = hashlib.sha256()
    with storage.open_input(path) as source:
        while chunk := source.read(chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()


def check_entry(storage: Storage, path: str, size: int, sha256: str | None = None) -> None:
    """Compare a file with what a record says of it.

    Raises:
        CorruptFileError: the file is missing, or has another size or (when given) digest.
    """
    try:
        found = storage.size(path)
    except MissingFileError:
        found = None
    check_size(storage, path, size, found)
    if sha256 is not None:
        check_content(storage, path, sha256)


def check_size(storage: Storage, path: str, size: int, found: int | None) -> None:
    """Compare the size that a file was found to have, None if it was not found, with what a record says.

    Raises:
        CorruptFileError: they differ.
    """
    if found is None:
        raise CorruptFileError(f"{storage.where(path)} is missing although a record vouches for it")
    if found != size:
        raise CorruptFileError(f"{storage.where(path)} has {found} bytes where its record says {size}")


def check_content(storage: Storage, path: str, sha256: str) -> None:
    """Hash a file and compare it with what a record says.

    Raises:
        CorruptFileError: they differ.
    """
    _check_digest(storage, path, sha256_of(storage, path), sha256)


def read_checked(storage: Storage, path: str, size: int, sha256: str) -> bytes:
    """A whole file, if it is what a record says of it.

    Raises:
        CorruptFileError: the file is missing, or has another size or digest.
    """
    data = read_if_there(storage, path)
    check_size(storage, path, size, None if data is None else len(data))
    assert data is not None
    _check_digest(storage, path, hashlib.sha256(data).hexdigest(), sha256)
    return data


def _check_digest(storage: Storage, path: str, found: str, sha256: str) -> None:
    if found != sha256:
        raise CorruptFileError(f"{storage.where(path)} has other content than its record says (SHA-256 differs)")
