"""The two layouts in which items reach a layer's experts, and what a container of experts is.

Shape letters: E experts, N slots of an expert over all groups, R rows, X shape of an item, Y shape of an output.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class PaddedRows:
    """Every expert has the same number of slots; those that nobody took hold zeros."""

    rows_ENX: Tensor
    filled_EN: Tensor
    """bool: slots that hold an item."""


@dataclass(frozen=True)
class SortedRows:
    """Rows in the order of their experts, and behind them rows that no expert has."""

    rows_RX: Tensor
    experts_R: Tensor
    """int64; of the rows that no expert has, any."""
    ends_E: Tensor
    """int64: where each expert's rows end; they begin where those of the one before end."""


class Experts(nn.Module, ABC):
    """The experts of one layer, each with weights of its own."""

    num_experts: int

    def forward(self, given: PaddedRows | SortedRows) -> Tensor:
        """Outputs in the same layout, [E, N, Y] or [R, Y]; of slots and rows without an item, anything finite."""
        return self.padded(given) if isinstance(given, PaddedRows) else self.sorted(given)

    @abstractmethod
    def padded(self, given: PaddedRows) -> Tensor:
        """Outputs [E, N, Y]."""

    @abstractmethod
    def sorted(self, given: SortedRows) -> Tensor:
        """Outputs [R, Y]."""
