"""Parquet files as a source: paths, shards, column types, bad rows and errors."""

import json
import pickle
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memory import with_tests_path

from hardmoe.data.config import DatasetConfig
from hardmoe.data.sources.base import BadExample, Location, RawExample
from hardmoe.data.sources.parquet import ParquetSource
from hardmoe.errors import DataError


def write(path, num_rows=4, row_group_size=None, **columns):
    columns = {
        "image": [f"{path.stem}-{row}".encode() for row in range(num_rows)],
        "hashtags": [[f"tag{row}"] for row in range(num_rows)],
    } | columns
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: column for name, column in columns.items() if column is not None})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def source_of(path, **config):
    return ParquetSource(DatasetConfig(path=[str(each) for each in path] if isinstance(path, list) else str(path), **config))


def read_all(source):
    return [row for shard in source.shards() for row in source.read(shard)]


def test_rows_pass_through_unchanged_and_in_order(tmp_path):
    path = write(tmp_path / "a.parquet", image=[b"\x00raw", b"", b"x", b"x"], hashtags=[["#A", None], [], None, ["b c"]])
    assert read_all(source_of(path)) == [
        RawExample(b"\x00raw", ("#A",), f"{path.name}#row=0", location=Location(path.name, 0, None)),
        RawExample(b"", (), f"{path.name}#row=1", location=Location(path.name, 1, None)),
        RawExample(b"x", (), f"{path.name}#row=2", location=Location(path.name, 2, None)),
        RawExample(b"x", ("b c",), f"{path.name}#row=3", location=Location(path.name, 3, None)),
    ]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"1", b"2"], pa.large_binary()),
        pa.array([{"bytes": b"1", "path": "1.jpg"}, {"bytes": b"2", "path": None}]),
    ],
)
def test_image_column_types(tmp_path, column):
    rows = read_all(source_of(write(tmp_path / "a.parquet", 2, image=column)))
    assert [row.image for row in rows] == [b"1", b"2"]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array(["#a #b,c", None]), [("#a", "#b", "c"), ()]),
        (pa.array(["#a #b", "c"], pa.large_string()), [("#a", "#b"), ("c",)]),
        (pa.array(["a", "b"]).dictionary_encode(), [("a",), ("b",)]),
        (pa.array([["a", "b"], ["c"]], pa.large_list(pa.large_string())), [("a", "b"), ("c",)]),
        (pa.array([["a", "b"], ["c", "d"]], pa.list_(pa.string(), 2)), [("a", "b"), ("c", "d")]),
        (pa.array([[], None]), [(), ()]),
        (pa.array([None, None]), [(), ()]),
    ],
)
def test_tags_column_types(tmp_path, column, expected):
    assert [row.tags for row in read_all(source_of(write(tmp_path / "a.parquet", 2, hashtags=column)))] == expected


@pytest.mark.parametrize(
    ("column", "expected"),
    [(["x", "y"], ["x", "y"]), ([7, 8], ["7", "8"]), ([b"\x01\xff", b""], ["01ff", ""])],
)
def test_id_column_types(tmp_path, column, expected):
    path = write(tmp_path / "a.parquet", 2, photo=column)
    assert [row.key for row in read_all(source_of(path, id_column="photo"))] == expected
    assert [row.key for row in read_all(source_of(path))] == [None, None]


def test_other_column_names_even_with_a_dot(tmp_path):
    path = write(tmp_path / "a.parquet", 2, image=None, hashtags=None, **{"photo.jpg": [b"1", b"2"], "photo": [["a"], ["b"]]})
    rows = read_all(source_of(path, image_column="photo.jpg", tags_column="photo"))
    assert [(row.image, row.tags) for row in rows] == [(b"1", ("a",)), (b"2", ("b",))]


def test_null_image_and_null_id_are_bad_examples(tmp_path):
    path = write(tmp_path / "a.parquet", image=[b"1", None, b"3", b"4"], photo=["a", "b", None, "d"])
    rows = read_all(source_of(path, id_column="photo"))
    assert rows[1] == BadExample(f"{path.name}#row=1", "null image")
    assert rows[2] == BadExample(f"{path.name}#row=2", "null in the id column 'photo'")
    assert [row.key for row in rows[::3]] == ["a", "d"]
    hugging_face = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path = write(tmp_path / "b.parquet", 2, image=pa.array([{"bytes": None, "path": "x.jpg"}, None], hugging_face))
    assert [row.reason for row in read_all(source_of(path))] == ["null image", "null image"]


def test_split_column_is_read_and_another_value_refused(tmp_path):
    path = write(tmp_path / "a.parquet", 3, split=["train", "test", "validation"])
    assert [row.split for row in read_all(source_of(path, split_column="split"))] == ["train", "test", "validation"]
    for value in ("valid", None):
        path = write(tmp_path / "b.parquet", 2, split=["train", value])
        shown = "null" if value is None else repr(value)
        with pytest.raises(DataError, match=rf"b\.parquet#row=1: split {shown} in column 'split' is none of train, val"):
            read_all(source_of(path, split_column="split"))


@pytest.mark.parametrize(("shard_rows", "num_shards"), [(1, 4), (3, 4), (6, 2), (7, 2), (9, 2), (100, 1)])
def test_shards_are_whole_row_groups_that_hold_every_row_once(tmp_path, shard_rows, num_shards):
    path = write(tmp_path / "a.parquet", 10, row_group_size=3)
    source = source_of(path, shard_rows=shard_rows)
    shards = source.shards()
    assert [shard.name for shard in shards] == [f"{number:05d}-of-{num_shards:05d}" for number in range(num_shards)]
    assert [row.image for row in read_all(source)] == [f"a-{row}".encode() for row in range(10)]
    assert [row.source_uri for row in read_all(source)] == [f"{path.name}#row={row}" for row in range(10)]
    assert sum(shard.items["num_rows"] for shard in shards) == 10


def test_long_shard_keeps_row_numbers_across_batches(tmp_path):
    path = write(tmp_path / "a.parquet", 700, row_group_size=300)
    rows = read_all(source_of(path, shard_rows=600))
    assert [int(row.image.decode().split("-")[1]) for row in rows] == list(range(700))
    assert [row.source_uri for row in rows] == [f"{path.name}#row={row}" for row in range(700)]


def test_shard_is_json_and_is_read_by_another_source(tmp_path):
    path = write(tmp_path / "a.parquet", 5, row_group_size=2)
    shard = source_of(path, shard_rows=2).shards()[1]
    assert json.loads(json.dumps(shard.items)) == shard.items
    assert [row.image for row in source_of(path).read(pickle.loads(pickle.dumps(shard)))] == [b"a-2", b"a-3"]


def test_files_are_named_relative_to_their_common_folder_and_sorted(tmp_path):
    for name in ("2024/b.parquet", "2024/a.parquet", "2023/z.parquet"):
        write(tmp_path / name)
    (tmp_path / "2024" / ".c.parquet").write_bytes(b"half a download")
    source = source_of([tmp_path / "2024/*.parquet", tmp_path / "2023/z.parquet", tmp_path / "**/a.parquet"])
    assert [file.name for file in source.files()] == ["2023/z.parquet", "2024/a.parquet", "2024/b.parquet"]
    assert [file.size for file in source.files()] == [(tmp_path / file.name).stat().st_size for file in source.files()]
    assert read_all(source)[0].image == b"z-0"
    assert [file.name for file in source_of(tmp_path / "2024/a.parquet").files()] == ["a.parquet"]


def test_moved_data_keep_their_names_and_shards(tmp_path):
    for home in ("here", "there"):
        write(tmp_path / home / "a.parquet")
        write(tmp_path / home / "b.parquet")
    here, there = (source_of(tmp_path / home / "*.parquet") for home in ("here", "there"))
    assert [file.name for file in here.files()] == [file.name for file in there.files()]
    assert [row.image for row in read_all(here)] == [row.image for row in read_all(there)]


def test_relative_path_and_file_with_glob_characters(tmp_path, monkeypatch):
    write(tmp_path / "a[1].parquet")
    monkeypatch.chdir(tmp_path)
    assert read_all(source_of("a[1].parquet"))[0].source_uri == "a[1].parquet#row=0"
    assert len(read_all(source_of("*.parquet"))) == 4


def test_wrong_column_names_file_columns_and_the_nearest(tmp_path):
    path = write(tmp_path / "a.parquet", hashtag=[["a"]] * 4, hashtags=None)
    expected = r"a\.parquet has no column 'hashtags', only image, hashtag; set dataset\.tags_column, perhaps to 'hashtag'"
    with pytest.raises(DataError, match=expected):
        source_of(path).shards()


def test_one_file_of_many_with_other_columns_is_found_before_any_row_is_read(tmp_path):
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", image=None, photo=[b"1"] * 4)
    with pytest.raises(DataError, match=r"b\.parquet has no column 'image'"):
        source_of(tmp_path / "*.parquet").shards()


@pytest.mark.parametrize(
    ("columns", "config", "message"),
    [
        ({"image": [7] * 4}, {}, "'image' is int64, not images.*dataset.image_column"),
        ({"image": [{"path": "a.jpg"}] * 4}, {}, "'image' is struct.*not images"),
        ({"hashtags": [1, 2, 3, 4]}, {}, "'hashtags' is int64, not hashtags.*dataset.tags_column"),
        ({"hashtags": [[1]] * 4}, {}, "'hashtags' is list.*not hashtags"),
        ({"photo": [0.5] * 4}, {"id_column": "photo"}, "'photo' is double, not names.*dataset.id_column"),
        ({"split": [0, 1, 2, 0]}, {"split_column": "split"}, "'split' is int64, not strings.*dataset.split_column"),
    ],
)
def test_column_of_another_type_is_refused(tmp_path, columns, config, message):
    with pytest.raises(DataError, match=message):
        source_of(write(tmp_path / "a.parquet", **columns), **config).shards()


def test_path_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none-\*\.parquet' matches no file"):
        source_of(tmp_path / "none-*.parquet").files()
    with pytest.raises(DataError, match=r"needs dataset\.path"):
        ParquetSource(DatasetConfig()).files()
    with pytest.raises(DataError, match=r"needs dataset\.path"):
        ParquetSource(DatasetConfig(path=[])).files()
    with pytest.raises(DataError, match=r"is a folder; give a pattern such as .*/\*\.parquet"):
        source_of(tmp_path).files()
    with pytest.raises(DataError, match=r"'gopher://here/\*\.parquet' cannot be opened: .*gopher"):
        source_of("gopher://here/*.parquet").files()


def test_file_that_is_not_parquet_is_named(tmp_path):
    (tmp_path / "notes.parquet").write_text("hello, this is not the format you are looking for")
    (tmp_path / "empty.parquet").write_bytes(b"")
    for name in ("notes", "empty"):
        with pytest.raises(DataError, match=rf"{name}\.parquet is not a Parquet file"):
            source_of(tmp_path / f"{name}.parquet").shards()


def test_file_damaged_after_its_footer_was_read_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", 2000, image=[bytes(100)] * 2000)
    source = source_of(path)
    shards = source.shards()
    data = bytearray(path.read_bytes())
    data[4:200] = b"\xff" * 196
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet is damaged at row 0"):
        list(source.read(shards[0]))


def test_files_without_rows_are_refused_together_and_skipped_beside_others(tmp_path):
    schema = {"image": pa.array([], pa.binary()), "hashtags": pa.array([], pa.list_(pa.string()))}
    write(tmp_path / "a.parquet", 0, **schema)
    with pytest.raises(DataError, match="have no rows"):
        source_of(tmp_path / "*.parquet").shards()
    write(tmp_path / "b.parquet")
    assert len(read_all(source_of(tmp_path / "*.parquet"))) == 4


def test_licence_column_is_kept(tmp_path):
    path = write(tmp_path / "a.parquet", 3, rights=["CC0", None, "CC-BY"])
    assert [row.license for row in read_all(source_of(path, license_column="rights"))] == ["CC0", None, "CC-BY"]
    path = write(tmp_path / "b.parquet", 2, rights=[4, 7])
    assert [row.license for row in read_all(source_of(path, license_column="rights"))] == ["4", "7"]
    path = write(tmp_path / "c.parquet", 2, rights=[0.5, 1.5])
    with pytest.raises(DataError, match=r"'rights' is double, not licences.*dataset\.license_column"):
        source_of(path, license_column="rights").shards()


def images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def test_paths_are_followed_below_the_folder_of_their_table(tmp_path):
    images(tmp_path / "p", "1.jpg", "x/2.jpg", "sub/3.jpg")
    write(tmp_path / "p" / "a.parquet", 3, image=["1.jpg", "./x/2.jpg", None])
    write(tmp_path / "p" / "sub" / "b.parquet", 2, image=["3.jpg", "../1.jpg"])
    source = source_of([tmp_path / "p" / "a.parquet", tmp_path / "p" / "sub" / "b.parquet"])
    rows = read_all(source)
    assert rows == [
        RawExample(b"1.jpg", ("tag0",), "a.parquet#row=0", location=Location("1.jpg", 0, 5)),
        RawExample(b"x/2.jpg", ("tag1",), "a.parquet#row=1", location=Location("./x/2.jpg", 0, 7)),
        BadExample("a.parquet#row=2", "null image"),
        RawExample(b"sub/3.jpg", ("tag0",), "sub/b.parquet#row=0", location=Location("sub/3.jpg", 0, 9)),
        RawExample(b"1.jpg", ("tag1",), "sub/b.parquet#row=1", location=Location("sub/../1.jpg", 0, 5)),
    ]
    good = [row for row in rows if isinstance(row, RawExample)]
    assert list(source.fetch([row.location for row in good[::-1]])) == [row.image for row in good[::-1]]


def test_paths_are_followed_below_image_root_where_it_is_given(tmp_path):
    root = images(tmp_path / "images", "1.jpg")
    path = write(
        tmp_path / "tables" / "a.parquet",
        5,
        image=["1.jpg", f"{root}/1.jpg", f"file://{root}/1.jpg", "../tables/a.parquet", "2.jpg"],
    )
    source = source_of(path, image_root=str(root))
    rows = read_all(source)
    assert [row.image for row in rows[:3]] == [b"1.jpg"] * 3
    assert [row.reason for row in rows[3:]] == ["outside dataset.image_root", "no such file"]
    assert [row.location.file for row in rows[:3]] == ["1.jpg", f"{root}/1.jpg", f"file://{root}/1.jpg"]
    assert list(source.fetch([row.location for row in rows[:3]])) == [b"1.jpg"] * 3


def test_missing_image_root_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", 1, image=["1.jpg"])
    with pytest.raises(DataError, match=r"dataset\.image_root '.*nowhere' is not a folder"):
        read_all(source_of(path, image_root=f"{tmp_path}/nowhere"))


def test_dictionary_of_paths_is_followed(tmp_path):
    images(tmp_path, "1.jpg")
    path = write(tmp_path / "a.parquet", 2, image=pa.array(["1.jpg", "1.jpg"]).dictionary_encode())
    assert [row.image for row in read_all(source_of(path))] == [b"1.jpg", b"1.jpg"]


@pytest.mark.parametrize(
    "column", [[f"image {row}".encode() for row in range(700)], [{"bytes": f"image {row}".encode()} for row in range(700)]]
)
def test_fetch_serves_rows_in_any_order_with_repetitions(tmp_path, column):
    write(tmp_path / "a.parquet", 700, row_group_size=300, image=column)
    write(tmp_path / "b.parquet", 3)
    source = source_of(tmp_path / "*.parquet")
    rows = read_all(source)
    order = [*range(703), 702, 0, 0, 299, 300, 299]
    assert list(source.fetch([rows[row].location for row in order])) == [rows[row].image for row in order]
    random.Random(1).shuffle(order)
    order = order[:40]
    assert list(source.fetch([rows[row].location for row in order])) == [rows[row].image for row in order]
    assert list(source.fetch([])) == []


def test_sorted_locations_read_each_row_group_once_and_only_its_images(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", 40, row_group_size=10)
    source = source_of(path)
    asked = []
    iter_batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda self, *a, **k: asked.append(k) or iter_batches(self, *a, **k))
    list(source.fetch([Location("a.parquet", row, None) for row in (0, 1, 9, 10, 35, 39)]))
    assert asked == [{"row_groups": [group], "columns": ["image"], "use_threads": False} for group in (0, 1, 3)]


def test_fetch_from_a_table_that_changed_names_it(tmp_path):
    path = write(tmp_path / "a.parquet", 3, image=[b"1", None, b"3"])
    source = source_of(path)
    for location, message in [
        (Location("a.parquet", 3, None), r"a\.parquet has no row 3 any more"),
        (Location("a.parquet", 1, None), r"a\.parquet has no image in row 1 any more"),
        (Location("b.parquet", 0, None), r"b\.parquet is not among the files"),
        (Location("1.jpg", 0, 5), r"1\.jpg cannot be read again \(no such file\)"),
    ]:
        with pytest.raises(DataError, match=message):
            list(source.fetch([location]))


def test_table_that_vanished_after_its_shards_were_listed_is_named(tmp_path):
    path = write(tmp_path / "a.parquet")
    source = source_of(path)
    shards = source.shards()
    path.unlink()
    with pytest.raises(DataError, match=r"a\.parquet: there is no such file; put the file back"):
        list(source.read(shards[0]))


_WRITE = """
import random, sys
import pyarrow as pa
import pyarrow.parquet as pq
schema = pa.schema([("image", pa.binary()), ("hashtags", pa.list_(pa.string()))])
with pq.ParquetWriter(sys.argv[1], schema, compression="none", use_dictionary=False, write_batch_size=4) as writer:
    image = random.Random(0).randbytes(1_000_000)
    writer.write_table(pa.table({"image": [image] * 200, "hashtags": [["a"]] * 200}, schema=schema), row_group_size=200)
"""
_PEAK = """
import sys
from memory import peak_bytes
from hardmoe.data.config import DatasetConfig
from hardmoe.data.sources.parquet import ParquetSource
source = ParquetSource(DatasetConfig(path=sys.argv[1]))
shards = source.shards()
before = peak_bytes()
if sys.argv[2] == "fetch":
    from hardmoe.data.sources.base import Location
    rows = sum(1 for image in source.fetch([Location("a.parquet", row, None) for row in range(200)]))
else:
    rows = sum(1 for shard in shards for row in source.read(shard))
print(rows, (peak_bytes() - before) // 2**20)
"""


@pytest.fixture(scope="module")
def large_row_group(tmp_path_factory):
    """200 MB in one row group, written by a process of its own: pyarrow keeps what it once took from the system."""
    path = tmp_path_factory.mktemp("large") / "a.parquet"
    subprocess.run([sys.executable, "-c", _WRITE, str(path)], check=True, timeout=120)
    return path


@pytest.mark.parametrize("how", ["read", "fetch"])
def test_large_row_group_passes_through_in_bounded_memory(large_row_group, how):
    """Its rows at once, as Python has them, would be twice its 200 MB."""
    command = [sys.executable, "-c", _PEAK, str(large_row_group), how]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=with_tests_path())
    rows, mebibytes = map(int, result.stdout.split())
    assert rows == 200
    assert mebibytes < 190
