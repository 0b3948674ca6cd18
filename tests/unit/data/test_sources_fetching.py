"""Images that a table names: what lies below the folder is read, in order and ahead; everything else spoils its own row."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from botocore.exceptions import ClientError
from s3 import Store

from hardmoe.data.sources import fetching
from hardmoe.data.sources.fetching import ImageFolder, in_order
from hardmoe.data.sources.fields import UnusableRowError
from hardmoe.errors import DataError, StorageError
from hardmoe.storage import Storage, open_storage

KEY = "dataset.image_root"


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def reason(folder: ImageFolder, named: str) -> str:
    with pytest.raises(UnusableRowError) as caught:
        folder.read(named)
    return str(caught.value)


def test_paths_and_uris_below_the_folder_are_read(tmp_path: Path) -> None:
    root = write(tmp_path / "photos", "a/1.jpg", "ü 100%.jpg")
    for place in (str(root), f"file://{root}", f"{root}/"):
        folder = ImageFolder(place, KEY)
        for named in ("a/1.jpg", "./a//1.jpg", "a/b/../1.jpg", f"{root}/a/1.jpg", f"file://{root}/a/1.jpg"):
            assert folder.read(named) == b"a/1.jpg"
        assert folder.read("ü 100%.jpg") == "ü 100%.jpg".encode()
        assert folder.read(f"file://{root}/%C3%BC%20100%25.jpg") == "ü 100%.jpg".encode()


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("../secret.jpg", "outside dataset.image_root"),
        ("a/../../secret.jpg", "outside dataset.image_root"),
        ("/etc/passwd", "outside dataset.image_root"),
        ("{root}x/1.jpg", "outside dataset.image_root"),
        ("{root}/../secret.jpg", "outside dataset.image_root"),
        ("file://" + "/etc/passwd", "outside dataset.image_root"),
        ("s3://bucket/photos/a.jpg", "outside dataset.image_root"),
        ("https://example.org/a.jpg", "a web address; download the images first"),
        ("http://example.org/a.jpg", "a web address; download the images first"),
        ("b.jpg", "no such file"),
        ("a.jpg/b.jpg", "no such file"),
        ("a", "no such file"),
        ("pipe", "no such file"),
        ("", "no such file"),
        (".", "no such file"),
        ("a\0.jpg", "no such file"),
        ("x" * 300, "the file cannot be read"),
    ],
)
def test_name_that_cannot_be_read_has_a_short_stable_reason(tmp_path: Path, named: str, expected: str) -> None:
    root = write(tmp_path / "photos", "a.jpg")
    write(tmp_path, "secret.jpg", "photosx/1.jpg")
    (root / "a").mkdir()
    os.mkfifo(root / "pipe")
    assert reason(ImageFolder(str(root), KEY), named.format(root=root)) == expected


def test_file_beyond_any_image_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path, "1.jpg")
    monkeypatch.setattr(fetching, "MOST_IMAGE_BYTES", 4)
    assert reason(ImageFolder(str(root), KEY), "1.jpg") == "the file is larger than 1 GiB"


def test_folder_that_is_not_there_is_refused_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.image_root '.*/nowhere' is not a folder"):
        ImageFolder(f"{tmp_path}/nowhere", KEY)


def test_store_serves_what_lies_below_its_prefix_only(s3_store: Store) -> None:
    uri = s3_store.root("my photos")
    open_storage(uri).write_bytes("a/1.jpg", b"one")
    bucket = uri.split("/")[2]
    folder = ImageFolder(uri, KEY)
    assert folder.read("a/1.jpg") == folder.read(f"s3://{bucket}/my photos/a/1.jpg") == b"one"
    assert folder.read("./a/x/../1.jpg") == b"one"
    assert reason(folder, "a/2.jpg") == reason(folder, "\udce9.jpg") == "no such file"
    for named in (
        "../other/1.jpg",
        f"s3://{bucket}/other/1.jpg",
        "s3://elsewhere/my photos/a/1.jpg",
        "/a/1.jpg",
        "file://" + "/a/1.jpg",
    ):
        assert reason(folder, named) == "outside dataset.image_root"
    assert ImageFolder(uri.replace("/my%20photos", "").replace("/my photos", ""), KEY).read("my photos/a/1.jpg") == b"one"


def test_store_that_does_not_answer_stops_the_run_instead_of_spoiling_every_row(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hardmoe.storage.s3_client.PATIENCE_SECONDS", 0.1)
    folder = ImageFolder(f"s3://{s3_store.bucket()}/photos?endpoint={s3_store.direct}", KEY)
    absent = ImageFolder(f"s3://no-such-bucket/photos?endpoint={s3_store.direct}", KEY)
    gone = ImageFolder("s3://bucket/photos?endpoint=http://127.0.0.1:9", KEY)
    with pytest.raises(StorageError, match="does not answer"):
        list(gone.read_all(["1.jpg", "2.jpg"], str))
    with pytest.raises(StorageError, match="there is no such bucket"):
        list(absent.read_all(["1.jpg", "2.jpg"], str))
    found = [str(found) for _, found in folder.read_all(["1.jpg", None, "https://a/b"], lambda named: named)]
    assert found[1:] == ["null image", "a web address; download the images first"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [("AccessDenied", "access is denied"), ("InvalidObjectState", "archived"), ("KeyTooLongError", "no such file")],
)
def test_single_refusals_spoil_their_rows_and_many_in_a_row_stop_the_run(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    uri = s3_store.root("photos")
    storage = open_storage(uri)
    storage.write_bytes("1.jpg", b"one")
    open_input = type(storage).open_input

    def refuse(self: Storage, path: str) -> BinaryIO:
        if path == "1.jpg":
            return open_input(self, path)
        raise StorageError(f"cannot read {path}: refused") from ClientError({"Error": {"Code": code}}, "GetObject")

    # The store of the tests has no rights to refuse.
    monkeypatch.setattr(type(storage), "open_input", refuse)
    folder = ImageFolder(uri, KEY)
    names = (["1.jpg"] + ["2.jpg"] * 15) * 3
    assert {str(found) for _, found in folder.read_all(names, str)} == {str(b"one"), reason}
    with pytest.raises(StorageError, match=r"cannot read 2\.jpg: refused"):
        list(folder.read_all([*names, "2.jpg"], str))


def test_rows_keep_their_order_whatever_order_the_files_arrive_in(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(300)]
    folder = ImageFolder(str(write(tmp_path, *names[::2])), KEY)
    found = list(folder.read_all(names, str))
    assert [item for item, _ in found] == names
    assert [data for _, data in found[::2]] == [name.encode() for name in names[::2]]
    assert {str(error) for _, error in found[1::2]} == {"no such file"}


def test_items_are_pulled_a_bounded_way_ahead() -> None:
    pulled = 0

    def items() -> Iterator[int]:
        nonlocal pulled
        for number in range(1000):
            pulled += 1
            yield number

    results = in_order(lambda number: -number, items(), lambda _: 0)
    assert [next(results) for _ in range(3)] == [(0, 0), (1, -1), (2, -2)]
    assert pulled <= 3 + fetching._WINDOW
    results.close()


def test_large_results_shorten_the_way_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_WINDOW_BYTES", 100)
    running, most = 0, 0
    lock = threading.Lock()

    def load(number: int) -> bytes:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        return bytes(60)

    for _ in in_order(load, range(200), len):
        with lock:
            running -= 1
    # Two results are too many bytes; beyond them only what the threads have in hand, and as many that wait for them.
    assert most <= 2 + 2 * fetching._THREADS < fetching._WINDOW


def test_failure_of_the_function_reaches_the_caller_and_stops_the_rest() -> None:
    started = []

    def load(number: int) -> int:
        started.append(number)
        if number == 5:
            raise ValueError("five")
        return number

    with pytest.raises(ValueError, match="five"):
        list(in_order(load, range(10_000), lambda _: 0))
    assert len(started) < 200
