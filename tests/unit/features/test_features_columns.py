"""Ids and vectors of features computed elsewhere: every form that people write them in, and every refusal."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from hardmoe.errors import DataError
from hardmoe.features.columns import check_columns, read_ids, read_vectors

IDS = np.random.default_rng(0).integers(0, 256, (3, 16), dtype=np.uint8)
BYTES = [row.tobytes() for row in IDS]
HEX = [value.hex() for value in BYTES]
VECTORS = np.array([[0.5, -1.25], [3.0, 0.0], [2.0, 65504.0]])


@pytest.mark.parametrize(
    "column",
    [
        pa.array(BYTES, pa.binary(16)),
        pa.array(BYTES, pa.binary()),
        pa.array(BYTES, pa.large_binary()),
        pa.array(HEX),
        pa.array([text.upper() for text in HEX], pa.large_string()),
        pa.array(HEX).dictionary_encode(),
        pa.array([b"x" * 16, *BYTES], pa.binary(16)).slice(1),
    ],
    ids=lambda column: str(column.type),
)
def test_ids_are_read_from_bytes_and_from_digits(column: pa.Array) -> None:
    check_columns(pa.schema([("example_id", column.type), ("feature", pa.list_(pa.float32()))]), "f", named_by_key=False)
    assert np.array_equal(read_ids(column, "f", named_by_key=False), IDS)


@pytest.mark.parametrize(
    ("column", "keys"),
    [
        (pa.array(["a", "é"]), ["a", "é"]),
        (pa.array([7, -3], pa.int32()), ["7", "-3"]),
        (pa.array([b"\x01\xff"], pa.binary()), ["01ff"]),
        (pa.array(HEX[:1]), HEX[:1]),
    ],
)
def test_keys_become_ids_by_the_rule_of_the_dataset(column: pa.Array, keys: list[str]) -> None:
    check_columns(pa.schema([("example_id", column.type), ("feature", pa.list_(pa.float32()))]), "f", named_by_key=True)
    expected = [hashlib.sha256(f"key:{key}".encode()).digest()[:16] for key in keys]
    assert [row.tobytes() for row in read_ids(column, "f", named_by_key=True)] == expected


def test_sixteen_bytes_of_fixed_size_are_an_id_even_where_there_are_keys() -> None:
    assert np.array_equal(read_ids(pa.array(BYTES, pa.binary(16)), "f", named_by_key=True), IDS)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([HEX[0], None]), "f: 1 rows have no 'example_id'"),
        (pa.array(["cat.jpg"]), "'cat.jpg' in column 'example_id' is no example id; .* set dataset.id_column"),
        (pa.array([HEX[0][:-2]]), "is no example id"),
        (pa.array([b"short"], pa.binary()), "'73686f7274' in column"),
    ],
)
def test_values_that_are_no_ids_are_refused(column: pa.Array, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_ids(column, "f", named_by_key=False)


@pytest.mark.parametrize("item", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda item: pa.list_(item, 2)], ids=["list", "large", "fixed"])
def test_vectors_are_read_from_lists_of_any_float(kind, item: pa.DataType) -> None:  # type: ignore[no-untyped-def]
    rows = [[9.0, 9.0], *VECTORS.tolist()]
    values = pa.array(np.concatenate(rows).astype(item.to_pandas_dtype()))
    wanted = kind(item)
    if pa.types.is_fixed_size_list(wanted):
        column = pa.FixedSizeListArray.from_arrays(values, 2)
    else:
        array = pa.ListArray if pa.types.is_list(wanted) else pa.LargeListArray
        column = array.from_arrays(pa.array([0, 2, 4, 6, 8], pa.int32() if array is pa.ListArray else pa.int64()), values)
    check_columns(pa.schema([("example_id", pa.string()), ("feature", column.type)]), "f", named_by_key=False)
    found = read_vectors(column.slice(1), "f")
    assert found.dtype == np.float16
    assert np.array_equal(found, VECTORS.astype(np.float16))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0], None], "f: 1 rows have no 'feature'"),
        ([[1.0, 2.0], [1.0]], "f: features of 1 and of 2 numbers"),
        ([[1.0, None]], "f: 1 numbers of the features are null"),
        ([[], []], "f: the features are empty lists"),
        ([[1.0], [float("nan")]], "f: 1 features are not finite in float16"),
        ([[float("inf")], [1.0]], "f: 1 features are not finite"),
        ([[65520.0], [1.0]], "f: 1 features are not finite .* or scale them"),
    ],
)
def test_vectors_that_cannot_be_used_are_refused(rows: list[list[float] | None], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_vectors(pa.array(rows, pa.list_(pa.float64())), "f")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([("id", pa.string()), ("feature", pa.list_(pa.float32()))], "f must have one column 'example_id'; it has id, feature"),
        ([("example_id", pa.string()), ("x", pa.float32())], "f must have one column 'feature'; it has example_id, x"),
        ([("example_id", pa.int64()), ("feature", pa.list_(pa.float32()))], "is int64, but this dataset's examples are named by"),
        ([("example_id", pa.float64()), ("feature", pa.list_(pa.float32()))], "column 'example_id' is double"),
        ([("example_id", pa.string()), ("feature", pa.list_(pa.int8()))], "column 'feature' is list<.*int8>; give lists"),
        ([("example_id", pa.string()), ("feature", pa.float32())], "column 'feature' is float; give lists"),
    ],
)
def test_columns_of_other_names_or_types_are_refused(fields: list[tuple[str, pa.DataType]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_columns(pa.schema(fields), "f", named_by_key=False)
