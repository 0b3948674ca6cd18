"""Storage: whole files or none, exactly one winner of every race, and a sentence for everything that a disk can refuse."""

import errno
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from mounts import bind_read_only, small_disk

from hardmoe.errors import CorruptFileError, StorageError
from hardmoe.storage import LocalStorage, check_entry, join, open_storage, sha256_of
from hardmoe.tables import write_table


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "root")


def _everything(storage: LocalStorage) -> list[Path]:
    """Every file below the root, unfinished writes included."""
    return sorted(path for path in storage.directory.rglob("*") if path.is_file())


def _python(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        f"import os, sys\nfrom hardmoe.storage import LocalStorage\nfrom pathlib import Path\n{code}",
    ]
    return subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True)


def test_written_file_reads_back_with_its_size_and_digest(storage: LocalStorage) -> None:
    with storage.open_output("a/b.bin") as out:
        out.write(b"hello ")
        out.write(b"world")
    assert storage.read_bytes("a/b.bin") == b"hello world"
    assert storage.size("a/b.bin") == out.size == 11
    assert out.sha256 == sha256_of(storage, "a/b.bin") == hashlib.sha256(b"hello world").hexdigest()
    with storage.open_input("a/b.bin") as source:
        source.seek(6)
        assert source.read() == b"world"


def test_list_is_sorted_relative_and_without_unfinished_writes(storage: LocalStorage) -> None:
    for name in ("x/b", "x/a/c", "y"):
        storage.write_bytes(name, b"")
    with storage.open_output("x/unfinished") as out:
        out.write(b"half")
        assert storage.list("x") == ["a/c", "b"]
        assert storage.list("") == ["x/a/c", "x/b", "y"]
    assert storage.list("nothing/here") == []
    assert storage.list("y") == []


def test_exception_while_writing_leaves_no_file_and_passes_as_it_is(storage: LocalStorage) -> None:
    """An OSError of the block's own, here a source that vanished, was once told as if the target could not be written."""
    storage.write_bytes("there", b"old")
    with pytest.raises(FileNotFoundError), storage.open_output("there") as out:
        out.write(b"new")
        Path("/does/not/exist").read_bytes()
    assert storage.read_bytes("there") == b"old"
    assert len(_everything(storage)) == 1


def test_writer_killed_half_way_leaves_nothing_visible_and_its_leftover_is_swept_later(storage: LocalStorage) -> None:
    code = """
with LocalStorage(Path(sys.argv[1])).open_output("data/file") as out:
    out.write(b"x" * 100_000)
    out.flush()
    os.kill(os.getpid(), 9)
"""
    with _python(code, str(storage.directory)) as process:
        assert process.wait() == -signal.SIGKILL
    assert not storage.exists("data/file")
    assert storage.list("") == []
    (leftover,) = _everything(storage)
    storage.sweep("data")
    assert leftover.exists(), "it might be a write in progress"
    old = time.time() - 7200
    os.utime(leftover, (old, old))
    storage.sweep("data")
    assert _everything(storage) == []


def test_create_among_eight_processes_has_exactly_one_winner_whose_content_stands(storage: LocalStorage) -> None:
    code = """
storage = LocalStorage(Path(sys.argv[1]))
while not storage.exists("go"):
    pass
print([name for name in map(str, range(30)) if storage.create(f"races/{name}", sys.argv[2].encode() * 1000)])
"""
    processes = [_python(code, str(storage.directory), str(number)) for number in range(8)]
    storage.write_bytes("go", b"")
    won = [eval(process.communicate(timeout=60)[0]) for process in processes]
    assert sorted(name for names in won for name in names) == sorted(map(str, range(30)))
    for number, names in enumerate(won):
        assert all(storage.read_bytes(f"races/{name}") == str(number).encode() * 1000 for name in names)


def test_replace_among_eight_processes_loses_no_update(storage: LocalStorage) -> None:
    code = """
storage = LocalStorage(Path(sys.argv[1]))
for _ in range(20):
    while True:
        seen = storage.read_bytes("counter")
        if storage.replace("counter", seen, str(int(seen) + 1).encode()):
            break
"""
    storage.write_bytes("counter", b"0")
    for process in [_python(code, str(storage.directory)) for _ in range(8)]:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert storage.read_bytes("counter") == b"160"
    assert len(_everything(storage)) == 1


def test_replace_changes_only_what_is_as_expected(storage: LocalStorage) -> None:
    assert not storage.replace("a/file", b"", b"new")
    storage.write_bytes("a/file", b"one")
    assert not storage.replace("a/file", b"other", b"two")
    assert not storage.replace("a/file", b"other", None)
    assert storage.read_bytes("a/file") == b"one"
    assert storage.replace("a/file", b"one", b"two")
    assert storage.replace("a/file", b"two", None)
    assert not storage.exists("a/file")


def test_replace_works_where_directories_cannot_be_locked(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS turns flock into a lock of the file's bytes, which needs a file open for writing: directories gave EBADF."""
    real = fcntl.flock

    def like_nfs(descriptor: int, operation: int) -> None:
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", like_nfs)
    storage.write_bytes("file", b"one")
    assert storage.replace("file", b"one", b"two")
    assert not storage.replace("file", b"one", b"three")
    assert storage.list("") == ["file"]


@pytest.mark.parametrize("path", ["../outside", "a/../../outside", "/etc/passwd", ".."])
def test_path_that_leaves_the_root_is_refused_by_every_operation(storage: LocalStorage, path: str) -> None:
    operations = [
        lambda: storage.read_bytes(path),
        lambda: storage.write_bytes(path, b""),
        lambda: storage.create(path, b""),
        lambda: storage.replace(path, b"", None),
        lambda: storage.exists(path),
        lambda: storage.list(path),
        lambda: storage.move("inside", path),
        lambda: storage.delete_tree(path),
        lambda: storage.sweep(path),
    ]
    for operation in operations:
        with pytest.raises(StorageError, match="would leave the root"):
            operation()


def test_delete_tree_deletes_links_and_not_what_they_lead_to(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "photo").write_bytes(b"!")
    storage.write_bytes("run/deep/file", b"")
    (storage.directory / "run" / "link").symlink_to(tmp_path / "precious")
    (storage.directory / "run" / "file-link").symlink_to(tmp_path / "precious" / "photo")
    storage.delete_tree("run")
    assert not (storage.directory / "run").exists()
    assert (tmp_path / "precious" / "photo").read_bytes() == b"!"
    storage.delete_tree("run")


def test_directory_on_another_disk_by_a_link_is_emptied_and_the_link_stays(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "other-disk").mkdir()
    storage.directory.mkdir()
    (storage.directory / "experts").symlink_to(tmp_path / "other-disk")
    storage.write_bytes("experts/a/file", b"")
    assert storage.list("experts") == ["a/file"]
    storage.delete_tree("experts")
    assert (storage.directory / "experts").is_symlink()
    assert list((tmp_path / "other-disk").iterdir()) == []


def test_directory_that_cannot_be_listed_is_an_error_and_not_empty(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`os.walk` skips what it cannot read; completions that nobody can see would have been done again."""
    storage.write_bytes("done/unit", b"")

    def refuse(path: object) -> object:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError, match=r"cannot list .*/done: Permission denied"):
        storage.list("done")


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("", "the root is empty; give a directory"),
        ("  ", "the root is empty"),
        (
            "http://host/run",
            r"cannot use the root 'http://host/run': 'http://host' is not supported; give a local path, or s3://",
        ),
        ("file://elsewhere/run", r"'file://elsewhere' is not supported"),
    ],
)
def test_root_that_cannot_be_used_is_refused_with_the_remedy(uri: str, sentence: str) -> None:
    with pytest.raises(StorageError, match=sentence):
        open_storage(uri)


def test_root_may_be_a_path_a_home_directory_or_a_file_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert open_storage("runs/a").uri == open_storage("~/runs/a").uri == f"{tmp_path}/runs/a"
    assert open_storage(f"file://{tmp_path}/my%20run").uri == f"{tmp_path}/my run"


def test_errors_say_what_is_missing_or_in_the_way(storage: LocalStorage) -> None:
    for operation in (storage.read_bytes, storage.open_input, storage.size):
        with pytest.raises(StorageError, match=r"cannot read .*/root/nothing: there is no such file"):
            operation("nothing")
    with pytest.raises(StorageError, match=r"cannot move .*/root/nothing: there is no such file"):
        storage.move("nothing", "target")
    storage.write_bytes("file", b"")
    with pytest.raises(
        StorageError, match=r"cannot write .*/root/file/below: something else stands in its place .*; move it away"
    ):
        storage.write_bytes("file/below", b"")
    storage.write_bytes("directory/inside", b"")
    with pytest.raises(StorageError, match=r"cannot write .*/root/directory: something else stands in its place"):
        storage.write_bytes("directory", b"")
    assert not storage.exists("directory")
    assert not storage.exists("file/below")


def test_read_only_disk_reads_and_says_which_key_to_change_for_writing(storage: LocalStorage, tmp_path: Path) -> None:
    storage.write_bytes("file", b"kept")
    place = tmp_path / "read-only"
    place.mkdir()
    with bind_read_only(storage.directory, place):
        there = LocalStorage(place)
        assert there.read_bytes("file") == b"kept"
        for operation in (
            lambda: there.write_bytes("new", b""),
            lambda: there.create("new", b""),
            lambda: there.replace("file", b"kept", b"x"),
            lambda: there.move("file", "other"),
            lambda: there.delete_tree("file"),
        ):
            with pytest.raises(StorageError, match=r"Read-only file system; choose a root that is writable \(recipe key 'root'"):
                operation()


def test_full_disk_is_one_sentence_and_leaves_no_piece_of_a_file(tmp_path: Path) -> None:
    """Through pyarrow's writer as well, which calls `write` from C++."""
    (tmp_path / "disk").mkdir()
    rows = pa.table({"image": [os.urandom(50_000) for _ in range(40)]})
    with small_disk(tmp_path / "disk", "256k"):
        storage = LocalStorage(tmp_path / "disk")
        storage.write_bytes("earlier", b"kept")
        for operation in (
            lambda: storage.write_bytes("big", os.urandom(1_000_000)),
            lambda: storage.create("big", os.urandom(1_000_000)),
            lambda: storage.replace("earlier", b"kept", os.urandom(1_000_000)),
            lambda: write_table(storage.open_output("big"), rows),
        ):
            with pytest.raises(StorageError, match=r"cannot write .*: the disk is full; free some space and run again"):
                operation()
            assert [path.name for path in _everything(storage)] == ["earlier"]
        assert storage.read_bytes("earlier") == b"kept"


def test_check_entry_tells_missing_shortened_and_altered_files_apart(storage: LocalStorage) -> None:
    storage.write_bytes("file", b"abc")
    digest = hashlib.sha256(b"abc").hexdigest()
    check_entry(storage, "file", 3, digest)
    with pytest.raises(CorruptFileError, match=r"/gone is missing although a record vouches for it"):
        check_entry(storage, "gone", 3, digest)
    with pytest.raises(CorruptFileError, match=r"/file has 3 bytes where its record says 4"):
        check_entry(storage, "file", 4, digest)
    storage.write_bytes("file", b"abd")
    check_entry(storage, "file", 3)
    with pytest.raises(CorruptFileError, match=r"/file has other content than its record says"):
        check_entry(storage, "file", 3, digest)


def test_join_leaves_out_empty_parts() -> None:
    assert join("a", "", "/b/", "c/d") == "a/b/c/d"
    assert join("", "") == ""
