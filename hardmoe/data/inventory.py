"""The identity of an external source: a digest of its sorted list of (name, size, content digest).

What an object store says of an object's content (its ETag) is taken as it is: reading terabytes to plan a run would cost as
much as ingesting them. So the same files on a disk and in a bucket are two sources, with equal examples.

Content decides, never paths or times; but a file whose size and modification time stand as they did is not read again, so
looking at a finished run costs a listing. The list itself is kept with the finished dataset, so that a changed source can be
told by its files' names and not by two digests. Rejected: trusting the times themselves, which a copy or a checkout changes.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hardmoe.artifacts.fingerprint import digest
from hardmoe.data.sources.base import SourceFile
from hardmoe.errors import DataError, StorageError
from hardmoe.storage import Storage, read_if_there

CACHE_PATH = "dataset/_progress/inventory.json"
_THREADS = 4
_NAMED = 3


@dataclass(frozen=True)
class Inventory:
    """A source's files, by name, with size in bytes and digest: SHA-256, or what an object store says of an object."""

    files: dict[str, tuple[int, str]]

    def digest(self) -> str:
        """Hexadecimal SHA-256 over the sorted names, sizes and contents."""
        return digest([[name, size, of] for name, (size, of) in sorted(self.files.items())])

    def changes_since(self, earlier: "Inventory") -> str:
        """Which files changed, appeared or vanished: `changed: 3.parquet; vanished: 4.parquet, 5.parquet`."""
        common = self.files.keys() & earlier.files.keys()
        kinds = {
            "changed": [name for name in common if self.files[name] != earlier.files[name]],
            "appeared": self.files.keys() - common,
            "vanished": earlier.files.keys() - common,
        }
        return "; ".join(f"{kind}: {_listed(names)}" for kind, names in kinds.items() if names)


def take_inventory(
    files: Sequence[SourceFile], storage: Storage, cache_path: str = CACHE_PATH, recipe_key: str = "dataset.path"
) -> Inventory:
    """Digest every file that changed since the last time, and remember the digests in the root.

    Args:
        files: the files, as they are listed now.
        storage: the root.
        cache_path: where in the root the digests of these files are remembered.
        recipe_key: the key that names the files, for messages.

    Raises:
        DataError: a file cannot be read.
    """
    cache = _load_cache(storage, cache_path)
    given = {_key(file): file.digest for file in files if file.digest is not None}
    changed = [file for file in files if _key(file) not in cache and _key(file) not in given]
    with ThreadPoolExecutor(_THREADS) as pool:
        fresh = dict(zip(map(_key, changed), pool.map(partial(_sha256, recipe_key), changed), strict=True))
    known = {key: given.get(key) or fresh.get(key) or cache[key] for key in map(_key, files)}
    remembered = {key: value for key, value in known.items() if key not in given}
    if remembered != cache:
        # Only a cache: a finished run on a read-only or full disk can still be looked at, and anything else fails by itself.
        with suppress(StorageError):
            storage.write_bytes(cache_path, (json.dumps(remembered, indent=0, sort_keys=True) + "\n").encode())
    return Inventory({file.name: (file.size, known[_key(file)]) for file in files})


def cache_of(dataset: str) -> str:
    """Where in the root the digests of the files that a dataset is made of are remembered."""
    return f"{dataset}/_progress/inventory.json"


def known_bytes(storage: Storage) -> int | None:
    """The size of the dataset's source as the digests remembered in the root tell it; None where they do not."""
    sizes = [key.rsplit("|", 2)[1] for key in _load_cache(storage, CACHE_PATH) if key.count("|") >= 2]
    return sum(map(int, sizes)) if sizes and all(map(str.isdigit, sizes)) else None


def _listed(names: Iterable[str]) -> str:
    chosen = sorted(names)
    more = len(chosen) - _NAMED
    return ", ".join(chosen[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _key(file: SourceFile) -> str:
    return f"{file.path}|{file.size}|{file.version}"


def _load_cache(storage: Storage, path: str) -> dict[str, str]:
    try:
        cache = json.loads(read_if_there(storage, path) or b"{}")
    except ValueError:
        cache = None
    # Only a cache: a damaged one costs a second reading.
    return cache if isinstance(cache, dict) else {}


def _sha256(recipe_key: str, file: SourceFile) -> str:
    try:
        with Path(file.path).open("rb") as source:
            return hashlib.file_digest(source, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"cannot read {file.path}: {error.strerror or error}; make it readable or take it out of {recipe_key}"
        ) from error
