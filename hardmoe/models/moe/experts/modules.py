"""Experts that are modules of their own: residual stages, blocks, convolutions, heads.

An expert sees exactly the images that were sent to it, so that its batch normalisation counts no others; one that got none is not
run and has no gradient. In evaluation mode, where images do not meet in a layer, padded slots may be run along, which leaves
nothing that depends on the data for a compiler to trip over.

Shape letters: E experts, N slots, R rows, X shape of an item, Y shape of an output.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from hardmoe.models.moe.experts.base import Experts, PaddedRows, SortedRows
from hardmoe.models.single_values import running_statistics_for_single_values


class ModuleExperts(Experts):
    """A list of modules of one kind.

    Args:
        build: makes one expert; called E times, so that each begins with weights of its own.
        num_experts: E.
    """

    def __init__(self, build: Callable[[], nn.Module], num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.members = nn.ModuleList(build() for _ in range(num_experts))

    def padded(self, given: PaddedRows) -> Tensor:
        """Outputs [E, N, Y]."""
        if not self.training:
            return torch.stack([member(rows_NX) for member, rows_NX in zip(self.members, given.rows_ENX, strict=True)])
        outputs = [
            _run(member, rows_NX[filled_N]) if bool(filled_N.any()) else None
            for member, rows_NX, filled_N in zip(self.members, given.rows_ENX, given.filled_EN, strict=True)
        ]
        shape = self._shape(outputs, given.rows_ENX[0])
        slots = given.filled_EN.shape[1]
        padded = []
        for output, filled_N in zip(outputs, given.filled_EN, strict=True):
            empty_NY = given.rows_ENX.new_zeros(slots, *shape) if output is None else output.new_zeros(slots, *shape)
            padded.append(empty_NY if output is None else empty_NY.index_copy(0, filled_N.nonzero()[:, 0], output))
        return torch.stack([each.to(padded[0].dtype) for each in padded])

    def sorted(self, given: SortedRows) -> Tensor:
        """Outputs [R, Y]."""
        if given.rows_RX.is_meta:
            # Only the shapes are of interest, and all experts have the same.
            meta_RY: Tensor = self.members[0](given.rows_RX)
            return meta_RY
        ends = given.ends_E.tolist()
        pieces = [given.rows_RX[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        outputs = [_run(member, rows) if len(rows) else None for member, rows in zip(self.members, pieces, strict=True)]
        shape = self._shape(outputs, given.rows_RX)
        found = [output for output in outputs if output is not None]
        rest = (found[0] if found else given.rows_RX).new_zeros(len(given.rows_RX) - ends[-1], *shape)
        return torch.cat([*found, rest])

    def _shape(self, outputs: list[Tensor | None], rows_NX: Tensor) -> torch.Size:
        """Y, from an output or, where no expert has an item, from a look at one."""
        for output in outputs:
            if output is not None:
                return output.shape[1:]
        was_training = self.members[0].training
        with torch.no_grad():
            shape: torch.Size = self.members[0].eval()(rows_NX.new_zeros(1, *rows_NX.shape[1:])).shape[1:]
        self.members[0].train(was_training)
        return shape


def _run(member: nn.Module, rows_nX: Tensor) -> Tensor:
    """An expert's outputs for its images, of which one alone may leave batch normalisation a single value."""
    with running_statistics_for_single_values(member) if len(rows_nX) == 1 else nullcontext():
        outputs_nY: Tensor = member(rows_nX)
    return outputs_nY
