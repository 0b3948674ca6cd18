"""Named NumPy arrays in one file, without pickle: what units hand to later phases."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from hardmoe.errors import CorruptFileError
from hardmoe.storage import OutputFile, Storage


def save_arrays(out: AbstractContextManager[OutputFile], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays into an output; equal arrays give equal bytes."""
    with out as sink:
        sink.write(pack_arrays(arrays))


def pack_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The contents of such a file."""
    packed: bytes = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return packed


def load_arrays(storage: Storage, path: str) -> dict[str, NDArray[Any]]:
    """Read what `save_arrays` wrote.

    Raises:
        CorruptFileError: the file is truncated or damaged.
    """
    try:
        arrays: dict[str, NDArray[Any]] = safetensors.numpy.load(storage.read_bytes(path))
    except (safetensors.SafetensorError, ValueError) as error:
        raise CorruptFileError(f"{storage.where(path)} is damaged: {error}") from error
    return arrays
