"""YFCC100M's layout, with everything that is known to be wrong with it."""

import bz2
from pathlib import Path

import pytest
from s3 import Store
from yfcc_layout import LICENSES, ODD_TAGS, Layout, Line, packed, with_hash, write_yfcc

from hardmoe.data.config import DatasetConfig
from hardmoe.data.sources.base import BadExample, Location, RawExample, ReferableSource
from hardmoe.data.sources.yfcc100m import Yfcc100mSource, file_of
from hardmoe.errors import DataError
from hardmoe.storage import open_storage


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    directory = tmp_path_factory.mktemp("yfcc")
    return write_yfcc(directory / "metadata", directory / "images")


def source_of(metadata: Path, images: Path, **changes: object) -> Yfcc100mSource:
    settings = {"source": "yfcc100m", "path": f"{metadata}/yfcc100m_dataset-*", "image_root": str(images), "shard_rows": 3}
    return Yfcc100mSource(DatasetConfig.model_validate(settings | changes))


def rows_of(source: Yfcc100mSource) -> list[RawExample | BadExample]:
    return [row for shard in source.shards() for row in source.read(shard)]


def only_line(directory: Path, line: bytes) -> list[RawExample | BadExample]:
    """What the source makes of one line, with no images there."""
    (directory / "images").mkdir()
    (directory / "yfcc100m_dataset-0").write_bytes(line)
    return rows_of(source_of(directory, directory / "images", shard_rows=1_000_000))


@pytest.mark.parametrize(
    ("address", "file"),
    [
        # The collection's own first line, as its tutorials print it, with the hash that they print beside it.
        (
            "http://farm8.staticflickr.com/7205/6985418911_df7747990d.jpg",
            "4e2/f7a/4e2f7a26a1dfbf165a7e30bdabf7e72a.jpg",
        ),
        # MD5 59a1deada4e63d3eb97ad70b0759f700: the bytes 0b, 07 and 00 lose their first digit.
        ("https://farm8.staticflickr.com/7205/6985418911_df7747990d.jpg", "59a/1de/59a1deada4e63d3eb97ad7b759f70.jpg"),
    ],
)
def test_file_of_a_photo_is_named_by_the_hash_of_its_address(address: str, file: str) -> None:
    assert file_of(address) == file


def test_every_photo_is_read_once_with_its_tags_and_licence(layout: Layout) -> None:
    rows = rows_of(source_of(layout.metadata, layout.images))
    found = {row.source_uri.removeprefix("yfcc100m:"): row for row in rows if isinstance(row, RawExample)}
    assert len(rows) == len(layout.good) + len(layout.bad)
    assert found.keys() == layout.good.keys()
    for identifier, line in layout.good.items():
        row = found[identifier]
        assert row.tags == line.tags
        assert row.license == line.license
        assert row.image == (layout.images / line.file).read_bytes()
        assert row.key is None
    assert {row.license for row in found.values()} == set(LICENSES)


def test_tags_are_decoded_after_they_are_divided(layout: Layout) -> None:
    """`rock%2Cpaper` is one tag with a comma in it, and `c%2B%2B` has no spaces."""
    first = rows_of(source_of(layout.metadata, layout.images))[0]
    assert isinstance(first, RawExample)
    assert first.tags[-len(ODD_TAGS) :] == ODD_TAGS


def test_rows_that_are_no_photos_are_bad_with_a_reason(layout: Layout) -> None:
    rows = rows_of(source_of(layout.metadata, layout.images))
    assert {row.source_uri: row.reason for row in rows if isinstance(row, BadExample)} == layout.bad


@pytest.mark.parametrize("shard_rows", [1, 2, 5, 1000])
def test_plain_piece_is_divided_without_losing_or_repeating_a_line(layout: Layout, shard_rows: int) -> None:
    whole = rows_of(source_of(layout.metadata, layout.images, shard_rows=100_000))
    source = source_of(layout.metadata, layout.images, shard_rows=shard_rows)
    assert rows_of(source) == whole
    assert len(source.shards()) == (3 if shard_rows == 1000 else len({shard.name for shard in source.shards()}))
    assert (len(source.shards()) > 3) == (shard_rows < 1000)


def test_every_cut_of_a_piece_keeps_every_line(tmp_path: Path) -> None:
    """Cuts at, before and after every line's end, and some within the lines."""
    lines = [Line(str(number), ("a",), "x").fields() for number in range(1, 5)]
    (tmp_path / "images").mkdir()
    (tmp_path / "yfcc100m_dataset-0").write_bytes(packed(lines))
    source = source_of(tmp_path, tmp_path / "images")
    shard = source.shards()[0]
    ends = [len(packed(lines[:count])) for count in range(1, 5)]
    whole = [f"yfcc100m:{number}" for number in range(1, 5)]
    for cut in sorted({end + step for end in ends for step in (-100, -2, -1, 0, 1, 2)} | {1}):
        halves = [{"from": 0, "to": cut}, {"from": cut, "to": None}]
        parts = [type(shard)("x", {**shard.items, **half}) for half in halves]
        assert [row.source_uri for part in parts for row in source.read(part)] == whole, cut


def test_compressed_piece_is_one_shard(layout: Layout) -> None:
    shards = source_of(layout.metadata, layout.images, shard_rows=1).shards()
    names = [shard.items["name"] for shard in shards]
    assert names.count("yfcc100m_dataset-1.bz2") == names.count("yfcc100m_dataset-2.gz") == 1
    assert names.count("yfcc100m_dataset-0") > 1


def test_files_are_the_metadata_and_not_the_photos(layout: Layout) -> None:
    names = [file.name for file in source_of(layout.metadata, layout.images).files()]
    assert names == ["yfcc100m_dataset-0", "yfcc100m_dataset-1.bz2", "yfcc100m_dataset-2.gz"]


def test_photo_is_fetched_again_from_its_location(layout: Layout) -> None:
    source = source_of(layout.metadata, layout.images)
    assert isinstance(source, ReferableSource)
    rows = [row for row in rows_of(source) if isinstance(row, RawExample)]
    locations = [row.location for row in rows if row.location is not None]
    assert len(locations) == len(rows)
    assert all(not location.file.startswith("/") for location in locations)
    assert list(source.fetch(locations[::-1])) == [row.image for row in rows[::-1]]


def test_photo_that_is_gone_or_changed_is_not_fetched(tmp_path: Path) -> None:
    layout = write_yfcc(tmp_path / "metadata", tmp_path / "images", num_images=3)
    source = source_of(layout.metadata, layout.images)
    file = next(iter(layout.good.values())).file
    size = (layout.images / file).stat().st_size
    with pytest.raises(DataError, match="was replaced"):
        list(source.fetch([Location(file, 0, size + 1)]))
    (layout.images / file).unlink()
    with pytest.raises(DataError, match="no such file"):
        list(source.fetch([Location(file, 0, size)]))


def test_bucket_is_read_like_a_disk(tmp_path: Path, s3_store: Store) -> None:
    layout = write_yfcc(tmp_path / "metadata", tmp_path / "images", num_images=9)
    bucket = open_storage(s3_store.root("commons"))
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        bucket.write_bytes(path.relative_to(tmp_path).as_posix(), path.read_bytes())
    source = source_of(layout.metadata, layout.images, path=bucket.child_uri("metadata/*"), image_root=bucket.child_uri("images"))
    there = rows_of(source)
    assert there == rows_of(source_of(layout.metadata, layout.images))
    locations = [row.location for row in there if isinstance(row, RawExample) and row.location is not None]
    assert list(source.fetch(locations)) == [row.image for row in there if isinstance(row, RawExample)]


def test_id_column_names_examples_by_their_photo_id(layout: Layout) -> None:
    rows = rows_of(source_of(layout.metadata, layout.images, id_column="photoid"))
    assert {row.key for row in rows if isinstance(row, RawExample)} == layout.good.keys()
    with pytest.raises(DataError, match="'photoid'"):
        source_of(layout.metadata, layout.images, id_column="name")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({0: "abc"}, "no photo id"),
        ({22: "7"}, "neither a photo nor a video"),
        ({22: "1"}, "a video"),
        ({6: "a\ttab"}, "neither 23 nor 25 fields (24)"),
    ],
)
def test_strange_line_is_bad_and_says_why(tmp_path: Path, change: dict[int, str], reason: str) -> None:
    fields = Line("1", ("a",), "x").fields()
    for index, value in change.items():
        fields[index] = value
    (row,) = only_line(tmp_path, packed([fields]))
    assert isinstance(row, BadExample)
    assert row.reason == reason


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "zz" * 16, "ab"])
def test_hash_that_is_none_never_becomes_a_path(tmp_path: Path, name: str) -> None:
    number, (identifier, _, *rest) = "0", with_hash(Line("1", ("a",), "x"))
    (row,) = only_line(tmp_path, packed([[number, identifier, name, *rest]]))
    assert isinstance(row, BadExample)
    assert row.reason == "the hash is not hexadecimal"


def test_line_without_end_costs_one_row(tmp_path: Path) -> None:
    good = packed([Line("1", ("a",), "x").fields()])
    rows = only_line(tmp_path, b"x" * (5 << 20) + b"\n" + good)
    assert [getattr(row, "reason", None) for row in rows] == ["a line longer than 1 MiB", "no such file"]


def test_bytes_that_are_no_text_do_not_stop_the_others(tmp_path: Path) -> None:
    line = packed([Line("1", ("a",), "x").fields()]).replace(b"somebody", b"\xff\xfe\x00")
    (row,) = only_line(tmp_path, line)
    assert row.source_uri == "yfcc100m:1"


def test_damaged_archive_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    line = packed([Line(str(number), ("a",), "x").fields() for number in range(100)])
    (tmp_path / "yfcc100m_dataset-0.bz2").write_bytes(bz2.compress(line)[:-20])
    with pytest.raises(DataError, match=r"yfcc100m_dataset-0\.bz2 is damaged"):
        rows_of(source_of(tmp_path, tmp_path / "images"))


def test_missing_image_root_is_refused(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs dataset\.image_root"):
        source_of(layout.metadata, layout.images, image_root=None)
    with pytest.raises(DataError, match="is not a folder"):
        rows_of(source_of(layout.metadata, tmp_path / "nowhere"))
