"""Tars of samples: grouping, the places of hashtags, odd members, damage, and images fetched again."""

import gzip
import io
import json
import tarfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from collection_writers import tar_of

from hardmoe.data.config import DatasetConfig
from hardmoe.data.sources import webdataset
from hardmoe.data.sources.base import BadExample, Location, RawExample
from hardmoe.data.sources.webdataset import WebDatasetSource
from hardmoe.errors import DataError

JPEG = b"\xff\xd8 not decoded here"


def source_of(path: Path, **config: Any) -> WebDatasetSource:
    return WebDatasetSource(DatasetConfig(source="webdataset", path=str(path), **config))


def read(folder: Path, members: Sequence[tuple[str, bytes]] | bytes, **config: Any) -> list[RawExample | BadExample]:
    data = members if isinstance(members, bytes) else tar_of(members)
    (folder / "a.tar").write_bytes(data)
    source = source_of(folder / "a.tar", **config)
    return [row for shard in source.shards() for row in source.read(shard)]


def fields(**values: Any) -> bytes:
    return json.dumps(values).encode()


def test_sample_is_its_image_with_the_hashtags_of_its_json(tmp_path: Path) -> None:
    (row,) = read(tmp_path, [("0001.jpg", JPEG), ("0001.json", fields(hashtags=["a b", None, "#c"], width=7))])
    assert row == RawExample(JPEG, ("a b", "#c"), "a.tar#0001", location=Location("a.tar", 512, len(JPEG)))


def test_members_come_in_any_order_within_a_sample(tmp_path: Path) -> None:
    members = [("1.json", fields(hashtags="a")), ("1.npy", b"1"), ("1.jpg", b"one"), ("2.png", b"two"), ("2.txt", b"b")]
    rows = read(tmp_path, members)
    assert [(row.image, row.tags) for row in rows] == [(b"one", ("a",)), (b"two", ("b",))]


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "JPG", "WebP"])
def test_image_endings(tmp_path: Path, ending: str) -> None:
    (row,) = read(tmp_path, [(f"1.{ending}", b"image"), ("1.txt", b"a")])
    assert row.image == b"image"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"json": fields(hashtags=["a", "b"]), "txt": b"c", "cls": b"7"}, ("a", "b")),
        ({"json": fields(hashtags="#a #b,c")}, ("#a", "#b", "c")),
        ({"json": fields(hashtags=[])}, ()),
        ({"json": fields(hashtags=None), "txt": b"c"}, ()),
        ({"json": fields(caption="x"), "txt": "été, plage\n".encode()}, ("été", "plage")),
        ({"txt": b""}, ()),
        ({"txt": b"c", "cls": b"7"}, ("c",)),
        ({"cls": b"7\n"}, ("7",)),
        ({"cls": b"golden retriever"}, ("golden retriever",)),
    ],
)
def test_hashtags_come_from_the_first_place_that_has_them(
    tmp_path: Path, metadata: dict[str, bytes], expected: tuple[str, ...]
) -> None:
    (row,) = read(tmp_path, [("1.jpg", JPEG), *((f"1.{ending}", data) for ending, data in metadata.items())])
    assert row.tags == expected


def test_id_split_and_licence_are_fields_too_and_the_key_may_be_the_id(tmp_path: Path) -> None:
    members = [("a/1.jpg", JPEG), ("a/1.json", fields(labels=["x"], id=7, part="test", rights="CC0"))]
    config = {"tags_column": "labels", "split_column": "part", "license_column": "rights"}
    (row,) = read(tmp_path, members, id_column="id", **config)
    assert (row.key, row.split, row.license, row.tags) == ("7", "test", "CC0", ("x",))
    (row,) = read(tmp_path, members, id_column="__key__", **config)
    assert row.key == "a/1"


def test_key_is_the_path_up_to_the_first_dot_of_its_last_part(tmp_path: Path) -> None:
    members = [
        ("./v1.0/1.jpg", b"one"),
        ("./v1.0/1.seg.png", b"mask"),
        ("./v1.0/1.txt", b"a"),
        ("b/1.jpg", b"two"),
        ("b/1.txt", b"b"),
    ]
    rows = read(tmp_path, members)
    assert [(row.source_uri, row.image) for row in rows] == [("a.tar#v1.0/1", b"one"), ("a.tar#b/1", b"two")]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("1.json", b"{}"), ("1.txt", b"a")], "no image"),
        ([("1.mp4", b"film"), ("1.txt", b"a")], "no image"),
        ([("1.jpg", JPEG), ("1.png", b"x"), ("1.txt", b"a")], "two images"),
        ([("1.jpg", JPEG), ("1.jpg", b"x"), ("1.txt", b"a")], "two images"),
        ([("1.jpg", JPEG), ("1.txt", b"a"), ("1.txt", b"b")], "two .txt files"),
        ([("1.jpg", JPEG)], "no hashtags: neither .txt nor .cls nor a .json with the field 'hashtags'"),
        (
            [("1.jpg", JPEG), ("1.json", b'{"tags": []}')],
            "no hashtags: neither .txt nor .cls nor a .json with the field 'hashtags'",
        ),
        ([("1.jpg", JPEG), ("1.json", b'{"hashtags": ["a"')], "the .json is not valid JSON"),
        ([("1.jpg", JPEG), ("1.json", b"[" * 100_000)], "the .json is not valid JSON"),
        ([("1.jpg", JPEG), ("1.json", b"\xff\xfe")], "the .json is not valid JSON"),
        ([("1.jpg", JPEG), ("1.json", b'["a"]')], "the .json is not an object"),
        ([("1.jpg", JPEG), ("1.json", fields(hashtags=[1]))], "the hashtags are neither a string nor a list of strings"),
        ([("1.jpg", JPEG), ("1.json", fields(hashtags={"a": 1}))], "the hashtags are neither a string nor a list of strings"),
        ([("1.jpg", JPEG), ("1.json", b'{"hashtags": ["\\ud800"]}')], "the text is not valid Unicode"),
        ([("1.jpg", JPEG), ("1.txt", b"caf\xe9")], "the .txt is not UTF-8"),
    ],
)
def test_sample_that_is_not_whole_spoils_itself_only(tmp_path: Path, members: list[tuple[str, bytes]], reason: str) -> None:
    whole = [("0.jpg", JPEG), ("0.txt", b"a")]
    rows = read(tmp_path, [*whole, *members, ("2.jpg", JPEG), ("2.txt", b"a")])
    assert rows[1] == BadExample("a.tar#1", reason)
    assert [row.source_uri for row in rows] == ["a.tar#0", "a.tar#1", "a.tar#2"]


@pytest.mark.parametrize(
    ("value", "reason"), [(None, "null in the id column 'id'"), (1.5, "the id in 'id' is neither"), (True, "the id")]
)
def test_id_that_names_nothing_is_a_bad_example(tmp_path: Path, value: Any, reason: str) -> None:
    (row,) = read(tmp_path, [("1.jpg", JPEG), ("1.json", fields(hashtags=[], id=value))], id_column="id")
    assert isinstance(row, BadExample) and row.reason.startswith(reason)


def test_split_of_another_name_is_refused_naming_the_sample(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.tar#1: split 'val' in column 'split' is none of train, validation, test"):
        read(tmp_path, [("1.jpg", JPEG), ("1.json", fields(hashtags=[], split="val"))], split_column="split")


def test_hidden_files_directories_and_names_without_ending_are_passed_over(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        folder = tarfile.TarInfo("photos.v1")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in [("README", b"x"), ("photos.v1/._1.jpg", b"x"), ("photos.v1/1.jpg", JPEG), ("photos.v1/1.txt", b"a")]:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    (row,) = read(tmp_path, out.getvalue())
    assert row.image == JPEG and row.source_uri == "a.tar#photos.v1/1"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_link_or_device_for_an_image_is_a_bad_example(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        link = tarfile.TarInfo("1.jpg")
        link.type, link.linkname = kind, str(tmp_path / "secret")
        tar.addfile(link)
        header = tarfile.TarInfo("1.txt")
        tar.addfile(header, io.BytesIO())
    assert read(tmp_path, out.getvalue()) == [BadExample("a.tar#1", "the image is not a plain file")]


def test_names_are_never_paths(tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    rows = read(tmp_path, [("../../1.jpg", JPEG), ("../../1.txt", b"a"), ("/etc/2.jpg", JPEG), ("/etc/2.txt", b"b")])
    assert [row.source_uri for row in rows] == ["a.tar#../../1", "a.tar#/etc/2"]
    assert set(tmp_path.iterdir()) - before == {tmp_path / "a.tar"}


def test_name_that_is_no_unicode_is_escaped(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, data in [("é.jpg", JPEG), ("é.txt", b"a")]:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    (row,) = read(tmp_path, out.getvalue())
    assert row.source_uri == "a.tar#\\xe9"


def test_keys_that_differ_only_in_how_they_are_escaped_stay_two(tmp_path: Path) -> None:
    members = [(f"{key}.{ending}", data) for key in ("\udce9", r"\xe9") for ending, data in (("jpg", JPEG), ("txt", b"a"))]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    assert [row.source_uri for row in read(tmp_path, out.getvalue())] == [r"a.tar#\xe9", r"a.tar#\x5cxe9"]


def test_large_metadata_are_passed_over_in_pieces(tmp_path: Path) -> None:
    header = tarfile.TarInfo("1.json")
    header.size = 64 * 2**20
    head, tail = tar_of([("1.jpg", JPEG)])[:1024], tar_of([("2.jpg", JPEG), ("2.txt", b"a")])
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(head + header.tobuf())
        file.seek(header.size, io.SEEK_CUR)
        file.write(tail)
    source = source_of(path)
    tracemalloc.start()
    try:
        rows = list(source.read(source.shards()[0]))
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert rows[0] == BadExample("a.tar#1", "the .json is larger than 16 MiB")
    assert rows[1].image == JPEG


def test_image_beyond_any_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "MOST_IMAGE_BYTES", 4)
    rows = read(tmp_path, [("1.jpg", b"large"), ("1.txt", b"a"), ("2.jpg", b"tiny"), ("2.txt", b"a")])
    assert rows[0] == BadExample("a.tar#1", "the file is larger than 1 GiB") and rows[1].image == b"tiny"


MEMBERS = [
    (f"{number}.{ending}", data) for number in range(4) for ending, data in (("jpg", bytes([65 + number]) * 700), ("txt", b"a"))
]
"""Four samples of 2,560 bytes."""


@pytest.mark.parametrize("length", [2560, 2570, 3072, 3100, 4096, 5000, 5120, 4 * 2560])
def test_archive_that_is_cut_off_gives_its_whole_samples_and_is_named(tmp_path: Path, length: int) -> None:
    """Also where the cut falls between two members, which tarfile takes for the end."""
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(MEMBERS)[:length])
    source = source_of(path)
    rows = []
    with pytest.raises(
        DataError, match=r"a\.tar is no tar archive, or damaged after \d whole samples \(.*\); write the file again"
    ):
        rows += source.read(source.shards()[0])
        pytest.fail("it was read to its end")
    rows = []
    iterator = source.read(source.shards()[0])
    with pytest.raises(DataError):
        rows.extend(iterator)
    assert all(isinstance(row, RawExample) for row in rows)
    # The last sample in the file may have members behind the cut.
    assert len(rows) <= max(0, -(-length // 2560) - 1)


def test_archive_with_a_broken_header_in_its_middle_is_named(tmp_path: Path) -> None:
    """tarfile takes a header whose checksum is wrong for the end of the archive."""
    data = bytearray(tar_of(MEMBERS))
    data[2 * 2560 + 5] ^= 0xFF
    with pytest.raises(DataError, match=r"damaged after 1 whole samples \(bad checksum\)"):
        read(tmp_path, bytes(data))


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"x" * 2000, bytes(100), b"\x1f\x8b", b"\x1f\x8bgarbage", b"BZh91AY", gzip.compress(b"hello", mtime=0)],
)
def test_file_that_is_no_tar_is_named(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(DataError, match=r"a\.tar is no tar archive"):
        read(tmp_path, data)


def test_archive_without_members_is_empty(tmp_path: Path) -> None:
    assert read(tmp_path, tar_of([])) == []


def header_of(size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header with a valid checksum and any size field."""
    header = bytearray(tarfile.TarInfo("1.bin").tobuf())
    header[124:136] = size
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    "size",
    [
        b"77777777777\0",
        b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7,
        b"\xff" * 12,
        b"\xff" * 10 + b"\xfe\x00",
        b"\xff" * 9 + b"\xfa\0\0",
    ],
)
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, b"Z"])
def test_impossible_size_is_damage_and_neither_a_hang_nor_memory(tmp_path: Path, size: bytes, kind: bytes) -> None:
    start = tar_of([("0.jpg", JPEG), ("0.txt", b"a")])[:2048]
    with pytest.raises(DataError, match=r"a\.tar is no tar archive, or damaged"):
        read(tmp_path, start + header_of(size, kind) + tar_of([("2.jpg", JPEG)]))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_extended_header_of_gigabytes_is_damage_and_not_loaded(tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(DataError, match="an extended header of 1073741824 bytes"):
        read(tmp_path, header_of(b"%011o\0" % 2**30, kind) + bytes(4096))


def test_long_and_foreign_names_survive(tmp_path: Path) -> None:
    key = "ordner/" + "ü" * 150
    (row,) = read(tmp_path, [(f"{key}.jpg", JPEG), (f"{key}.txt", b"a")])
    assert row.source_uri == f"a.tar#{key}"
    (location,) = [row.location]
    assert list(source_of(tmp_path / "a.tar").fetch([location])) == [JPEG]


def test_compressed_archive_has_no_locations_and_its_checksum_is_checked(tmp_path: Path) -> None:
    packed = gzip.compress(tar_of(MEMBERS), mtime=0)
    rows = read(tmp_path, packed)
    assert len(rows) == 4 and all(row.location is None for row in rows)
    broken = packed[:-8] + bytes(4) + packed[-4:]
    with pytest.raises(DataError, match=r"damaged after .* whole samples"):
        read(tmp_path, broken)
    with pytest.raises(DataError, match=r"damaged after . whole samples"):
        read(tmp_path, packed[:-20])


def test_neighbours_are_fetched_in_one_read_and_any_order_is_served(tmp_path: Path) -> None:
    rows = read(tmp_path, MEMBERS)
    source = source_of(tmp_path / "a.tar")
    for order in ([0, 1, 2, 3], [3, 0, 0, 2]):
        assert list(source.fetch([rows[number].location for number in order])) == [rows[number].image for number in order]


def test_fetching_from_a_file_that_is_gone_or_shorter_names_it(tmp_path: Path) -> None:
    rows = read(tmp_path, MEMBERS)
    path = tmp_path / "a.tar"
    with pytest.raises(DataError, match=r"b\.tar is not among the files"):
        list(source_of(path).fetch([Location("b.tar", 0, 1)]))
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(DataError, match=r"a\.tar ends at byte 4000.*put the file back"):
        list(source_of(path).fetch([row.location for row in rows]))


def test_many_samples_are_streamed_in_bounded_memory(tmp_path: Path) -> None:
    """The list of members that tarfile keeps would be 4 MB here."""
    members = [(f"{number:05d}.{ending}", b"a") for number in range(2000) for ending in ("jpg", "txt")]
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    source = source_of(tmp_path / "a.tar")
    shard = source.shards()[0]
    tracemalloc.start()
    try:
        assert sum(1 for _ in source.read(shard)) == 2000
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
