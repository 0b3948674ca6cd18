"""Which files `dataset.path` means: paths, folders, patterns and URIs, and lists of them, all to one sorted table of names.

A file's name is its place relative to the folder that all files have in common, so moved data keep their names, and rows and
fingerprints with them. A pattern in an object store lists the longest folder without a wildcard and matches the rest; on a
disk only the folders that the pattern asks for are looked into. Files and folders that begin with a dot are left out: they
are half-finished downloads and caches. Rejected: `fsspec`, whose listings say nothing of versions and which would bring
another way of giving credentials than the run's root has.
"""

import errno
import glob
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hardmoe.data.sources.base import SourceFile
from hardmoe.data.sources.fields import escaped, printable
from hardmoe.errors import DataError, StorageError
from hardmoe.storage import Entry, Storage, join, open_storage


@dataclass(frozen=True)
class InputFile:
    """One file of a collection."""

    root: str
    """URI of the folder that all files of the place have in common; `open_storage` opens it on any machine."""
    path: str
    """Where the file is below it."""
    entry: Entry | None
    """What the listing said of it; None on a disk, where that costs a call per file."""


@dataclass
class Inputs:
    """The files of a collection, by name."""

    files: dict[str, InputFile]
    """Sorted by name."""
    folder: str | None
    """URI of the folder that the names are relative to; None if the files lie in several places."""
    _was_described: bool = False

    def source_files(self) -> list[SourceFile]:
        """Sizes and versions of all files as they are now, for the inventory; files that were added since are left out.

        Raises:
            DataError: a file vanished meanwhile.
            StorageError: an object store cannot be listed.
        """
        storages = Storages()
        if self._was_described:
            self._list_again(storages)
        self._was_described = True
        return [_described(name, file, storages) for name, file in self.files.items()]

    def _list_again(self, storages: "Storages") -> None:
        """Ask the stores what has become of the files; the first listing was minutes or days ago."""
        roots = {file.root for file in self.files.values() if file.entry is not None}
        now = {(root, entry.path): entry for root in roots for entry in storages[root].entries("")}
        for name, file in self.files.items():
            if file.entry is not None:
                if (entry := now.get((file.root, file.path))) is None:
                    raise DataError(f"{storages[file.root].where(file.path)} is not there any more; put it back or run again")
                self.files[name] = replace(file, entry=entry)


class Storages:
    """The places of a collection, each opened once."""

    def __init__(self) -> None:
        self._open: dict[str, Storage] = {}

    def __getitem__(self, root: str) -> Storage:
        if root not in self._open:
            self._open[root] = open_storage(root)
        return self._open[root]


@dataclass(frozen=True)
class _Match:
    """What one entry of `dataset.path` means in one place."""

    place: str
    """Scheme, bucket and options; empty for this machine's disks."""
    base: str
    """Folder that names may be relative to, if this is the only entry; absolute in the place."""
    entries: dict[str, Entry | None]
    """By path, absolute in the place."""


@dataclass(frozen=True)
class _Wanted:
    """What a source looks for, as `find_inputs` is told."""

    example: str
    endings: frozenset[str] | None
    key: str

    def is_image(self, file: str) -> bool:
        """Whether the name's ending is one of those that are searched for."""
        name = file.rpartition("/")[2]
        return self.endings is not None and "." in name and name.rpartition(".")[2].lower() in self.endings


def find_inputs(
    path: str | list[str] | None,
    source: str,
    example: str,
    endings: frozenset[str] | None = None,
    *,
    key: str = "dataset.path",
) -> Inputs:
    """The files that `dataset.path` means.

    Args:
        path: as the recipe gives it.
        source: the source's name, for messages.
        example: what the recipe could say, such as `photos/*.parquet`.
        endings: None for a source that reads the files that a pattern names. Else folders are searched for files with these
            endings (lower case, without the dot), and names are relative to the folders.
        key: the recipe's key, for messages.

    Raises:
        DataError: nothing is given or found, or a folder is given where a pattern is needed.
        StorageError: an object store cannot be listed.
    """
    patterns = [path] if isinstance(path, str) else path or []
    if not patterns:
        kinds = f"a file, a pattern such as {example}" if endings is None else f"a folder such as {example}"
        raise DataError(f"the source {source!r} needs {key}; give {kinds}, or a list")
    wanted = _Wanted(example, endings, key)
    matches: dict[str, list[_Match]] = {}
    for pattern in patterns:
        find = _remote if "://" in pattern and not pattern.startswith("file://") else _local
        match = find(pattern, wanted)
        matches.setdefault(match.place, []).append(match)
    found: list[tuple[str, InputFile]] = []
    folders = []
    for number, (place, group) in enumerate(matches.items()):
        folder = _common_folder(group, wanted)
        root = open_storage(place).child_uri(folder) if place else folder
        folders.append(root)
        # Files of several buckets have no folder in common: their places are numbered as they are listed.
        prefix = "" if len(matches) == 1 else f"{number}/"
        start = len(folder.rstrip("/")) + 1 if folder else 0
        entries = {file: entry for match in group for file, entry in match.entries.items()}
        found += [(escaped(prefix + file[start:]), InputFile(root, file[start:], entry)) for file, entry in entries.items()]
    found.sort(key=lambda item: item[0])
    return Inputs(dict(found), folders[0] if len(folders) == 1 else None)


def _common_folder(group: list[_Match], wanted: _Wanted) -> str:
    if wanted.endings is None:
        folders = {os.path.dirname(file) for match in group for file in match.entries}  # noqa: PTH120
    else:
        folders = {match.base for match in group}
    return os.path.commonpath(folders)


def _described(name: str, file: InputFile, storages: Storages) -> SourceFile:
    storage = storages[file.root]
    if file.entry is not None:
        return SourceFile(name, storage.child_uri(file.path), file.entry.size, file.entry.version, file.entry.digest)
    path = f"{file.root.rstrip('/')}/{file.path}"
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError as error:
        raise DataError(f"{printable(path)} is not there any more ({error.strerror}); put it back or run again") from error
    return SourceFile(name, path, status.st_size, str(status.st_mtime_ns))


# A disk


def _local(pattern: str, wanted: _Wanted) -> _Match:
    path = Path(unquote(urlsplit(pattern).path) if pattern.startswith("file://") else pattern).expanduser()
    # Not Path.is_dir, which raises on a folder that one may not look into.
    is_folder = os.path.isdir(path)  # noqa: PTH112
    if is_folder and wanted.endings is not None:
        top = _absolute(str(path))
        return _Match("", top, dict.fromkeys(filter(wanted.is_image, _walk(top))))
    if is_folder:
        raise _is_folder(pattern, wanted)
    if os.path.exists(path):  # noqa: PTH110
        file = _absolute(str(path))
        return _Match("", os.path.dirname(file), {file: None})  # noqa: PTH120
    # pathlib's glob takes no absolute pattern and returns hidden files, such as a half-finished download.
    found = glob.glob(str(path), recursive=True)  # noqa: PTH207
    files: dict[str, Entry | None] = dict.fromkeys(_matched_files(found, wanted))
    if not files:
        here = "" if path.is_absolute() else f" (looked from {Path.cwd()})"
        raise DataError(f"{wanted.key} {pattern!r} matches no file{here}; correct the path")
    return _Match("", _absolute(_wildcard_free(str(path))), files)


def _matched_files(found: Iterable[str], wanted: _Wanted) -> Iterator[str]:
    for match in found:
        mode = os.stat(match).st_mode if os.path.exists(match) else 0  # noqa: PTH110, PTH116
        if stat.S_ISREG(mode) and (wanted.endings is None or wanted.is_image(match)):
            yield _absolute(match)
        elif stat.S_ISDIR(mode) and wanted.endings is not None:
            yield from filter(wanted.is_image, _walk(_absolute(match)))


def _absolute(path: str) -> str:
    """Absolute, without `..`, which a name must not have, but with symbolic links as they are, since they name things."""
    if ".." not in path.split("/"):
        return os.path.abspath(path)  # noqa: PTH100
    folder, name = os.path.split(path)
    return os.path.realpath(path) if name in ("", "..") else f"{os.path.realpath(folder)}/{name}"


def _walk(top: str) -> Iterator[str]:
    """All regular files below a folder, through links too, but not in circles."""
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(top, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        try:
            status = os.stat(folder)  # noqa: PTH116
            if (here := (status.st_dev, status.st_ino)) in above:
                continue
            with os.scandir(folder) as children:
                shown = [child for child in children if not child.name.startswith(".")]
        except OSError as error:
            if error.errno == errno.ELOOP:
                continue
            raise DataError(f"{printable(folder)} cannot be listed ({error.strerror}); make it readable") from error
        waiting += [(child.path, above | {here}) for child in shown if _is(child.is_dir)]
        yield from (child.path for child in shown if _is(child.is_file))


def _is(kind: Callable[[], bool]) -> bool:
    """False for a link that leads in a circle, which the system reports as an error and not as no file."""
    try:
        return kind()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


# An object store


def _remote(pattern: str, wanted: _Wanted) -> _Match:
    whole, question, options = pattern.partition("?")
    scheme, _, rest = whole.partition("://")
    bucket, _, key = rest.partition("/")
    key = unquote(key).strip("/")
    place = f"{scheme}://{bucket}{question}{options}"
    try:
        storage = open_storage(place)
    except StorageError as error:
        raise DataError(f"{wanted.key} {pattern!r} cannot be opened: {error}") from error
    searches = wanted.endings is not None
    folder = _wildcard_free(key) if glob.has_magic(key) else key if searches else key.rpartition("/")[0]
    matcher = _matcher(key)
    entries: dict[str, Entry | None] = {}
    for entry in storage.entries(folder):
        file = join(folder, entry.path)
        is_hidden = entry.path.startswith(".") or "/." in entry.path
        if file == key or (not is_hidden and (_lies_in(file, matcher, wanted) if searches else matcher.fullmatch(file))):
            entries[file] = entry
    if not entries and not searches and storage.entries(key):
        raise _is_folder(pattern, wanted)
    if not entries:
        raise DataError(f"{wanted.key} {pattern!r} matches no file; correct it")
    return _Match(place, folder, entries)


def _lies_in(file: str, folders: re.Pattern[str], wanted: _Wanted) -> bool:
    """Whether an image is matched, or lies in a folder that is."""
    parts = file.split("/")
    return wanted.is_image(file) and any(folders.fullmatch("/".join(parts[:end])) for end in range(len(parts), -1, -1))


def _matcher(pattern: str) -> re.Pattern[str]:
    """`*` within a component, `**` over any number of them, `[abc]` one character; as `glob` has it, but for `?`."""
    parts = []
    for part in pattern.split("/"):
        if part == "**":
            parts.append("(?:[^/]+/)*")
            continue
        pieces = re.split(r"(\*|\[!?[^]/]+\])", part)
        parts.append("".join(map(_piece, pieces)) + "/")
    regex = "".join(parts)
    # A final `**` means every file below, and so has no slash at its end.
    return re.compile(regex.removesuffix("/") if pattern.split("/")[-1] != "**" else f"{regex}[^/]+")


def _piece(piece: str) -> str:
    if piece == "*":
        return "[^/]*"
    if piece.startswith("[") and piece.endswith("]") and len(piece) > 2:
        inside = piece[1:-1]
        return f"[{'^/' if inside.startswith('!') else ''}{re.escape(inside.removeprefix('!')).replace(chr(92) + '-', '-')}]"
    return re.escape(piece)


# Both


def _wildcard_free(pattern: str) -> str:
    """The longest folder at the head of a pattern that has no wildcard in it."""
    parts = pattern.split("/")
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first]) or ("/" if pattern.startswith("/") else "")


def _is_folder(pattern: str, wanted: _Wanted) -> DataError:
    whole, question, options = pattern.partition("?")
    suggestion = f"{whole.rstrip('/')}/{wanted.example.rpartition('/')[2]}{question}{options}"
    return DataError(f"{wanted.key} {pattern!r} is a folder; give a pattern such as {suggestion!r}")
