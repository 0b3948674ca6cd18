"""What `dataset.path` means: patterns, folders, lists and URIs, and the names that files get."""

import os
from pathlib import Path

import pytest
from s3 import Store

from hardmoe.data.sources.files import Inputs, Storages, find_inputs
from hardmoe.errors import DataError, StorageError
from hardmoe.storage import open_storage

IMAGES = frozenset({"jpg", "png"})
TREE = [
    "a.jpg",
    "b.txt",
    "cats/1.jpg",
    "cats/2.PNG",
    "cats/kittens/3.jpg",
    "dogs/[1].jpg",
    ".hidden.jpg",
    ".cache/4.jpg",
    "cats/.5.jpg",
]


@pytest.fixture(params=["local", "file-uri", "s3"])
def top(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where `TREE` lies: a path or a URI with `{}` for what follows."""
    if request.param == "s3":
        uri = request.getfixturevalue("s3_store").root("here/tree")
        storage = open_storage(uri)
        for name in TREE:
            storage.write_bytes(name, name.encode())
        place, question, options = uri.partition("?")
        return place + "{}" + question + options
    for name in TREE:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(name.encode())
    return ("file://" if request.param == "file-uri" else "") + f"{tmp_path}/tree{{}}"


def find(path: str | list[str], endings: frozenset[str] | None = None) -> Inputs:
    return find_inputs(path, "parquet", "photos/*.parquet", endings)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("/*.jpg", ["a.jpg"]),
        ("/cats/*", ["1.jpg", "2.PNG"]),
        ("/*/*.jpg", ["cats/1.jpg", "dogs/[1].jpg"]),
        ("/**/*.jpg", ["a.jpg", "cats/1.jpg", "cats/kittens/3.jpg", "dogs/[1].jpg"]),
        ("/cats/**", ["1.jpg", "2.PNG", "kittens/3.jpg"]),
        ("/cats/[13].jpg", ["1.jpg"]),
        ("/cats/[!a-c].*", ["1.jpg", "2.PNG"]),
        ("/dogs/[1].jpg", ["[1].jpg"]),
        ("/cats/1.jpg", ["1.jpg"]),
        ("/c*/1*", ["1.jpg"]),
        ("/.hidden.jpg", [".hidden.jpg"]),
    ],
)
def test_pattern_finds_the_same_files_on_a_disk_and_in_a_store(top: str, pattern: str, names: list[str]) -> None:
    found = find(top.format(pattern))
    assert list(found.files) == names
    storages = Storages()
    for file in found.files.values():
        data = storages[file.root].read_bytes(file.path).decode()
        assert data in TREE and data.endswith(file.path)
    assert [file.size for file in found.source_files()] == [len(s.read()) for s in _open_all(found)]


def _open_all(found: Inputs):  # type: ignore[no-untyped-def]
    storages = Storages()
    for file in found.files.values():
        with storages[file.root].open_input(file.path) as source:
            yield source


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["a.jpg", "cats/1.jpg", "cats/2.PNG", "cats/kittens/3.jpg", "dogs/[1].jpg"]),
        ("/", ["a.jpg", "cats/1.jpg", "cats/2.PNG", "cats/kittens/3.jpg", "dogs/[1].jpg"]),
        ("/cats", ["1.jpg", "2.PNG", "kittens/3.jpg"]),
        ("/c*", ["cats/1.jpg", "cats/2.PNG", "cats/kittens/3.jpg"]),
        ("/*/*.jpg", ["cats/1.jpg", "dogs/[1].jpg"]),
    ],
)
def test_folder_is_searched_for_images_named_relative_to_it(top: str, pattern: str, names: list[str]) -> None:
    """Relative to the folder, not to the images' common one: with one class its name would be lost."""
    assert list(find(top.format(pattern), IMAGES).files) == names


def test_list_names_files_relative_to_the_common_folder_and_each_once(top: str) -> None:
    patterns = [top.format("/cats/*.jpg"), top.format("/dogs/*"), top.format("/cats/1.jpg")]
    assert list(find(patterns).files) == ["cats/1.jpg", "dogs/[1].jpg"]
    assert list(find([top.format("/dogs"), top.format("/cats/kittens")], IMAGES).files) == ["cats/kittens/3.jpg", "dogs/[1].jpg"]


def test_nothing_found_and_a_folder_for_a_pattern_are_refused_with_the_remedy(top: str) -> None:
    with pytest.raises(DataError, match=r"dataset\.path '.*/cat/\*\.jpg.*' matches no file; correct"):
        find(top.format("/cat/*.jpg"))
    with pytest.raises(DataError, match=r"cats/9\.jpg.*' matches no file; correct"):
        find(top.format("/cats/9.jpg"))
    with pytest.raises(DataError, match=r"is a folder; give a pattern such as '.*/cats/\*\.parquet(\?endpoint=.*)?'$"):
        find(top.format("/cats"))


def test_relative_pattern_that_finds_nothing_says_where_it_looked_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"'nothing/\*' matches no file \(looked from {tmp_path}\)"):
        find("nothing/*")


def test_paths_that_go_up_name_files_without_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.jpg", "b/c/2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "b")
    assert list(find(["c/*.jpg", "../a/1.jpg"]).files) == ["a/1.jpg", "b/c/2.jpg"]
    assert list(find("../a/../b/c/*").files) == ["2.jpg"]
    assert list(find("..", IMAGES).files) == ["a/1.jpg", "b/c/2.jpg"]


def test_links_are_followed_keep_their_names_and_may_go_in_circles(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "blob").write_bytes(b"1")
    (tmp_path / "top" / "real").mkdir(parents=True)
    (tmp_path / "top" / "real" / "1.jpg").symlink_to(tmp_path / "elsewhere" / "blob")
    (tmp_path / "top" / "real" / "broken.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "top" / "real" / "round").symlink_to(tmp_path / "top")
    (tmp_path / "top" / "linked").symlink_to(tmp_path / "top" / "real")
    found = find(f"{tmp_path}/top", IMAGES)
    assert list(found.files) == ["linked/1.jpg", "real/1.jpg"]
    assert [file.size for file in found.source_files()] == [1, 1]


@pytest.mark.parametrize("pattern", ["photos", "photos/**"])
def test_link_to_itself_is_passed_over(tmp_path: Path, pattern: str) -> None:
    """Seen: "Too many levels of symbolic links" and a traceback, from one bad link among a million photos."""
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "1.png").write_bytes(b"x")
    (tmp_path / "photos" / "self").symlink_to("self")
    (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos")
    found = [file.name for file in find(f"{tmp_path}/{pattern}", IMAGES).source_files()]
    assert "a/1.png" in found and not any("self" in name for name in found)


def test_folder_that_is_no_file_and_pipes_are_not_found(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").mkdir()
    os.mkfifo(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="matches no file"):
        find(f"{tmp_path}/*.parquet")


def test_name_that_is_no_unicode_is_escaped_and_still_read(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"image")
    found = find(str(tmp_path), IMAGES)
    assert list(found.files) == ["caf\\xe9.jpg"]
    (file,) = found.files.values()
    assert Storages()[file.root].read_bytes(file.path) == b"image"
    assert [(each.name, each.size) for each in found.source_files()] == [("caf\\xe9.jpg", 5)]


def test_names_that_differ_only_in_how_they_are_escaped_are_two_files(tmp_path: Path) -> None:
    """One byte that is no Unicode, and the four characters that stand for it: one entry of the inventory, the other not read."""
    names = [b"caf\xe9.jpg", rb"caf\xe9.jpg", rb"caf\x5cxe9.jpg", b"caf\\\xe9.jpg", rb"caf\d.jpg", "café.jpg".encode()]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(name)
    found = find(str(tmp_path), IMAGES)
    assert sorted(Storages()[file.root].read_bytes(file.path) for file in found.files.values()) == sorted(names)
    by_content = {Storages()[file.root].read_bytes(file.path): name for name, file in found.files.items()}
    assert by_content[names[0]] == r"caf\xe9.jpg" and by_content[names[1]] == r"caf\x5cxe9.jpg"
    assert by_content[names[4]] == r"caf\d.jpg" and by_content[names[5]] == "café.jpg", "other names stay as they are"
    assert len({file.name for file in found.source_files()}) == len(names)


def test_files_of_several_stores_are_numbered_by_their_place_in_the_list(tmp_path: Path, s3_store: Store) -> None:
    (tmp_path / "1.jpg").write_bytes(b"disk")
    uris = [s3_store.root("x"), s3_store.root("y")]
    for uri in uris:
        open_storage(uri).write_bytes("1.jpg", uri.encode())
    first, second = (uri.replace("?", "/*?") for uri in uris)
    found = find([f"{tmp_path}/*.jpg", first, second])
    assert list(found.files) == ["0/1.jpg", "1/1.jpg", "2/1.jpg"]
    assert found.folder is None
    contents = [Storages()[file.root].read_bytes(file.path) for file in found.files.values()]
    assert contents == [b"disk", uris[0].encode(), uris[1].encode()]


def test_store_that_cannot_be_opened_or_listed_is_named(s3_store: Store) -> None:
    with pytest.raises(DataError, match=r"'s3://a/\*' cannot be opened: .*no bucket name"):
        find("s3://a/*")
    with pytest.raises(StorageError, match=r"cannot list s3://no-such-bucket.*no such bucket"):
        find(f"s3://no-such-bucket/*?endpoint={s3_store.direct}")


def test_file_that_vanished_before_it_was_described_is_named(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").touch()
    found = find(f"{tmp_path}/*.jpg")
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"1\.jpg is not there any more"):
        found.source_files()


def test_many_files_are_found_in_order(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"{number}.jpg").touch()
    found = find(f"{tmp_path}/*.jpg")
    assert list(found.files) == sorted(f"{number}.jpg" for number in range(1000))


def test_files_are_described_as_they_are_now_each_time(top: str) -> None:
    """Looked at before and after a run, a file that was replaced meanwhile must show; an added one is none of the run's."""
    found = find(top.format("/cats/*"))
    before = found.source_files()
    assert found.source_files() == before
    (file, other) = found.files.values()
    storage = open_storage(file.root)
    storage.write_bytes("3.jpg", b"added")
    storage.write_bytes(file.path, b"replaced by a longer one")
    after = found.source_files()
    assert after[0].size == 24 and after[0].version != before[0].version
    assert after[1:] == before[1:]
    storage.delete_tree(other.path)
    with pytest.raises(DataError, match=r"2\.PNG is not there any more"):
        found.source_files()
