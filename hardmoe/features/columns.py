"""The two columns of features computed elsewhere, whatever forms they came in: ids and vectors.

People write ids as bytes, as hexadecimal digits or by their own keys, and vectors as lists of any float. Each form is told by
its type where the file's schema is read, before any work, and a value that does not fit is one sentence that names the file.
Rejected: guessing per value, by which a key of 32 digits would now be a key and now an id.

Shape letters: N rows, D width.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hardmoe.data.ids import key_id
from hardmoe.errors import DataError
from hardmoe.tables import ID_TYPE, ids_to_array

ID, FEATURE = "example_id", "feature"


def check_columns(schema: Any, where: str, named_by_key: bool) -> None:
    """Whether a file has both columns, of types that can be read.

    Raises:
        DataError: it has not.
    """
    for name in (ID, FEATURE):
        if schema.names.count(name) != 1:
            raise DataError(f"{where} must have one column '{name}'; it has {', '.join(schema.names)}; correct features.path")
    id_type, vector = _plain(schema.field(ID).type), schema.field(FEATURE).type
    if pa.types.is_integer(id_type) and not named_by_key:
        raise DataError(
            f"{where}: column '{ID}' is {id_type}, but this dataset's examples are named by their content; give 16 bytes or "
            "32 hexadecimal digits, or set dataset.id_column"
        )
    if not (pa.types.is_integer(id_type) or _is_text(id_type) or _is_bytes(id_type) or id_type == ID_TYPE):
        raise DataError(f"{where}: column '{ID}' is {id_type}; give 16 bytes, or 32 hexadecimal digits")
    is_list = pa.types.is_list(vector) or pa.types.is_large_list(vector) or pa.types.is_fixed_size_list(vector)
    if not is_list or not pa.types.is_floating(vector.value_type):
        raise DataError(f"{where}: column '{FEATURE}' is {vector}; give lists of one length of float16, float32 or float64")


def read_ids(column: Any, where: str, named_by_key: bool) -> NDArray[np.uint8]:
    """Example ids, uint8 [N, 16].

    Args:
        column: an array of a type that `check_columns` accepts.
        where: the file, for messages.
        named_by_key: whether strings, integers and bytes are the user's keys; sixteen bytes of fixed size are always an id.

    Raises:
        DataError: a value is no id.
    """
    if column.null_count:
        raise DataError(f"{where}: {column.null_count} rows have no '{ID}'; fill them in or leave these rows out")
    if column.type == ID_TYPE:
        return ids_to_array(column)
    values = column.to_pylist()
    if named_by_key:
        # The rule of the dataset's own id column: bytes in hexadecimal digits, everything else as it is printed.
        ids = [key_id(value.hex() if isinstance(value, bytes) else str(value)) for value in values]
    else:
        ids = [_id_of(value, where) for value in values]
    return np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 16)


def _id_of(value: str | bytes, where: str) -> bytes:
    try:
        identity = bytes.fromhex(value) if isinstance(value, str) else value
    except ValueError:
        identity = b""
    if len(identity) != 16:
        shown = value if isinstance(value, str) else value.hex()
        raise DataError(
            f"{where}: '{shown[:80]}' in column '{ID}' is no example id; give 16 bytes or 32 hexadecimal digits, or set "
            "dataset.id_column if these are keys of your own"
        )
    return identity


def read_vectors(column: Any, where: str) -> NDArray[np.float16]:
    """Features, float16 [N, D].

    Args:
        column: an array of lists of floats.
        where: the file, for messages.

    Raises:
        DataError: lengths differ, or a value is missing, not finite or too large for float16.
    """
    if column.null_count:
        raise DataError(f"{where}: {column.null_count} rows have no '{FEATURE}'; fill them in or leave these rows out")
    flat, lengths_N = column.flatten(), pc.list_value_length(column).to_numpy(zero_copy_only=False)
    widths = np.unique(lengths_N)
    if len(widths) > 1:
        raise DataError(f"{where}: features of {widths[0]} and of {widths[-1]} numbers; all must have one length")
    if flat.null_count:
        raise DataError(f"{where}: {flat.null_count} numbers of the features are null; fill them in")
    if len(widths) and widths[0] == 0:
        raise DataError(f"{where}: the features are empty lists; give at least one number each")
    with np.errstate(over="ignore"):
        values = flat.to_numpy(zero_copy_only=False).astype(np.float16)
    vectors_ND: NDArray[np.float16] = values.reshape(len(column), int(widths[0]) if len(widths) else 0)
    if bad := int((~np.isfinite(vectors_ND)).any(axis=1).sum()):
        raise DataError(
            f"{where}: {bad} features are not finite in float16 (NaN, infinite, or beyond 65,504); leave them out, or scale them"
        )
    return vectors_ND


def _plain(type_: Any) -> Any:
    return type_.value_type if pa.types.is_dictionary(type_) else type_


def _is_text(type_: Any) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))


def _is_bytes(type_: Any) -> bool:
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))
