"""Maps of each expert's own features into the unified space, in three sizes.

    affine    z = A_e h + b_e                 weight [K, Z, E], bias [K, Z]
    lowrank   z = S h + L_e (R_e h) + b_e     shared [Z, E], left [K, Z, R], right [K, R, E], bias [K, Z]
    scale     z = s_e * h + b_e               weight [K, E], bias [K, E], so Z = E

`affine` undoes whatever linear map lies between two experts' spaces; it has K Z E numbers. `lowrank` corrects one map of all
experts in R directions and has Z E + K R (Z + E) numbers, for many experts with few examples each. `scale` only weighs and moves
the features, for experts that kept the trunk's axes. Rejected: orthogonal maps (Procrustes), which are the affine ones without
the freedom to scale, at the price of a retraction in every step.

Shape letters: B batch, E features of an expert, Z unified dims, K experts, R rank, n examples of one expert.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

_PREFIX = "alignment."


class Alignment(nn.Module, ABC):
    """What the three have in common."""

    bias: nn.Parameter
    """[K, Z]."""

    @property
    def num_experts(self) -> int:
        """K."""
        return int(self.bias.shape[0])

    @property
    def dim(self) -> int:
        """Z."""
        return int(self.bias.shape[1])

    def forward(self, embeddings_BE: Tensor, experts_B: Tensor) -> Tensor:
        """Map every expert's features into the unified space.

        Examples are grouped by expert, so a step costs one small product per expert present. Gathering A_e for every
        example would move B·Z·E numbers instead, 37 MB at 512 x 192 x 96.

        Args:
            embeddings_BE: float [B, E], in the parameters' precision.
            experts_B: int64 [B], which expert the features come from.

        Returns:
            float [B, Z], in the order given.

        Raises:
            ValueError: if an expert's number is not below K.
        """
        counts_K = torch.bincount(experts_B, minlength=self.num_experts).tolist()
        if len(counts_K) > self.num_experts:
            raise ValueError(f"expert {len(counts_K) - 1} has no alignment: there are {self.num_experts} experts")
        if not len(embeddings_BE):
            return embeddings_BE.new_zeros(0, self.dim)
        order_B = torch.argsort(experts_B, stable=True)
        groups = torch.split(embeddings_BE.index_select(0, order_B), counts_K)
        return torch.cat(self._aligned(groups)).index_select(0, torch.argsort(order_B))

    @abstractmethod
    def _aligned(self, groups: Sequence[Tensor]) -> list[Tensor]:
        """Every expert's features [n, E], by expert and some of them empty, as [n, Z] each; the empty ones may be left out."""


class AffineAlignment(Alignment):
    """See the module.

    Args:
        weight_KZE: float [K, Z, E].
        bias_KZ: float [K, Z].
    """

    def __init__(self, weight_KZE: Tensor, bias_KZ: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight_KZE), nn.Parameter(bias_KZ)

    def _aligned(self, groups: Sequence[Tensor]) -> list[Tensor]:
        # Unbinding once makes one gradient of [K, Z, E]; indexing expert by expert would add K of that size.
        maps = zip(groups, self.weight.unbind(0), self.bias.unbind(0), strict=True)
        return [functional.linear(group_nE, weight_ZE, bias_Z) for group_nE, weight_ZE, bias_Z in maps if len(group_nE)]


class ScaleAlignment(Alignment):
    """See the module.

    Args:
        weight_KE: float [K, E].
        bias_KE: float [K, E].
    """

    def __init__(self, weight_KE: Tensor, bias_KE: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight_KE), nn.Parameter(bias_KE)

    def _aligned(self, groups: Sequence[Tensor]) -> list[Tensor]:
        maps = zip(groups, self.weight.unbind(0), self.bias.unbind(0), strict=True)
        return [torch.addcmul(bias_E, group_nE, weight_E) for group_nE, weight_E, bias_E in maps if len(group_nE)]


class LowRankAlignment(Alignment):
    """See the module.

    Args:
        shared_ZE: float [Z, E].
        left_KZR: float [K, Z, R].
        right_KRE: float [K, R, E].
        bias_KZ: float [K, Z].
    """

    def __init__(self, shared_ZE: Tensor, left_KZR: Tensor, right_KRE: Tensor, bias_KZ: Tensor) -> None:
        super().__init__()
        self.shared, self.left = nn.Parameter(shared_ZE), nn.Parameter(left_KZR)
        self.right, self.bias = nn.Parameter(right_KRE), nn.Parameter(bias_KZ)

    def _aligned(self, groups: Sequence[Tensor]) -> list[Tensor]:
        maps = zip(groups, self.left.unbind(0), self.right.unbind(0), self.bias.unbind(0), strict=True)
        return [
            functional.linear(group_nE, self.shared, bias_Z) + functional.linear(functional.linear(group_nE, right_RE), left_ZR)
            for group_nE, left_ZR, right_RE, bias_Z in maps
            if len(group_nE)
        ]


def alignment_from_tensors(tensors: Mapping[str, Tensor]) -> Alignment | None:
    """The alignment in a state dict of names that begin with `alignment.`; None where there is none."""
    found = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    if not found:
        return None
    if "shared" in found:
        return LowRankAlignment(found["shared"], found["left"], found["right"], found["bias"])
    return (AffineAlignment if found["weight"].ndim == 3 else ScaleAlignment)(found["weight"], found["bias"])
