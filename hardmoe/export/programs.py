"""Traced graphs of the pieces, by `torch.export`, and ONNX of them, each run by ONNX Runtime and held against torch.

The batch is of any size. Rejected: trusting the exporter, which has dropped a rounding before now without a word.
"""

import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hardmoe.errors import DataError, RecipeError

TOLERANCE = 1e-4
"""Relative to the largest value of an output."""
_MOST_ONNX_BYTES = 2**31 - 2**20
_OPSET = 18


class Traced:
    """The graph of a piece, for batches of any size; of others of the same shape by putting their weights in.

    Tracing takes seconds, and so a minute for 64 experts; that the weights went where they belong is seen by running it.

    Args:
        name: of the piece, for messages.
        piece: in evaluation mode.
        example: an input of three rows.
        names: of the input, and of the outputs.
    """

    def __init__(self, name: str, piece: nn.Module, example: Tensor, names: tuple[str, Sequence[str]]) -> None:
        self._name, self._piece, self._example, self._names = name, piece, example, names
        batch = torch.export.Dim("batch", min=1, max=4096)
        with torch.no_grad():
            self._program = torch.export.export(piece, (example,), dynamic_shapes=({0: batch},), strict=False)
        # Where each operation stands in the source: paths of this machine, and three times the size.
        for node in self._program.graph.nodes:
            node.meta.pop("stack_trace", None)
        self._model: Any = None

    def turned_into(self, name: str, piece: nn.Module) -> None:
        """Become the graph of another piece, which differs in its weights alone."""
        self._name, self._piece = name, piece
        state = piece.state_dict()
        assert state.keys() == self._program.state_dict.keys()
        for key, tensor in state.items():
            # In their place, not into them: they are the first piece's own. A program insists on parameters being such.
            is_parameter = isinstance(self._program.state_dict[key], nn.Parameter)
            self._program.state_dict[key] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        if self._model is not None:
            from onnx import numpy_helper

            for initializer in self._model.graph.initializer:
                if initializer.name in state:
                    initializer.CopyFrom(numpy_helper.from_array(state[initializer.name].numpy(), initializer.name))

    def program(self) -> bytes:
        """As `torch.export.load` reads it."""
        target = io.BytesIO()
        torch.export.save(self._program, target)
        return target.getvalue()

    def onnx(self) -> bytes:
        """As ONNX, which ONNX Runtime has run with the piece's outputs.

        Raises:
            DataError: the piece is too large for one file, or ONNX Runtime computes something else.
        """
        size = sum(tensor.numel() * tensor.element_size() for tensor in (*self._piece.parameters(), *self._piece.buffers()))
        if size > _MOST_ONNX_BYTES:
            raise DataError(
                f"the {self._name} has {size / 2**30:.1f} GiB of weights, and ONNX takes 2 GiB in a file; leave --onnx out"
            )
        inputs, outputs = self._names
        if self._model is None:
            # Not optimised, which would fold weights into others; ONNX Runtime does that when it loads the file.
            options: Any = {"opset_version": _OPSET, "dynamo": True, "verbose": False, "optimize": False}
            labels: Any = {"input_names": [inputs], "output_names": list(outputs)}
            exported = torch.onnx.export(self._program, (self._example,), **labels, **options)
            assert exported is not None
            self._model = exported.model_proto
            for node in (*self._model.graph.node, *(node for function in self._model.functions for node in function.node)):
                del node.metadata_props[:]
        data: bytes = self._model.SerializeToString()
        self._check(data)
        return data

    def _check(self, data: bytes) -> None:
        import onnxruntime

        inputs, outputs = self._names
        with torch.no_grad():
            expected = self._piece(self._example)
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        for rows in (len(self._example), 1):
            found = session.run(None, {inputs: self._example[:rows].numpy()})
            for label, there, here in zip(outputs, found, expected if isinstance(expected, tuple) else (expected,), strict=True):
                _compare(f"{self._name}'s {label}", there, here[:rows].numpy())


def check_onnx_is_installed() -> None:
    """Look for the packages that ONNX needs, before anything is written.

    Raises:
        RecipeError: one is missing.
    """
    for name in ("onnx", "onnxruntime", "onnxscript"):
        if find_spec(name) is None:
            raise RecipeError(f"ONNX needs the package {name}, which is missing; pip install 'hardmoe[onnx]'")


def _compare(what: str, found: Any, expected: Any) -> None:
    difference = np.abs(found.astype(np.float64) - expected).max() / max(1e-12, float(np.abs(expected).max()))
    if not difference <= TOLERANCE:
        raise DataError(f"ONNX Runtime computes the {what} otherwise than torch, by {difference:.1e} of its largest value")
