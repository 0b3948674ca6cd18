"""What every storage does alike: on a local disk, in an S3 store, and in one whose every other request goes wrong."""

import hashlib
import os
import random
import secrets
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from s3 import Faults, Store

from hardmoe.errors import CorruptFileError, MissingFileError, StorageError
from hardmoe.storage import Storage, check_entry, open_storage, read_if_there, sha256_of
from hardmoe.tables import iterate_table, read_table, write_table

MISBEHAVING = Faults(busy=0.15, refuse=0.08, cut=0.1, lose=0.1, seed=1)


@pytest.fixture(params=["local", "s3", "s3-misbehaving"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "local":
        yield open_storage(str(tmp_path / "root"))
        return
    store: Store = request.getfixturevalue("s3_store")
    uri = store.root()
    if request.param == "s3-misbehaving":
        store.proxy.faults = MISBEHAVING
    yield open_storage(uri)
    if request.param == "s3-misbehaving" and len(store.proxy.log) > 20:
        assert store.proxy.injected.total() > len(store.proxy.log) / 5


def test_written_file_reads_back_with_its_size_and_digest(storage: Storage) -> None:
    with storage.open_output("a/b.bin") as out:
        assert out.write(b"hello ") == 6
        out.write(b"world")
        assert not storage.exists("a/b.bin")
    assert storage.read_bytes("a/b.bin") == b"hello world"
    assert storage.size("a/b.bin") == out.size == 11
    assert out.sha256 == sha256_of(storage, "a/b.bin") == hashlib.sha256(b"hello world").hexdigest()
    storage.write_bytes("a/b.bin", b"anew")
    assert storage.read_bytes("a/b.bin") == b"anew"
    storage.write_bytes("empty", b"")
    assert (storage.size("empty"), storage.read_bytes("empty")) == (0, b"")


def test_input_reads_as_a_file_does_wherever_it_is_moved_to(storage: Storage, tmp_path: Path) -> None:
    """Against a local file as the oracle, for sizes around those that are read ahead."""
    content = random.Random(0).randbytes(3_000_001)
    (tmp_path / "oracle").write_bytes(content)
    storage.write_bytes("file", content)
    draw = random.Random(1)
    with storage.open_input("file") as source, (tmp_path / "oracle").open("rb") as oracle:
        assert source.seekable() and source.readable() and not source.writable()
        for _ in range(40):
            offset, size = draw.randrange(3_100_000), draw.choice([0, 1, 100, 70_000, 400_000, 1_500_000])
            whence = draw.choice([0, 0, 1, 2])
            move = offset if whence == 0 else -draw.randrange(min(5000, oracle.tell() + 1)) if whence == 1 else -offset // 2
            assert source.seek(move, whence) == oracle.seek(move, whence)
            assert source.read(size) == oracle.read(size)
            assert source.tell() == oracle.tell()
        for file in (source, oracle):
            file.seek(2_900_000)
        assert source.readline() == oracle.readline()
        buffers = bytearray(10), bytearray(10)
        assert source.readinto(buffers[0]) == oracle.readinto(buffers[1])  # type: ignore[attr-defined]
        assert buffers[0] == buffers[1]
        assert source.read() == oracle.read()
        assert source.read(1) == b""
    with pytest.raises(ValueError, match="closed file"):
        source.read(1)


def test_empty_file_is_open_to_readers(storage: Storage) -> None:
    storage.write_bytes("empty", b"")
    with storage.open_input("empty") as source:
        assert (source.read(), source.seek(0, 2), source.readline()) == (b"", 0, b"")


def test_list_is_sorted_relative_and_bound_to_whole_names(storage: Storage) -> None:
    for name in ("x/b", "x/a/c", "y", "xy/z"):
        storage.write_bytes(name, name.encode())
    assert storage.list("x") == ["a/c", "b"]
    assert storage.list("") == ["x/a/c", "x/b", "xy/z", "y"]
    assert storage.list("nothing/here") == []
    assert storage.list("y") == []
    assert not storage.exists("x")


def test_entries_change_their_version_with_the_content(storage: Storage) -> None:
    storage.write_bytes("photos/b", b"22")
    storage.write_bytes("photos/a", b"1")
    first = storage.entries("photos")
    assert [(entry.path, entry.size) for entry in first] == [("a", 1), ("b", 2)]
    assert storage.entries("photos") == first
    storage.write_bytes("photos/b", b"33")
    second = storage.entries("photos")
    assert second[0] == first[0]
    assert second[1].version != first[1].version


def test_create_writes_only_what_is_not_there(storage: Storage) -> None:
    assert storage.create("a/file", b"one")
    assert not storage.create("a/file", b"two")
    assert storage.read_bytes("a/file") == b"one"


def test_create_among_six_threads_has_exactly_one_winner_whose_content_stands(storage: Storage) -> None:
    """Contents are random, as those of leases are."""
    names = [f"races/{number}" for number in range(6)]

    def racer() -> dict[str, bytes]:
        token = secrets.token_bytes(16)
        return {name: token for name in names if storage.create(name, token)}

    with ThreadPoolExecutor(6) as pool:
        won = [future.result() for future in [pool.submit(racer) for _ in range(6)]]
    assert sorted(name for mine in won for name in mine) == sorted(names)
    for mine in won:
        assert all(storage.read_bytes(name) == token for name, token in mine.items())


def test_replace_among_four_threads_loses_no_update(storage: Storage, request: pytest.FixtureRequest) -> None:
    storage.write_bytes("counter", b"")

    def counter(mine: int) -> None:
        for step in range(4):
            while True:
                seen = storage.read_bytes("counter")
                if storage.replace("counter", seen, seen + f" {mine}/{step}".encode()):
                    break

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(counter, mine) for mine in range(4)]:
            future.result()
    steps = storage.read_bytes("counter").decode().split()
    if "misbehaving" in request.node.name:
        # An update whose answer was lost, and on which another one stands already, is made again.
        steps = sorted(set(steps))
    assert sorted(steps) == sorted(f"{mine}/{step}" for mine in range(4) for step in range(4))


def test_replace_changes_only_what_is_as_expected(storage: Storage) -> None:
    assert not storage.replace("a/file", b"", b"new")
    storage.write_bytes("a/file", b"one")
    assert not storage.replace("a/file", b"other", b"two")
    assert not storage.replace("a/file", b"other", None)
    assert storage.read_bytes("a/file") == b"one"
    assert storage.replace("a/file", b"one", b"two")
    assert storage.replace("a/file", b"two", b"two")
    assert storage.replace("a/file", b"two", None)
    assert not storage.exists("a/file")


def test_move_replaces_the_target_and_wants_a_source(storage: Storage) -> None:
    storage.write_bytes("from/file", b"new")
    storage.write_bytes("to", b"old")
    storage.move("from/file", "to")
    assert storage.list("") == ["to"]
    assert storage.read_bytes("to") == b"new"
    storage.move("to", "to")
    assert storage.read_bytes("to") == b"new"
    with pytest.raises(StorageError, match=r"cannot move .*/nothing: there is no such file"):
        storage.move("nothing", "target")


def test_delete_tree_takes_a_file_or_all_below_a_directory_and_no_neighbour(storage: Storage) -> None:
    for name in ("a/1", "a/b/2", "ab/3", "c"):
        storage.write_bytes(name, b"x")
    storage.delete_tree("a")
    assert storage.list("") == ["ab/3", "c"]
    storage.delete_tree("c")
    storage.delete_tree("nothing")
    assert storage.list("") == ["ab/3"]


@pytest.mark.parametrize("path", ["../outside", "a/../../outside", "/etc/passwd", ".."])
def test_path_that_leaves_the_root_is_refused_by_every_operation(storage: Storage, path: str) -> None:
    operations = [
        lambda: storage.read_bytes(path),
        lambda: storage.open_input(path),
        lambda: storage.write_bytes(path, b""),
        lambda: storage.open_output(path).__enter__(),
        lambda: storage.create(path, b""),
        lambda: storage.replace(path, b"", None),
        lambda: storage.exists(path),
        lambda: storage.size(path),
        lambda: storage.list(path),
        lambda: storage.move("inside", path),
        lambda: storage.delete_tree(path),
        lambda: storage.sweep(path),
    ]
    for operation in operations:
        with pytest.raises(StorageError, match="would leave the root"):
            operation()


def test_missing_file_is_one_sentence(storage: Storage) -> None:
    for operation in (storage.read_bytes, storage.open_input, storage.size):
        with pytest.raises(MissingFileError, match=r"^cannot read \S+/nothing: there is no such file$"):
            operation("nothing")
    with pytest.raises(CorruptFileError, match=r"/nothing is missing although a record vouches for it"):
        check_entry(storage, "nothing", 3)


def test_exception_while_writing_leaves_the_old_file_and_passes_as_it_is(storage: Storage) -> None:
    storage.write_bytes("there", b"old")
    with pytest.raises(FileNotFoundError), storage.open_output("there") as out:
        out.write(b"new")
        Path("/does/not/exist").read_bytes()
    assert storage.read_bytes("there") == b"old"


def test_table_written_and_read_by_pyarrow_is_the_same_table(storage: Storage) -> None:
    table = pa.table({"id": list(range(3000)), "image": [os.urandom(700) for _ in range(3000)]})
    written = write_table(storage.open_output("table.parquet"), table, row_group_size=500)
    check_entry(storage, "table.parquet", written.size, written.sha256)
    assert read_table(storage, "table.parquet", table.schema).equals(table)
    assert read_table(storage, "table.parquet", table.schema, ["id"]).equals(table.select(["id"]))
    assert pa.concat_tables(iterate_table(storage, "table.parquet", table.schema)).equals(table)


def test_uri_opens_the_same_place_and_child_uri_one_below(storage: Storage) -> None:
    storage.write_bytes("a/b 100%/c", b"x")
    assert open_storage(storage.uri).read_bytes("a/b 100%/c") == b"x"
    assert storage.where("a/c").endswith("/a/c")
    if storage.uri.startswith("s3://"):
        # A local path is taken literally.
        assert open_storage(storage.child_uri("a/b 100%")).list("") == ["c"]
    assert open_storage(storage.child_uri("a")).list("") == ["b 100%/c"]


def test_file_that_comes_and_goes_is_there_or_not_but_never_an_error(storage: Storage) -> None:
    """Two drivers that took and gave back one lease: looking twice (is it there? read it) fell between the two."""
    ends = threading.Event()

    def holder() -> None:
        while not ends.is_set():
            assert storage.create("lease", b"token")
            assert storage.replace("lease", b"token", None)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(holder)
        try:
            seen = Counter(read_if_there(storage, "lease") for _ in range(60))
        finally:
            ends.set()
        future.result()
    assert seen.keys() <= {b"token", None}
    assert read_if_there(storage, "lease") is None
