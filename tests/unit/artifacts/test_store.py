"""The store: an artifact exists exactly when its record does; reuse refers and never copies."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from hardmoe.artifacts.record import RECORD_NAME, Record
from hardmoe.artifacts.store import Artifact, ArtifactStore
from hardmoe.errors import CorruptFileError, MissingRecordError, StorageError
from hardmoe.stage import FileEntry
from hardmoe.storage import LocalStorage, join


def store(directory: Path) -> ArtifactStore:
    return ArtifactStore(LocalStorage(directory))


def add(there: ArtifactStore, name: str, content: bytes = b"data", **inputs: Artifact) -> Artifact:
    there.storage.write_bytes(f"{name}/sub/file.bin", content)
    entry = FileEntry("sub/file.bin", len(content), hashlib.sha256(content).hexdigest())
    references = {role: artifact.reference() for role, artifact in inputs.items()}
    record = Record("kind", 1, f"print-of-{name}", {}, references, [entry], {"size": len(content)})
    return there.commit(name, record, b"{}")


def take(there: ArtifactStore, name: str, *roots: ArtifactStore, **inputs: Artifact) -> Artifact | None:
    return there.reuse(name, f"print-of-{name}", inputs, [root.storage.uri for root in roots], b"{}")


def test_artifact_exists_when_its_record_does_and_not_before(tmp_path: Path) -> None:
    there = store(tmp_path)
    there.storage.write_bytes("features/file", b"")
    assert there.find("features") is None
    with pytest.raises(MissingRecordError, match=r"/features/artifact.json does not exist: 'features' was never finished"):
        there.get("features")
    add(there, "features")
    assert there.get("features").payload == {"size": 4}
    assert there.get("features").files(suffix=".bin") == ["features/sub/file.bin"]
    assert there.get("features").files("other/") == []


def test_first_record_stands_when_two_builders_commit(tmp_path: Path) -> None:
    there = store(tmp_path)
    first = add(there, "a")
    second = there.commit("a", replace(first.record, payload="another"), b"{}")
    assert second.payload == first.payload == {"size": 4}


def test_damaged_record_is_an_error_and_not_an_absence(tmp_path: Path) -> None:
    there = store(tmp_path)
    add(there, "a")
    there.storage.write_bytes(join("a", RECORD_NAME), b"{}")
    with pytest.raises(CorruptFileError, match=r"/a/artifact.json is not a record"):
        there.find("a")


def test_verify_follows_a_chain_of_reuse_to_the_files(tmp_path: Path) -> None:
    """Three roots, each taking over from the one before: the record refers to where the files lie, not to the middle one."""
    first, second, third = (store(tmp_path / name) for name in ("first", "second", "third"))
    origin = add(first, "a")
    assert take(second, "a", first) is not None
    taken = take(third, "a", second)
    assert taken is not None
    assert taken.record.reused_from == f"{first.storage.uri}/a"
    assert taken.record_digest == origin.record_digest
    assert not third.storage.exists("a/sub/file.bin")
    assert taken.storage.read_bytes(taken.path("sub/file.bin")) == b"data"
    assert [taken.storage.read_bytes(path) for path in taken.files()] == [b"data"]
    assert third.get("a").verify() == 1
    first.storage.write_bytes("a/sub/file.bin", b"dota")
    with pytest.raises(CorruptFileError, match=rf"{tmp_path}/first/a/sub/file.bin has other content"):
        third.get("a").verify()
    first.storage.delete_tree("a/sub")
    with pytest.raises(CorruptFileError, match=rf"{tmp_path}/first/a/sub/file.bin is missing although a record vouches"):
        third.get("a").verify()


def test_reuse_wants_the_same_fingerprint_and_the_very_same_inputs(tmp_path: Path) -> None:
    """An expert trained again on a GPU has the same recipe and other bytes; what stood on the first must not be mixed in."""
    first, second = store(tmp_path / "first"), store(tmp_path / "second")
    add(first, "features", data=add(first, "dataset"))
    assert second.reuse("features", "another-print", {}, [first.storage.uri], b"{}") is None
    other = add(second, "dataset", b"other")
    assert take(second, "features", first, data=other) is None
    same = take(store(tmp_path / "third"), "dataset", first)
    assert same is not None
    assert take(store(tmp_path / "third"), "features", first, data=same) is not None


def test_first_root_that_has_it_is_taken(tmp_path: Path) -> None:
    empty, first, second, mine = (store(tmp_path / name) for name in ("empty", "first", "second", "mine"))
    add(first, "a")
    add(second, "a")
    taken = take(mine, "a", empty, first, second)
    assert taken is not None
    assert taken.record.reused_from == f"{first.storage.uri}/a"


def test_root_to_reuse_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="s3://bucket"):
        store(tmp_path).reuse("a", "f", {}, ["s3://bucket/run"], b"{}")
