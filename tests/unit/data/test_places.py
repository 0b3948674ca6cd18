"""Single files by path or URI."""

from contextlib import closing
from pathlib import Path

import pytest

from hardmoe.data.places import open_place, read_place, split_place
from hardmoe.errors import DataError, StorageError


@pytest.mark.parametrize(
    ("place", "folder", "name"),
    [
        ("a/b.txt", "a", "b.txt"),
        ("b.txt", ".", "b.txt"),
        ("/b.txt", "/", "b.txt"),
        ("s3://bucket/a/b%20c #1.txt", "s3://bucket/a", "b%20c #1.txt"),
        ("s3://bucket/a/b.txt?region=eu-west-1", "s3://bucket/a?region=eu-west-1", "b.txt"),
        ("s3://bucket/b.txt?endpoint=http://127.0.0.1:5000/x", "s3://bucket?endpoint=http://127.0.0.1:5000/x", "b.txt"),
    ],
)
def test_place_is_split_into_folder_with_options_and_name(place: str, folder: str, name: str) -> None:
    assert split_place(place) == (folder, name)


@pytest.mark.parametrize("name", ["words.txt", "wörter #1 100%.txt", "a[1].txt"])
def test_file_is_read_by_path_and_by_uri(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"content")
    for place in (str(tmp_path / name), (tmp_path / name).as_uri()):
        assert read_place(place, "the list", "hashtags.deny") == b"content"
        with closing(open_place(place)) as file:
            assert file.read() == b"content"


def test_file_that_is_not_there_is_refused_naming_the_key(tmp_path: Path) -> None:
    for place in (str(tmp_path / "absent.txt"), (tmp_path / "absent.txt").as_uri()):
        with pytest.raises(DataError, match=r"the list .*absent\.txt cannot be read .*; correct hashtags\.deny"):
            read_place(place, "the list", "hashtags.deny")
        with pytest.raises(StorageError):
            open_place(place)
