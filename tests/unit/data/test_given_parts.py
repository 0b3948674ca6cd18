"""Parts from a column: what each value means, in every container, and which columns are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from hardmoe.data.config import DatasetConfig
from hardmoe.data.given_parts import MOST_PARTS, check_parts, collect_parts, distinct_values, numbers_by_value
from hardmoe.data.ingest_shard import _checked
from hardmoe.data.sources.base import BadExample, RawExample
from hardmoe.data.sources.fields import make_example
from hardmoe.data.sources.registry import open_source
from hardmoe.errors import DataError


def example_of(value: Any) -> RawExample | BadExample:
    config = DatasetConfig(part_column="cluster")
    return make_example(config, b"x", {"hashtags": ["a"], "cluster": value}, "a.parquet#row=1")


@pytest.mark.parametrize(
    ("value", "part"),
    [
        *[(0, "0"), (7, "7"), ("7", "7"), ("07", "7"), ("00", "0"), (" 7 ", "7"), (10**30, str(10**30))],
        *[("north", "north"), (" a b ", "a b"), ("c7", "c7"), ("1.5", "1.5"), ("-", "-"), ("-x", "-x"), ("٣", "٣")],
    ],
)
def test_value_is_a_name_or_the_digits_of_a_whole_number(value: Any, part: str) -> None:
    found = example_of(value)
    assert isinstance(found, RawExample) and found.part == part


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "no part in the column 'cluster'"),
        ("", "no part in the column 'cluster'"),
        ("  ", "no part in the column 'cluster'"),
    ]
    + [(value, "the part in 'cluster' is a negative number") for value in (-1, "-1", "-07")]
    + [(value, "the part in 'cluster' is neither a whole number nor a string") for value in (1.0, True, [1], {"a": 1})]
    + [("\ud800", "the text is not valid Unicode")],
)
def test_value_that_can_be_no_part_is_a_reason_to_quarantine_its_row(value: Any, reason: str) -> None:
    assert example_of(value) == BadExample("a.parquet#row=1", reason)


def test_row_of_a_source_that_knows_of_no_parts_is_quarantined_and_not_put_anywhere() -> None:
    """A plug-in may ignore the key, as it ignores others that it has no use for."""

    def undecoded(data: bytes) -> NDArray[np.uint8]:
        raise AssertionError("there was no need to decode it")

    config = DatasetConfig(source="somebody-elses", part_column="cluster")
    found = _checked(RawExample(b"x", ("a",), "row 1"), config, undecoded, None, {"near": False, "index": 0})
    assert found == BadExample("row 1", "the source 'somebody-elses' gives no part")


def test_column_that_is_not_asked_for_is_not_looked_at() -> None:
    found = make_example(DatasetConfig(), b"x", {"hashtags": [], "cluster": -1}, "u")
    assert isinstance(found, RawExample) and found.part is None


def test_numbers_are_the_parts_and_names_are_numbered_in_sorted_order() -> None:
    numbers = collect_parts("p", [["10", "2"], [], ["0", "2"]])
    assert numbers == {"column": "p", "kind": "numbers", "values": ["0", "2", "10"]}
    assert numbers_by_value(numbers) == {"0": 0, "2": 2, "10": 10}
    names = collect_parts("p", [["south", "north"], ["Ærø", "c10", "c2"]])
    assert names == {"column": "p", "kind": "names", "values": sorted(["south", "north", "Ærø", "c10", "c2"])}
    assert numbers_by_value(names) == {value: number for number, value in enumerate(names["values"])}


def test_numbering_does_not_depend_on_which_rows_came_first() -> None:
    values = [f"part {number}" for number in np.random.default_rng(0).permutation(50).tolist()]
    assert collect_parts("p", [values]) == collect_parts("p", [[value] for value in reversed(values)])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (["3", "n/a", "b", "1"], "'p' holds numbers, such as 1, and names, such as 'b'; give either numbers or names"),
        (["0", "12345678901"], "'p' holds 12345678901; number the parts from 0"),
        (
            [f"c{number}" for number in range(MOST_PARTS + 1)],
            f"'p' has more than {MOST_PARTS} different values; name a column of parts",
        ),
    ],
)
def test_column_that_gives_no_parts_is_refused(values: list[str], sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        collect_parts("p", [values])
    assert str(caught.value) == f"dataset.part_column {sentence}"


def test_distinct_values_of_a_column_of_file_names_stay_few() -> None:
    values = distinct_values(f"photo-{number}" for number in range(3 * MOST_PARTS))
    assert len(values) == MOST_PARTS + 1
    with pytest.raises(DataError, match="more than 10000 different values"):
        collect_parts("p", [values])
    assert distinct_values(["b", "a", "b"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("values", "experts", "sentence"),
    [
        (["a", "b", "c", "d"], 2, "'p' has 4 different names ('a', 'b', 'c', …), but partition.experts is 2; set"),
        (
            ["a"],
            2,
            "'p' has 1 name ('a'), but partition.experts is 2; set partition.experts: 1, or correct the column",
        ),
        (["0", "1", "4"], 4, "'p' has a part 4, but partition.experts is 4, so the last one is 3; set partition.experts: 5, or"),
        (["0", "2"], 3, "'p' has no example in part 1, but partition.experts is 3; number the parts from 0 without a gap"),
        (["1", "2"], 3, "'p' has no example in part 0, but partition.experts is 3"),
        (["0", "1"], 3, "'p' has no example in part 2, but partition.experts is 3"),
    ],
)
def test_parts_that_are_not_the_experts_are_refused(values: list[str], experts: int, sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        check_parts(collect_parts("p", [values]), experts)
    assert sentence in str(caught.value)


def test_parts_that_are_the_experts_are_accepted() -> None:
    check_parts(collect_parts("p", [["1", "0", "2"]]), 3)
    check_parts(collect_parts("p", [["b", "a"]]), 2)


VALUES = ["0", "11", None, "2"]
INTEGERS = pa.array([0, 11, None, 2], pa.int16())


def write_tables(folder: Path) -> dict[str, dict[str, Any]]:
    """The same four rows with integers, texts and categories in Parquet, and as CSV and JSONL beside images."""
    images, tags = [f"{row}.jpg".encode() for row in range(4)], [["a"]] * 4
    columns = {"integers": INTEGERS, "texts": pa.array(VALUES), "categories": pa.array(VALUES).dictionary_encode()}
    found: dict[str, dict[str, Any]] = {}
    for name, column in columns.items():
        pq.write_table(pa.table({"image": images, "hashtags": tags, "cluster": column}), folder / f"{name}.parquet")
        found[name] = {"source": "parquet", "path": str(folder / f"{name}.parquet")}
    (folder / "images").mkdir()
    for image in images:
        (folder / "images" / image.decode()).write_bytes(image)
    rows = [{"image": image.decode(), "hashtags": "a", "cluster": part} for image, part in zip(images, VALUES, strict=True)]
    (folder / "t.csv").write_text("image,hashtags,cluster\n" + "".join(f"{r['image']},a,{r['cluster'] or ''}\n" for r in rows))
    numbers = [row | {"cluster": None if row["cluster"] is None else int(row["cluster"])} for row in rows]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbers))
    for name in ("t.csv", "t.jsonl"):
        found[name] = {"source": "folder", "path": str(folder / "images"), "tags_path": str(folder / name)}
    return found


@pytest.mark.parametrize("kind", ["integers", "texts", "categories", "t.csv", "t.jsonl"])
def test_tables_of_numbers_and_of_text_give_the_same_parts(tmp_path: Path, kind: str) -> None:
    source = open_source(DatasetConfig(part_column="cluster", **write_tables(tmp_path)[kind]))
    rows = [row for shard in source.shards() for row in source.read(shard)]
    parts = [row.part if isinstance(row, RawExample) else row.reason for row in rows]
    assert parts == ["0", "11", "no part in the column 'cluster'", "2"]


def test_image_that_no_row_of_the_table_names_has_no_part_and_is_quarantined(tmp_path: Path) -> None:
    section = write_tables(tmp_path)["t.csv"]
    (tmp_path / "images" / "unnamed.jpg").write_bytes(b"u")
    source = open_source(DatasetConfig(part_column="cluster", **section))
    rows = [row for shard in source.shards() for row in source.read(shard)]
    assert rows[-1] == BadExample("unnamed.jpg", "no part in the column 'cluster'")
    assert len(rows) == 5


def test_column_of_fractions_is_refused_before_any_work(tmp_path: Path) -> None:
    """pandas makes such a column of integers with a gap."""
    table = pa.table({"image": [b"x"], "hashtags": [["a"]], "cluster": [1.0]})
    pq.write_table(table, tmp_path / "0.parquet")
    source = open_source(DatasetConfig(path=str(tmp_path / "0.parquet"), part_column="cluster"))
    with pytest.raises(
        DataError, match=r"column 'cluster' is double, not parts: whole numbers from 0, or strings; set dataset.pa"
    ):
        source.shards()


def test_missing_column_is_refused_with_the_nearest_that_is_there(tmp_path: Path) -> None:
    for kind, section in write_tables(tmp_path).items():
        source = open_source(DatasetConfig(part_column="clusters", **section))
        with pytest.raises(DataError, match=r"has no column 'clusters', only .*set dataset\.part_column, perhaps to 'cluster'"):
            source.shards()
        assert kind
