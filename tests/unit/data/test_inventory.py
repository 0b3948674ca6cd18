"""The source's identity: its content under its names; times only decide whether a file is read again."""

import os
from pathlib import Path

import pytest

from hardmoe.data import inventory
from hardmoe.data.inventory import CACHE_PATH, take_inventory
from hardmoe.data.sources.base import SourceFile
from hardmoe.errors import DataError
from hardmoe.storage import LocalStorage


def source_files(directory: Path) -> list[SourceFile]:
    found = []
    for path in sorted(directory.iterdir()):
        stat = path.stat()
        found.append(SourceFile(path.name, str(path), stat.st_size, stat.st_mtime_ns))
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    for name in ("a", "b", "c"):
        (directory / name).write_bytes(name.encode() * 1000)
    return directory


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "root")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content was read."""
    names: list[str] = []
    real = inventory._sha256

    def noting(file: SourceFile) -> str:
        names.append(file.name)
        return real(file)

    monkeypatch.setattr(inventory, "_sha256", noting)
    return names


def test_unchanged_files_are_read_once_and_the_root_is_written_once(
    source: Path, storage: LocalStorage, read: list[str]
) -> None:
    first = take_inventory(source_files(source), storage)
    before = (storage.directory / CACHE_PATH).stat().st_mtime_ns
    assert sorted(read) == ["a", "b", "c"]
    assert take_inventory(source_files(source), storage) == first
    assert len(read) == 3
    assert (storage.directory / CACHE_PATH).stat().st_mtime_ns == before


def test_touched_and_moved_files_are_read_again_and_are_the_same_source(
    source: Path, storage: LocalStorage, read: list[str], tmp_path: Path
) -> None:
    first = take_inventory(source_files(source), storage)
    os.utime(source / "b", (1, 1))
    assert take_inventory(source_files(source), storage).digest() == first.digest()
    assert sorted(read) == ["a", "b", "b", "c"]
    source.rename(tmp_path / "elsewhere")
    assert take_inventory(source_files(tmp_path / "elsewhere"), storage).digest() == first.digest()


def test_other_content_of_the_same_size_another_name_and_one_file_less_are_other_sources(
    source: Path, storage: LocalStorage
) -> None:
    digests = {take_inventory(source_files(source), storage).digest()}
    (source / "b").write_bytes(b"B" * 1000)
    digests.add(take_inventory(source_files(source), storage).digest())
    (source / "b").rename(source / "d")
    digests.add(take_inventory(source_files(source), storage).digest())
    (source / "d").unlink()
    digests.add(take_inventory(source_files(source), storage).digest())
    assert len(digests) == 4


def test_order_of_the_listing_does_not_matter(source: Path, storage: LocalStorage) -> None:
    files = source_files(source)
    assert take_inventory(files[::-1], storage).digest() == take_inventory(files, storage).digest()


def test_changes_are_told_by_name_and_long_lists_are_cut(source: Path, storage: LocalStorage) -> None:
    earlier = take_inventory(source_files(source), storage)
    (source / "a").write_bytes(b"new")
    (source / "b").unlink()
    for number in range(5):
        (source / f"n{number}").write_bytes(b"")
    now = take_inventory(source_files(source), storage)
    assert now.changes_since(earlier) == "changed: a; appeared: n0, n1, n2 and 2 more; vanished: b"
    assert now.changes_since(now) == ""


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff"])
def test_damaged_cache_costs_a_second_reading_and_nothing_else(
    source: Path, storage: LocalStorage, read: list[str], content: bytes
) -> None:
    first = take_inventory(source_files(source), storage)
    storage.write_bytes(CACHE_PATH, content)
    assert take_inventory(source_files(source), storage) == first
    assert len(read) == 6


def test_file_that_vanished_since_the_listing_is_named_with_the_remedy(source: Path, storage: LocalStorage) -> None:
    files = source_files(source)
    (source / "b").unlink()
    with pytest.raises(DataError, match=r"cannot read .*/source/b: No such file.*; make it readable or take it out"):
        take_inventory(files, storage)
