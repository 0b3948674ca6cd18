"""Experts that are MLPs of two layers, their weights stacked, so that one batched product runs them all.

All experts begin alike, as V-MoE's do, which is also what a dense network's MLP becomes when it is upcycled (Komatsuzaki et al.
2022): noise in the router and different items drive them apart.

Shape letters: E experts, D width, F hidden width, O width of the output, N slots, R rows.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hardmoe.models.moe.experts.base import Experts, PaddedRows, SortedRows
from hardmoe.models.moe.grouped import grouped_product
from hardmoe.models.moe.precision import lowered


class MlpExperts(Experts):
    """act(x W1 + b1) W2 + b2, with dropout behind both.

    Args:
        first: a dense layer with the experts' initial weights, D to F.
        second: the same, F to O.
        num_experts: E.
        dropout: share of values that are dropped in training.
    """

    def __init__(self, first: nn.Linear, second: nn.Linear, num_experts: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight1_EDF = nn.Parameter(_stacked(first.weight.T, num_experts))
        self.weight2_EFO = nn.Parameter(_stacked(second.weight.T, num_experts))
        # Flat, so that whatever goes by dimensions (weight decay, LAMB's adaption) takes them for the biases that they are.
        self.bias1 = nn.Parameter(_stacked(first.bias, num_experts).flatten())
        self.bias2 = nn.Parameter(_stacked(second.bias, num_experts).flatten())
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)

    def padded(self, given: PaddedRows) -> Tensor:
        """Outputs [E, N, O]: two batched products."""
        bias1_E1F, bias2_E1O = (bias.view(self.num_experts, 1, -1) for bias in (self.bias1, self.bias2))
        rows_END = lowered(given.rows_ENX)
        hidden_ENF = torch.bmm(rows_END, lowered(self.weight1_EDF)) + lowered(bias1_E1F)
        hidden_ENF = self.dropout(self.activation(hidden_ENF))
        outputs_ENO: Tensor = self.dropout(torch.bmm(hidden_ENF, lowered(self.weight2_EFO)) + lowered(bias2_E1O))
        return outputs_ENO

    def sorted(self, given: SortedRows) -> Tensor:
        """Outputs [R, O]: two grouped products."""
        bias1_EF, bias2_EO = (bias.view(self.num_experts, -1) for bias in (self.bias1, self.bias2))
        rows_RD = lowered(given.rows_RX)
        hidden_RF = grouped_product(rows_RD, lowered(self.weight1_EDF), given.ends_E)
        hidden_RF = self.dropout(self.activation(hidden_RF + lowered(bias1_EF).index_select(0, given.experts_R)))
        outputs_RO = grouped_product(hidden_RF, lowered(self.weight2_EFO), given.ends_E)
        dropped_RO: Tensor = self.dropout(outputs_RO + lowered(bias2_EO).index_select(0, given.experts_R))
        return dropped_RO

    @staticmethod
    def upcycled(dense: Mapping[str, Tensor], first: str, second: str, num_experts: int) -> dict[str, Tensor]:
        """The state of experts that all are a dense MLP.

        Args:
            dense: tensors of the dense network.
            first: prefix of the first layer's, as in `mlp.0`.
            second: prefix of the second's.
            num_experts: E.
        """
        return {
            "weight1_EDF": _stacked(dense[f"{first}.weight"].T, num_experts),
            "weight2_EFO": _stacked(dense[f"{second}.weight"].T, num_experts),
            "bias1": _stacked(dense[f"{first}.bias"], num_experts).flatten(),
            "bias2": _stacked(dense[f"{second}.bias"], num_experts).flatten(),
        }


def _stacked(tensor: Tensor, num_experts: int) -> Tensor:
    return tensor.detach().expand(num_experts, *tensor.shape).clone(memory_format=torch.contiguous_format)
