"""Folders of images: the table beside them in its dialects, names as hashtags, what is missing on either side."""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from s3 import Store

from hardmoe.data.config import DatasetConfig
from hardmoe.data.sources.base import BadExample, Location, RawExample
from hardmoe.data.sources.folder import FolderSource
from hardmoe.data.sources.tags_table import TagsTable
from hardmoe.errors import DataError
from hardmoe.storage import LocalStorage, open_storage


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for name in ("1.jpg", "a/2.png", "a/3.webp", "a/b c/4.JPEG"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (folder / "notes.txt").write_text("no image")
    (folder / "5.jpg.tmp").write_text("half of an image")
    (folder / ".6.jpg").write_text("hidden")
    return folder


def source_of(folder: Path | str, **config: Any) -> FolderSource:
    return FolderSource(DatasetConfig(source="folder", path=str(folder), **config))


def read(folder: Path | str, **config: Any) -> list[RawExample | BadExample]:
    source = source_of(folder, **config)
    return [row for shard in source.shards() for row in source_of(folder, **config).read(shard)]


def table_of(folder: Path, content: str | bytes, name: str = "tags.csv") -> str:
    path = folder.parent / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_folders_between_the_collection_and_the_image_are_its_hashtags(photos: Path) -> None:
    rows = read(photos)
    assert rows == [
        RawExample(b"1.jpg", (), "1.jpg", location=Location("1.jpg", 0, 5)),
        RawExample(b"a/2.png", ("a",), "a/2.png", location=Location("a/2.png", 0, 7)),
        RawExample(b"a/3.webp", ("a",), "a/3.webp", location=Location("a/3.webp", 0, 8)),
        RawExample(b"a/b c/4.JPEG", ("a", "b c"), "a/b c/4.JPEG", location=Location("a/b c/4.JPEG", 0, 12)),
    ]


def test_only_class_keeps_its_name(photos: Path) -> None:
    (photos / "1.jpg").unlink()
    assert [row.tags for row in read(photos)] == [("a",), ("a",), ("a", "b c")]


def test_several_folders_are_named_from_the_folder_they_have_in_common(photos: Path) -> None:
    (photos / "d").mkdir()
    (photos / "d" / "5.jpg").touch()
    source = FolderSource(DatasetConfig(source="folder", path=[f"{photos}/a/b c", f"{photos}/d"]))
    rows = [row for shard in source.shards() for row in source.read(shard)]
    assert [(row.source_uri, row.tags) for row in rows] == [("a/b c/4.JPEG", ("a", "b c")), ("d/5.jpg", ("d",))]
    assert list(source.fetch([rows[0].location])) == [b"a/b c/4.JPEG"]


@pytest.mark.parametrize("shard_rows", [1, 2, 3, 100])
def test_runs_hold_every_image_once_and_stay_small(photos: Path, shard_rows: int) -> None:
    assert read(photos, shard_rows=shard_rows) == read(photos)
    shards = source_of(photos, shard_rows=shard_rows).shards()
    assert len(shards) == -(-4 // shard_rows)
    assert all(len(json.dumps(shard.items)) < 300 + len(str(photos)) for shard in shards)
    assert [shard.items["within"] for shard in source_of(photos, shard_rows=2).shards()] == ["", "a"]


def test_run_is_read_by_listing_its_own_folder_only(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(photos, shard_rows=2)
    shard = source.shards()[1]
    scanned = []
    scandir = os.scandir
    monkeypatch.setattr("hardmoe.data.sources.files.os.scandir", lambda path: scanned.append(path) or scandir(path))
    assert len(list(source_of(photos, shard_rows=2).read(shard))) == 2
    assert scanned == [f"{photos}/a", f"{photos}/a/b c"]


def test_image_that_appeared_or_vanished_since_the_plan_is_refused(photos: Path) -> None:
    shard = source_of(photos).shards()[0]
    (photos / "a" / "2a.png").touch()
    with pytest.raises(DataError, match="appeared or vanished"):
        list(source_of(photos).read(shard))


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no image files \(.*jpg.*\); correct the path"):
        source_of(tmp_path).shards()
    with pytest.raises(DataError, match=r"nowhere' matches no file"):
        source_of(tmp_path / "nowhere").shards()
    with pytest.raises(DataError, match=r"needs dataset\.path; give a folder such as photos"):
        FolderSource(DatasetConfig(source="folder")).files()


@pytest.mark.parametrize("key", ["id_column", "split_column", "license_column"])
def test_column_without_a_table_is_refused(photos: Path, key: str) -> None:
    with pytest.raises(DataError, match=rf"dataset\.{key} needs a table.*dataset\.tags_path"):
        source_of(photos, **{key: "name"})


CSV = 'file_name,hashtags,photo,part,rights\n1.jpg,"#x, y",n1,train,CC0\na/3.webp,,n3,test,\n'


def test_table_gives_hashtags_ids_splits_and_licences_and_the_rest_has_none(photos: Path) -> None:
    columns = {"id_column": "photo", "split_column": "part", "license_column": "rights"}
    rows = read(photos, tags_path=table_of(photos, CSV), **columns)
    assert rows == [
        RawExample(b"1.jpg", ("#x", "y"), "1.jpg", "n1", "train", "CC0", Location("1.jpg", 0, 5)),
        RawExample(b"a/3.webp", (), "a/3.webp", "n3", "test", "", Location("a/3.webp", 0, 8)),
        RawExample(b"a/2.png", (), "a/2.png", location=Location("a/2.png", 0, 7)),
        RawExample(b"a/b c/4.JPEG", (), "a/b c/4.JPEG", location=Location("a/b c/4.JPEG", 0, 12)),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "\ufefffile_name,hashtags\r\n1.jpg,x y\r\n\r\na/2.png,z\r\n"),
        ("t.csv", 'other,filename,hashtags\n"a\nb",1.jpg,x y\n,a/2.png,"z"'),
        ("t.tsv", "path\thashtags\n1.jpg\tx y\na/2.png\tz\n"),
        ("t.CSV", "hashtags,image,path\nx y,1.jpg,nonsense\nz,./a//2.png,nonsense\n"),
        ("t.jsonl", '{"image": "1.jpg", "hashtags": ["x", "y"]}\n\n{"image": "a/2.png", "hashtags": "z", "more": 1}'),
        ("t.ndjson", '\ufeff{"path": "1.jpg", "hashtags": "x y"}\r\n{"path": "a/2.png", "hashtags": ["z"]}\r\n'),
    ],
)
@pytest.mark.parametrize("shard_rows", [1, 2, 3])
def test_dialects_of_tables(photos: Path, name: str, content: str, shard_rows: int) -> None:
    rows = read(photos, tags_path=table_of(photos, content, name), shard_rows=shard_rows)
    assert [(row.source_uri, row.tags) for row in rows[:2]] == [("1.jpg", ("x", "y")), ("a/2.png", ("z",))]
    assert [(row.source_uri, row.tags) for row in rows[2:]] == [("a/3.webp", ()), ("a/b c/4.JPEG", ())]


def test_own_name_of_the_image_column_wins(photos: Path) -> None:
    content = "path,photo,hashtags\nnonsense,1.jpg,x\n"
    rows = read(photos, tags_path=table_of(photos, content), image_column="photo")
    assert rows[0].source_uri == "1.jpg" and rows[0].tags == ("x",)


def test_broken_rows_spoil_themselves_only(photos: Path) -> None:
    content = (
        b"path,hashtags\n7.jpg,x\n1.jpg\n1.jpg,x,y\n/etc/passwd,x\n../x.jpg,x\nhttps://a/b.jpg,x\ncaf\xe9.jpg,x\na/2.png,ok\n"
    )
    rows = read(photos, tags_path=table_of(photos, content), shard_rows=3)
    assert [(row.source_uri, row.reason) for row in rows[:7]] == [
        ("tags.csv#row=0", "no such file"),
        ("tags.csv#row=1", "the row has another number of cells than the header"),
        ("tags.csv#row=2", "the row has another number of cells than the header"),
        ("tags.csv#row=3", "outside dataset.path"),
        ("tags.csv#row=4", "outside dataset.path"),
        ("tags.csv#row=5", "a web address; download the images first"),
        ("tags.csv#row=6", "the row is not UTF-8"),
    ]
    assert [row.source_uri for row in rows[7:]] == ["a/2.png", "1.jpg", "a/3.webp", "a/b c/4.JPEG"]


@pytest.mark.parametrize("name", ["tags.csv", "tags.tsv", "tags.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_table_in_utf16_is_refused_and_not_taken_for_one_with_odd_columns(photos: Path, name: str, encoding: str) -> None:
    """It was said to have no column 'hashtags', only one with a NUL after every letter."""
    with pytest.raises(DataError, match=rf"{name} is text in UTF-16(LE)?, not in UTF-8; save it as UTF-8, or convert it with"):
        read(photos, tags_path=table_of(photos, "path,hashtags\n1.jpg,x\n".encode(encoding), name))


def test_broken_lines_of_json_spoil_themselves_only(photos: Path) -> None:
    lines = ['{"path": "1.jpg", "hashtags": [7]}', '{"path": ', "[1]", '{"path": 7, "hashtags": "x"}', '{"hashtags": "x"}']
    lines += [
        "[" * 100_000,
        '{"path": "\\ud800.jpg", "hashtags": "x"}',
        '{"path": "a/2.png", "hashtags": "ok"}',
        '{"path": "a/3.webp"}',
    ]
    rows = read(photos, tags_path=table_of(photos, "\n".join(lines), "tags.jsonl"))
    assert [row.reason for row in rows[:7]] == [
        "the hashtags are neither a string nor a list of strings",
        "the line is not valid JSON",
        "the line is not a JSON object",
        "null image",
        "null image",
        "the line is not valid JSON",
        "no such file",
    ]
    assert [(row.source_uri, row.tags) for row in rows[7:]] == [("a/2.png", ("ok",)), ("a/3.webp", ()), ("a/b c/4.JPEG", ())]


@pytest.mark.parametrize(
    ("name", "content", "config", "message"),
    [
        (
            "t.csv",
            "path,hashtag\n",
            {},
            r"no column 'hashtags', only path, hashtag; set dataset\.tags_column, perhaps to 'hashtag'",
        ),
        ("t.csv", "file,hashtags\n", {}, r"no column 'image', only file, hashtags; set dataset\.image_column"),
        ("t.csv", "path,hashtags\n", {"id_column": "id"}, r"no column 'id'.*dataset\.id_column"),
        ("t.csv", "", {}, "has no header"),
        ("t.csv", "path,path,hashtags\n", {}, "more than one column 'path'"),
        ("t.csv", 'path,hashtags\n"1.jpg,x\n', {}, r"is no CSV file near byte \d+"),
        ("t.jsonl", "", {}, "has no usable row"),
        ("t.jsonl", "nonsense\n", {}, "has no usable row"),
        ("t.jsonl", '{"path": "1.jpg", "tags": []}\n', {}, r"no column 'hashtags', only path, tags; set dataset\.tags_column"),
        ("t.xlsx", "", {}, "neither CSV nor JSONL"),
    ],
)
def test_table_that_cannot_be_used_is_refused_before_any_image_is_read(
    photos: Path, name: str, content: str, config: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        source_of(photos, tags_path=table_of(photos, content, name), **config).shards()


def test_table_that_is_not_there_is_refused_by_its_key(photos: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.tags_path '.*none\.csv' matches no file"):
        source_of(photos, tags_path=f"{photos}/none.csv").files()


def test_line_of_gigabytes_is_refused_and_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with path.open("wb") as file:
        file.truncate(200 * 2**20)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="a line of more than 16 MiB"):
            list(TagsTable(LocalStorage(tmp_path), "t.jsonl").rows())
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_rows_with_a_table_are_read_without_listing_the_folder(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"tags_path": table_of(photos, CSV)}
    shard = source_of(photos, **config).shards()[0]
    monkeypatch.setattr("hardmoe.data.sources.files.os.scandir", lambda path: pytest.fail("listed"))
    source = source_of(photos, **config)
    rows = list(source.read(shard))
    assert [row.image for row in rows] == [b"1.jpg", b"a/3.webp"]
    assert list(source.fetch([row.location for row in rows])) == [b"1.jpg", b"a/3.webp"]


def test_table_is_one_of_the_files(photos: Path) -> None:
    source = source_of(photos, tags_path=table_of(photos, CSV))
    assert [file.name for file in source.files()] == ["1.jpg", "a/2.png", "a/3.webp", "a/b c/4.JPEG", "tags.csv"]
    assert [file.name for file in source_of(photos).files()] == ["1.jpg", "a/2.png", "a/3.webp", "a/b c/4.JPEG"]


def test_table_on_a_disk_may_describe_images_in_a_store(photos: Path, s3_store: Store) -> None:
    uri = s3_store.root("photos")
    open_storage(uri).write_bytes("1.jpg", b"remote")
    rows = read(uri, tags_path=table_of(photos, CSV))
    assert [row.image for row in rows if isinstance(row, RawExample)] == [b"remote"]
    assert [row for row in rows if isinstance(row, BadExample)] == [BadExample("tags.csv#row=1", "no such file")]
    open_storage(uri).write_bytes("my tags.csv", CSV.encode())
    assert read(uri, tags_path=uri.replace("?", "/my%20tags.csv?"))[1] == BadExample("my tags.csv#row=1", "no such file")


def test_image_with_a_name_that_is_no_unicode_is_read_but_has_no_location(photos: Path) -> None:
    (photos / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"image")
    (row,) = [row for row in read(photos) if row.source_uri == "caf\\xe9.jpg"]
    assert row.image == b"image" and row.location is None


def test_fetching_what_is_gone_or_was_replaced_names_it(photos: Path) -> None:
    source = source_of(photos)
    (photos / "1.jpg").write_bytes(b"another image")
    with pytest.raises(DataError, match=r"1\.jpg was replaced"):
        list(source.fetch([Location("1.jpg", 0, 5)]))
    (photos / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"1\.jpg cannot be read again \(no such file\)"):
        list(source.fetch([Location("1.jpg", 0, 5)]))


def test_row_with_a_hundred_thousand_hashtags_is_read(tmp_path: Path) -> None:
    """Seen: the whole run stopped at a cell of more than 128 kB, the limit of Python's own reader."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(b"image")
    tags = " ".join(f"tag{number}" for number in range(100_000))
    (tmp_path / "t.csv").write_text(f"path,hashtags\n1.jpg,{tags}\n")
    section = {"source": "folder", "path": str(tmp_path / "photos"), "tags_path": str(tmp_path / "t.csv")}
    source = FolderSource(DatasetConfig.model_validate(section))
    (row,) = [row for shard in source.shards() for row in source.read(shard)]
    assert isinstance(row, RawExample) and len(row.tags) == 100_000
