"""Images that a table only names: paths and URIs below one folder, read in parallel and handed on in order.

What a table names is material to judge: a name that leaves the folder, a pipe, a file of 50 GB or one that is not there each
spoil their own row and no other. Only when nothing can be read at all does the run stop, since then the place and not the
rows are at fault. The window of files under way is bounded in number and in bytes. Rejected: `Executor.map`, which holds
every result of a million files that the consumer has not come to yet.
"""

import os
import posixpath
import stat
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from hardmoe.data.sources.base import Location
from hardmoe.data.sources.fields import MOST_IMAGE_BYTES, TOO_LARGE, UnusableRowError, printable
from hardmoe.errors import DataError, StorageError
from hardmoe.storage import LocalStorage, open_storage

_THREADS = 16
_WINDOW = 64
_WINDOW_BYTES = 256 * 2**20
_LOCAL_CHUNK = 4
"""So many files on a disk are one task: to hand over a task costs as much as to read six small files."""
_GIVE_UP = 16
"""So many refusals in a row are not about the files any more."""
_ABOUT_THE_FILE = {"AccessDenied": "access is denied", "InvalidObjectState": "archived", "KeyTooLongError": "no such file"}
"""What a store says of one file and not of itself, and the reason that becomes of it."""

T = TypeVar("T")
R = TypeVar("R")


class _RefusedError(UnusableRowError):
    """The store would not hand out the file; `__cause__` is its own error."""


def in_order(
    function: Callable[[T], R], items: Iterable[T], size: Callable[[R], int], most_unfinished: int = 2 * _THREADS
) -> Iterator[tuple[T, R]]:
    """Every item with what the function makes of it, in the items' order, computed in threads a bounded way ahead.

    Args:
        function: called in a thread.
        items: pulled as they are needed.
        size: about how many bytes a result holds; it bounds how far ahead the threads run.
        most_unfinished: so many calls, whose results' sizes nobody knows yet, are handed to the threads at most.
    """
    waiting: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                while len(waiting) >= _WINDOW or _is_far_ahead(waiting, size, most_unfinished):
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _is_far_ahead(waiting: Collection[tuple[T, Future[R]]], size: Callable[[R], int], most_unfinished: int) -> bool:
    """Whether results of too many bytes wait to be taken, or too many whose size is not known yet."""
    done = [future for _, future in waiting if future.done()]
    held = sum(size(future.result()) for future in done if future.exception() is None)
    return held > _WINDOW_BYTES or len(waiting) - len(done) >= most_unfinished


class ImageFolder:
    """One folder or prefix, and the files that a table names below it.

    Args:
        root: path or URI of the folder.
        key: the recipe's key for it, which messages name.

    Raises:
        DataError: a local folder that is not there.
    """

    def __init__(self, root: str, key: str) -> None:
        self._key = key
        # A path is no URI, whatever colons are in it.
        self._storage = open_storage(root) if "://" in root else LocalStorage(Path(root).expanduser())
        self._is_local = isinstance(self._storage, LocalStorage)
        if isinstance(self._storage, LocalStorage) and not self._storage.directory.is_dir():
            raise DataError(f"{key} {root!r} is not a folder; correct it")
        scheme, _, rest = root.partition("?")[0].partition("://")
        place, _, top = rest.partition("/")
        self._top = os.path.normpath(self._storage.uri) if self._is_local else unquote(top).strip("/")
        self._place = None if self._is_local else (scheme, place)

    def path_of(self, named: str) -> str:
        """Where below the folder a path or URI of the table lies.

        Raises:
            UnusableRowError: nowhere below it.
        """
        if named.startswith(("http://", "https://")):
            raise UnusableRowError("a web address; download the images first")
        path = self._relative(named)
        # A disk may have names that are no Unicode, which Python escapes; a store has none.
        if not path or "\0" in path or (not self._is_local and printable(path) != path):
            raise UnusableRowError("no such file")
        parts = path.split("/")
        # A store's key may have empty parts; a disk has none.
        if ".." in parts or "." in parts or (self._is_local and "" in parts):
            path = posixpath.normpath(path)
        if path == ".." or path.startswith("../"):
            raise self._outside()
        return path

    def read(self, named: str) -> bytes:
        """The bytes of one file.

        Raises:
            UnusableRowError: it cannot be had.
        """
        path = self.path_of(named)
        if self._is_local:
            return _read_local(f"{self._top}/{path}")
        try:
            with closing(self._storage.open_input(path)) as file:
                data = file.read(MOST_IMAGE_BYTES + 1)
        except StorageError as error:
            # A refusal has its cause already; `from None` would only hide it.
            raise self._explained(path, error)  # noqa: B904
        if len(data) > MOST_IMAGE_BYTES:
            raise UnusableRowError(TOO_LARGE)
        return data

    def read_all(self, items: Iterable[T], name: Callable[[T], str | None]) -> Iterator[tuple[T, bytes | UnusableRowError]]:
        """The files of many rows in the rows' order, each the bytes or why there are none.

        Args:
            items: the rows.
            name: the path or URI that a row gives.

        Raises:
            StorageError: the place as a whole cannot be read.
        """
        refused = 0
        size = _LOCAL_CHUNK if self._is_local else 1
        tasks = in_order(
            lambda chunk: [self._attempt(name(item)) for item in chunk], _chunks(items, size), _size, 2 * _THREADS // size
        )
        for chunk, results in tasks:
            for item, found in zip(chunk, results, strict=True):
                refused = refused + 1 if isinstance(found, _RefusedError) else 0
                if refused == _GIVE_UP and isinstance(found, _RefusedError) and found.__cause__ is not None:
                    raise found.__cause__
                yield item, found

    def read_again(self, locations: Sequence[Location]) -> Iterator[bytes]:
        """The files at locations that were noted when they were read the first time, whole, in this order.

        Raises:
            DataError: one is gone, or is another one by its length.
        """
        for location, found in self.read_all(locations, lambda location: location.file):
            if isinstance(found, UnusableRowError):
                raise DataError(f"{location.file} cannot be read again ({found}); put it back, or run again")
            if len(found) != location.length:
                raise DataError(f"{location.file} was replaced since it was listed; put it back as it was, or run again")
            yield found

    def _attempt(self, named: str | None) -> bytes | UnusableRowError:
        try:
            if named is None:
                raise UnusableRowError("null image")
            return self.read(named)
        except UnusableRowError as error:
            return error

    def _relative(self, named: str) -> str:
        if named.startswith("file://"):
            named = unquote(urlsplit(named).path)
        elif "://" in named:
            scheme, _, rest = named.partition("://")
            place, _, path = rest.partition("/")
            if (scheme, place) != self._place:
                raise self._outside()
            return self._below(unquote(path))
        if named.startswith("/"):
            if not self._is_local:
                raise self._outside()
            return self._below(os.path.normpath(named))
        return named

    def _below(self, path: str) -> str:
        top = self._top.rstrip("/") + "/" if self._top else ""
        if not path.startswith(top):
            raise self._outside()
        return path.removeprefix(top)

    def _outside(self) -> UnusableRowError:
        return UnusableRowError(f"outside {self._key}")

    def _explained(self, path: str, error: Exception) -> Exception:
        """What a store's failure is: a reason against this row, or a store that does not answer, which stops the run."""
        from hardmoe.storage.s3_errors import code_of

        if reason := _ABOUT_THE_FILE.get(code_of(error.__cause__ or error)):
            refused = _RefusedError(reason)
            refused.__cause__ = error
            return refused
        return error if self._storage.exists(path) else UnusableRowError("no such file")


def _read_local(place: str) -> bytes:
    """A regular file; four times as fast as through the storage, and pipes are opened without waiting for a writer."""
    try:
        with os.fdopen(os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnusableRowError("no such file")
            if status.st_size > MOST_IMAGE_BYTES:
                raise UnusableRowError(TOO_LARGE)
            return file.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, UnicodeEncodeError) as error:
        raise UnusableRowError("no such file") from error
    except OSError as error:
        raise UnusableRowError("the file cannot be read") from error


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _size(results: Iterable[bytes | UnusableRowError]) -> int:
    return sum(len(found) for found in results if isinstance(found, bytes))
