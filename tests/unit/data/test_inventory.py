"""A source's identity: by content and never by place or time; and what changed, by name."""

import os
from pathlib import Path

import pytest

from hardmoe.data.inventory import CACHE_PATH, Inventory, take_inventory
from hardmoe.data.sources.base import SourceFile
from hardmoe.errors import DataError
from hardmoe.storage import open_storage


def listed(*paths: Path) -> list[SourceFile]:
    return [SourceFile(path.name, str(path), path.stat().st_size, str(path.stat().st_mtime_ns)) for path in paths]


def files(folder: Path, **contents: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(content)
    return sorted(folder.iterdir())


def test_digest_is_of_names_and_contents_and_not_of_places_or_times(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "root"))
    here = take_inventory(listed(*files(tmp_path / "here", a="1", b="2")), storage)
    there = files(tmp_path / "there", a="1", b="2")
    os.utime(there[0], (5, 5))
    assert take_inventory(listed(*reversed(there)), storage).digest() == here.digest()
    for changed in ({"a": "1", "c": "2"}, {"a": "1", "b": "3"}, {"a": "1"}, {"a": "2", "b": "1"}):
        folder = tmp_path / str(sorted(changed.items()))
        assert take_inventory(listed(*files(folder, **changed)), storage).digest() != here.digest()


def test_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    """Told by a file whose content was changed behind the cache's back: same size, same time."""
    storage = open_storage(str(tmp_path / "root"))
    (path,) = files(tmp_path / "photos", a="1")
    before, digest = path.stat(), take_inventory(listed(path), storage).digest()
    path.write_text("2")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert take_inventory(listed(path), storage).digest() == digest
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert take_inventory(listed(path), storage).digest() != digest


def test_damaged_cache_costs_a_second_reading_and_nothing_else(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "root"))
    paths = files(tmp_path / "photos", a="1", b="2")
    digest = take_inventory(listed(*paths), storage).digest()
    storage.write_bytes(CACHE_PATH, b"{half a fi")
    assert take_inventory(listed(*paths), storage).digest() == digest


def test_file_that_vanished_after_it_was_listed_is_named(tmp_path: Path) -> None:
    (path,) = files(tmp_path / "photos", a="1")
    found = listed(path)
    path.unlink()
    with pytest.raises(DataError, match=r"photos/a: No such file.*take it out of dataset\.path"):
        take_inventory(found, open_storage(str(tmp_path / "root")))


@pytest.mark.parametrize(
    ("now", "changes"),
    [
        ({"a": (1, "x"), "b": (2, "y")}, ""),
        ({"a": (1, "z"), "b": (2, "y")}, "changed: a"),
        ({"b": (2, "y"), "c": (1, "x")}, "appeared: c; vanished: a"),
        (dict.fromkeys("abcdefg", (1, "x")), "changed: b; appeared: c, d, e and 2 more"),
        ({}, "vanished: a, b"),
    ],
)
def test_changes_are_told_by_name(now: dict[str, tuple[int, str]], changes: str) -> None:
    assert Inventory(now).changes_since(Inventory({"a": (1, "x"), "b": (2, "y")})) == changes
