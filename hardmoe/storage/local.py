"""Files under a local directory, or on any mount with POSIX rename, link and flock."""

import contextlib
import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO

from hardmoe.errors import MissingFileError, StorageError
from hardmoe.storage.base import Entry, HashingWriter, join

_TEMPORARY = ".tmp-"
_LOCK = ".tmp-lock"
_ABANDONED_SECONDS = 3600.0
"""A temporary file that nobody has written to for so long is no write in progress."""


class LocalStorage:
    """Files under a local directory (or any mount with POSIX rename, link and flock)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.uri = str(self.directory)

    def where(self, path: str = "") -> str:
        """A file's place, or the root's, for people to read."""
        return f"{self.uri}/{path}" if path else self.uri

    def child_uri(self, path: str) -> str:
        """The URI of a directory below, with the same options."""
        return f"{self.uri}/{path}" if path else self.uri

    def local_path(self, path: str) -> Path:
        """The file's place on this machine.

        Raises:
            StorageError: the path would leave the root.
        """
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts:
            raise StorageError(f"the path '{path}' would leave the root {self.where()}; paths must be relative and without '..'")
        return self.directory / pure

    def read_bytes(self, path: str) -> bytes:
        """The whole file. A missing file raises MissingFileError."""
        with _translated("read", self.local_path(path)):
            return self.local_path(path).read_bytes()

    def open_input(self, path: str) -> BinaryIO:
        """Open for reading at any offset; close it after use."""
        with _translated("read", self.local_path(path)):
            return self.local_path(path).open("rb")

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write or replace a file atomically."""
        with self.open_output(path) as out:
            out.write(data)

    @contextlib.contextmanager
    def open_output(self, path: str) -> Iterator["HashedFile"]:
        """Write a file piece by piece; it appears under its name when the block ends without an exception."""
        target = self.local_path(path)
        with self._temporary(target) as temporary:
            # An OSError of the block's own (a source that vanished) is not about this file and passes as it is.
            with HashedFile(temporary, target) as out:
                yield out
            with _translated("write", target):
                temporary.replace(target)

    def create(self, path: str, data: bytes) -> bool:
        """Write a file unless there is one; False, and nothing written, if there is. Exactly one of many racing callers wins."""
        target = self.local_path(path)
        with self._temporary(target) as temporary, _translated("write", target):
            with HashedFile(temporary, target) as out:
                out.write(data)
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            return True

    def replace(self, path: str, expected: bytes, data: bytes | None) -> bool:
        """Replace a file (delete it if `data` is None) only if it holds exactly `expected`; False if it does not."""
        target = self.local_path(path)
        with _translated("write", target), self._locked_directory(target.parent) as there:
            if not there or not target.exists() or target.read_bytes() != expected:
                return False
            if data is None:
                target.unlink()
            else:
                self.write_bytes(path, data)
            return True

    def exists(self, path: str) -> bool:
        """Whether there is a file (not a directory) of that name."""
        with _translated("read", self.local_path(path)):
            return self.local_path(path).is_file()

    def size(self, path: str) -> int:
        """Bytes of the file. A missing file raises MissingFileError."""
        with _translated("read", self.local_path(path)):
            return self.local_path(path).stat().st_size

    def entries(self, prefix: str) -> list[Entry]:
        """What `list` names, with sizes and versions, sorted by path; files that vanish meanwhile are left out."""
        found = []
        for path in self.list(prefix):
            with _translated("list", self.local_path(join(prefix, path))), contextlib.suppress(FileNotFoundError):
                stat = (self.local_path(prefix) / path).stat()
                found.append(Entry(path, stat.st_size, str(stat.st_mtime_ns)))
        return found

    def list(self, prefix: str) -> list[str]:
        """Sorted paths, relative to the prefix, of all files below it; unfinished writes are left out."""
        top = self.local_path(prefix)
        with _translated("list", top):
            return sorted(p.relative_to(top).as_posix() for p in _walk_files(top) if not p.name.startswith(_TEMPORARY))

    def free_bytes(self) -> int | None:
        """What this user may still write, quotas of the file system included; None where nobody can know."""
        directory = next((path for path in (self.directory, *self.directory.parents) if path.is_dir()), None)
        try:
            return None if directory is None else shutil.disk_usage(directory).free
        except OSError:
            return None

    def move(self, source: str, target: str) -> None:
        """Rename a file, replacing what is there."""
        origin, to = self.local_path(source), self.local_path(target)
        with _translated("write", to):
            to.parent.mkdir(parents=True, exist_ok=True)
        with _translated("move", origin):
            origin.replace(to)

    def delete_tree(self, path: str) -> None:
        """Delete a file or a directory with all below it; nothing happens if there is none.

        A worker that was cut off may go on writing below; the directories that it fills meanwhile stay.
        """
        target = self.local_path(path)
        with _translated("delete", target):
            if not target.is_dir():
                target.unlink(missing_ok=True)
                return
            for directory, directories, names in os.walk(target, topdown=False, onerror=_raise_unless_gone):
                for name in [*names, *(d for d in directories if (Path(directory) / d).is_symlink())]:
                    (Path(directory) / name).unlink(missing_ok=True)
                _remove_if_empty(Path(directory))

    def sweep(self, prefix: str) -> None:
        """Delete what writers that were killed left half-written below a prefix, an hour or more ago."""
        top = self.local_path(prefix)
        with _translated("delete", top):
            for path in _walk_files(top):
                if path.name.startswith(_TEMPORARY) and path.name != _LOCK:
                    with contextlib.suppress(FileNotFoundError):
                        if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                            path.unlink()

    @contextlib.contextmanager
    def _temporary(self, target: Path) -> Iterator[Path]:
        temporary = target.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
        with _translated("write", target):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError as error:
                # Pseudo file systems such as /proc say so of every name.
                raise StorageError(f"cannot write {target}: no directory can be made there; choose another root") from error
        try:
            yield temporary
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked_directory(self, directory: Path) -> Iterator[bool]:
        """Hold an flock on the directory itself, so that no lock file is left behind; False if it does not exist."""
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            yield False
            return
        try:
            descriptor = _flocked(descriptor, directory)
            yield True
        finally:
            os.close(descriptor)


def _flocked(descriptor: int, directory: Path) -> int:
    """Lock the open directory; or, where the mount locks only files open for writing (NFS does), a small file in it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL):
            raise
    file = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    os.close(descriptor)
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _walk_files(top: Path) -> Iterator[Path]:
    for directory, _, names in os.walk(top, onerror=_raise_unless_gone):
        for name in names:
            yield Path(directory) / name


def _raise_unless_gone(error: OSError) -> None:
    """What `os.walk` may pass over: a directory that does not exist, or that another process deleted meanwhile."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError as error:
        # ENOTDIR: the directory that was to be deleted is a link to another disk; its content is gone, the link stays.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR):
            raise


class HashedFile(HashingWriter):
    """A new local file that counts and hashes what passes through, and reaches the disk before it is closed.

    Args:
        path: the file, which must not exist.
        target: the name that error messages use.
    """

    def __init__(self, path: Path, target: Path) -> None:
        super().__init__()
        self._target = target
        with _translated("write", target):
            self._file = path.open("xb")

    def write(self, data: bytes, /) -> int:
        """Append bytes."""
        view = self.note(data)
        with _translated("write", self._target):
            return self._file.write(view)

    def flush(self) -> None:
        """Hand buffered bytes to the system."""
        with _translated("write", self._target):
            self._file.flush()

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                with _translated("write", self._target):
                    self._file.flush()
                    os.fsync(self._file.fileno())
        finally:
            # What the buffer still holds is of no interest on a disk that refused it.
            with contextlib.suppress(OSError):
                self._file.close()


@contextlib.contextmanager
def _translated(verb: str, path: Path) -> Iterator[None]:
    """Turn the system's errors into one sentence with the remedy."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(f"cannot {verb} {path}: there is no such file") from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise StorageError(
            f"cannot {verb} {path}: something else stands in its place ({error.strerror}); move it away, or choose another root"
        ) from error
    except OSError as error:
        raise _explained(verb, path, error) from error


def _explained(verb: str, path: Path, error: OSError) -> StorageError:
    code = error.errno
    if code in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"cannot {verb} {path}: the disk is full; free some space and run again, finished work is kept")
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StorageError(
            f"cannot {verb} {path}: {error.strerror}; choose a root that is writable (recipe key 'root' or --root)"
        )
    return StorageError(f"cannot {verb} {path}: {error.strerror or error}")
