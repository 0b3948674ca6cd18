"""Tables: what is written comes back, and whatever is damaged or of another kind is one error that names the file."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardmoe.errors import CorruptFileError, SchemaError
from hardmoe.storage import LocalStorage
from hardmoe.tables import (
    ID_TYPE,
    build_table,
    ids_from_array,
    ids_to_array,
    iterate_table,
    lists_to_csr,
    read_table,
    vector_type,
    vectors_from_array,
    vectors_to_array,
    write_table,
)

SCHEMA = pa.schema([("example_id", ID_TYPE), ("tags", pa.list_(pa.int32())), ("feature", vector_type(3))])
OPEN = pa.schema([("example_id", ID_TYPE), ("feature", vector_type(-1))])
ROWS = 2500


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


def example_table(rows: int = ROWS, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    columns = {
        "feature": vectors_from_array(rng.normal(size=(rows, 3)).astype(np.float16)),
        "example_id": ids_from_array(rng.integers(0, 256, (rows, 16), dtype=np.uint8)),
        "tags": [list(range(i % 4)) for i in range(rows)],
    }
    return build_table(SCHEMA, columns)


def test_table_reads_back_whole_in_pieces_and_by_columns(storage: LocalStorage) -> None:
    table = example_table()
    written = write_table(storage.open_output("t.parquet"), table)
    assert written.size == storage.size("t.parquet")
    assert read_table(storage, "t.parquet", SCHEMA).equals(table)
    pieces = list(iterate_table(storage, "t.parquet", SCHEMA, rows=700))
    assert max(piece.num_rows for piece in pieces) <= 700
    assert pa.concat_tables(pieces).equals(table)
    assert read_table(storage, "t.parquet", SCHEMA, ["tags"]).equals(table.select(["tags"]))
    assert read_table(storage, "t.parquet", OPEN).column_names == ["example_id", "feature"]


def test_same_table_gives_the_same_bytes_however_it_is_chunked(storage: LocalStorage) -> None:
    table = example_table()
    write_table(storage.open_output("a"), table)
    write_table(storage.open_output("b"), pa.concat_tables([table.slice(0, 999), table.slice(999)]))
    assert storage.read_bytes("a") == storage.read_bytes("b")


@pytest.mark.parametrize(("image_bytes", "group_rows"), [(1, 1024), (43_000, 64), (2**22, 16)])
def test_images_are_stored_as_they_are_in_row_groups_of_a_few_megabytes(
    storage: LocalStorage, image_bytes: int, group_rows: int
) -> None:
    count = min(2000, 2**24 // image_bytes + 100)
    table = pa.table({"image": pa.array([bytes(image_bytes)] * count, pa.binary()), "tags": [["a"]] * count})
    write_table(storage.open_output("t"), table)
    metadata = pq.read_metadata(Path(storage.uri) / "t")
    assert metadata.row_group(0).num_rows == group_rows
    columns = {c.path_in_schema: c.compression for c in (metadata.row_group(0).column(i) for i in range(2))}
    assert columns == {"image": "UNCOMPRESSED", "tags.list.element": "ZSTD"}
    assert read_table(storage, "t", table.schema).equals(table)


def test_empty_table_reads_back_with_its_columns(storage: LocalStorage) -> None:
    write_table(storage.open_output("t"), example_table(0))
    table = read_table(storage, "t", SCHEMA)
    assert table.num_rows == 0
    assert ids_to_array(table.column("example_id")).shape == (0, 16)
    assert vectors_to_array(table.column("feature")).shape == (0, 3)
    values, offsets = lists_to_csr(table.column("tags"))
    assert (len(values), offsets.tolist()) == (0, [0])


@pytest.mark.parametrize("cut", [0, 3, 4, 100, -1, -8, -500])
def test_truncated_table_is_named(storage: LocalStorage, cut: int) -> None:
    write_table(storage.open_output("t.parquet"), example_table())
    storage.write_bytes("t.parquet", storage.read_bytes("t.parquet")[:cut])
    with pytest.raises(CorruptFileError, match=r"/t\.parquet is truncated or not Parquet"):
        read_table(storage, "t.parquet", SCHEMA)


def test_byte_altered_in_the_data_is_told_and_never_read_as_another_number(storage: LocalStorage) -> None:
    """Parquet leaves checksums out unless asked: 331 of 400 altered bytes of such a table were once read as other rows.

    Outside the pages (statistics, the footer's texts) a change may be harmless; nothing but our own errors is raised.
    """
    table = example_table(200)
    write_table(storage.open_output("good"), table)
    good, rows = storage.read_bytes("good"), table.to_pydict()
    for position in np.linspace(0, len(good) - 1, 250).astype(int):
        bad = bytearray(good)
        bad[position] ^= 0x5A
        storage.write_bytes("bad", bytes(bad))
        try:
            assert read_table(storage, "bad", SCHEMA).to_pydict() == rows, f"byte {position} of {len(good)}"
        except (CorruptFileError, SchemaError) as error:
            assert f"{storage.uri}/bad" in str(error)


def test_missing_column_and_other_type_are_told_with_what_is_there(storage: LocalStorage) -> None:
    pq.write_table(pa.table({"example_id": pa.array([b"x" * 16], ID_TYPE), "tags": ["a"]}), Path(storage.uri) / "t")
    with pytest.raises(SchemaError, match=r"/t has no column 'feature'; it has example_id, tags"):
        read_table(storage, "t", OPEN)
    with pytest.raises(SchemaError, match=r"/t: column 'tags' is string where list<.*int32> is expected"):
        read_table(storage, "t", SCHEMA)


def test_vectors_of_another_width_are_refused_where_the_width_is_fixed(storage: LocalStorage) -> None:
    schema = pa.schema([("feature", vector_type(5))])
    write_table(storage.open_output("t"), build_table(schema, {"feature": vectors_from_array(np.ones((2, 5)))}))
    assert read_table(storage, "t", pa.schema([("feature", vector_type(-1))])).num_rows == 2
    with pytest.raises(SchemaError, match="column 'feature'"):
        read_table(storage, "t", pa.schema([("feature", vector_type(4))]))


@given(st.integers(0, 40), st.lists(st.integers(0, 40), max_size=4))
def test_conversions_are_exact_for_any_slice_and_chunking(rows: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(rows)
    ids = rng.integers(0, 256, (rows, 16), dtype=np.uint8)
    vectors = rng.normal(size=(rows, 4)).astype(np.float16)
    lists = [rng.integers(0, 9, rng.integers(0, 4)).astype(np.int32).tolist() for _ in range(rows)]
    bounds = sorted({0, rows, *(min(cut, rows) for cut in cuts)})
    slices = [slice(a, b) for a, b in pairwise(bounds)]

    def chunked(array: pa.Array) -> pa.ChunkedArray:
        return pa.chunked_array([array[piece] for piece in slices], array.type)

    np.testing.assert_array_equal(ids_to_array(chunked(ids_from_array(ids))), ids)
    np.testing.assert_array_equal(vectors_to_array(chunked(vectors_from_array(vectors))), vectors)
    values, offsets = lists_to_csr(chunked(pa.array(lists, pa.list_(pa.int32()))))
    assert [values[a:b].tolist() for a, b in pairwise(offsets)] == lists
    assert (values.dtype, offsets.dtype) == (np.int32, np.int64)


def test_build_table_has_the_schemas_order_and_refuses_a_missing_column() -> None:
    assert example_table(1).column_names == SCHEMA.names
    with pytest.raises(KeyError, match="tags"):
        build_table(SCHEMA, {"example_id": ids_from_array(np.zeros((1, 16), np.uint8))})


def test_reading_a_table_leaves_no_thread_behind_that_calls_python(storage: LocalStorage) -> None:
    """Such a thread, if it lets go of a buffer while the interpreter ends, takes the process down."""
    path = "all.parquet"
    write_table(storage.open_output(path), example_table())
    code = (
        "import os, sys, pyarrow.parquet as pq\n"
        "from pathlib import Path\nfrom hardmoe.storage import LocalStorage\n"
        "from hardmoe.tables import iterate_table, read_table\n"
        "storage, path = LocalStorage(Path(sys.argv[1])), sys.argv[2]\n"
        "schema = pq.read_schema(sys.argv[1] + '/' + path)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "read_table(storage, path, schema), list(iterate_table(storage, path, schema))\n"
        "sys.exit(len(os.listdir('/proc/self/task')) - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(storage.where()), path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
