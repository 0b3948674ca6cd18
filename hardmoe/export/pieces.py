"""The mixture cut into modules that can be traced: each takes and gives plain tensors, and knows all that it needs.

    trunk      pixels uint8 [B, 3, S, S] -> features [B, D]
    router     features [B, D] -> expert int64 [B]
    expert     pixels uint8 [B, 3, S, S] -> place in the unified space [B, Z], its alignment included
    decoder    place [B, Z] -> probabilities [B, V]
    mixture    pixels -> expert, place, probabilities; every image goes through every expert, so for few experts only

The router computes in float64, as `neighbours.assignment` decides near-ties. Rejected: scripted modules, which torch gives up.

Shape letters: B batch, S side in pixels, D features, E features of an expert, Z unified dims, K experts, F centroids,
P directions, V tags.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from hardmoe.mixture import Mixture
from hardmoe.models.alignment import AffineAlignment, Alignment, LowRankAlignment, ScaleAlignment
from hardmoe.models.shared_decoder import SharedDecoder
from hardmoe.partitioning.router import Router

_SCALE, _OFFSET = 1 / (255 * 0.25), -2.0


class Network(nn.Module):
    """A backbone behind the normalisation of its pixels."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """Features float32 [B, D]."""
        features_BD: Tensor = self.backbone(pixels_B3SS.float() * _SCALE + _OFFSET)
        return features_BD


class RouterPiece(nn.Module):
    """See the module."""

    centroids: Tensor
    groups: Tensor
    directions: Tensor
    offset: Tensor
    scale: Tensor

    def __init__(self, router: Router) -> None:
        super().__init__()
        for name, tensor in router_tensors(router).items():
            self.register_buffer(name, tensor)
        self.scaled = router.transform.kind != "none"
        self.projected = router.transform.projection is not None

    def forward(self, features_BD: Tensor) -> Tensor:
        """Experts int64 [B]."""
        x_BP = features_BD.half().double()
        if self.projected:
            x_BP = (x_BP @ self.directions.double().T - self.offset) * self.scale
        if self.scaled:
            length_B1 = x_BP.square().sum(1, keepdim=True).sqrt()
            x_BP = x_BP / torch.where(length_B1 == 0, torch.ones_like(length_B1), length_B1)
        x_BP = x_BP.float().double()
        centroids_FP = self.centroids.double()
        squared_BF = centroids_FP.square().sum(1)[None] - 2 * (x_BP @ centroids_FP.T)
        experts_B: Tensor = self.groups[squared_BF.argmin(1)]
        return experts_B


def router_tensors(router: Router) -> dict[str, Tensor]:
    """What a router is made of: centroids float32 [F, P], the expert of each int64 [F], and where there are any the directions
    float32 [P, D] with offset and scale float64 [P]."""
    groups_F = torch.arange(len(router.centroids_KD)) if router.group_F is None else torch.from_numpy(router.group_F).long()
    tensors = {"centroids": torch.from_numpy(router.centroids_KD.copy()), "groups": groups_F}
    if (projection := router.transform.projection) is not None:
        tensors["directions"] = torch.from_numpy(projection.directions_PD.copy())
        tensors["offset"] = torch.from_numpy(projection.offset_P.copy())
        tensors["scale"] = torch.from_numpy(projection.scale_P.copy())
    return tensors


def expert_map(alignment: Alignment | None, expert: int) -> tuple[Tensor | None, Tensor | None]:
    """One expert's alignment as a matrix [Z, E], or a vector [E] of a diagonal, and a bias [Z]; None for none."""
    with torch.no_grad():
        if alignment is None:
            return None, None
        bias_Z = alignment.bias[expert].clone()
        if isinstance(alignment, LowRankAlignment):
            return (alignment.shared + alignment.left[expert] @ alignment.right[expert]).clone(), bias_Z
        assert isinstance(alignment, AffineAlignment | ScaleAlignment)
        return alignment.weight[expert].clone(), bias_Z


class ExpertPiece(nn.Module):
    """See the module."""

    weight: Tensor | None
    bias: Tensor

    def __init__(self, backbone: nn.Module, alignment: Alignment | None, expert: int) -> None:
        super().__init__()
        self.network = Network(backbone)
        weight, bias_Z = expert_map(alignment, expert)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias_Z)

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """Places float32 [B, Z]."""
        h_BE: Tensor = self.network(pixels_B3SS)
        if self.weight is None:
            return h_BE
        return functional.linear(h_BE, self.weight, self.bias) if self.weight.ndim == 2 else h_BE * self.weight + self.bias


class DecoderPiece(nn.Module):
    """See the module."""

    weight: Tensor
    bias: Tensor

    def __init__(self, decoder: SharedDecoder) -> None:
        super().__init__()
        weight_VZ, bias_V = decoder_matrix(decoder)
        self.register_buffer("weight", weight_VZ)
        self.register_buffer("bias", bias_V)
        self.cosine = decoder.decoder.log_scale is not None

    def forward(self, unified_BZ: Tensor) -> Tensor:
        """Probabilities float32 [B, V]."""
        if self.cosine:
            unified_BZ = functional.normalize(unified_BZ, dim=1)
        return functional.linear(unified_BZ, self.weight, self.bias).softmax(1)


def decoder_matrix(decoder: SharedDecoder) -> tuple[Tensor, Tensor]:
    """The decoder's rows [V, Z] and bias [V]; under a cosine the rows are scaled, and places must have length 1."""
    with torch.no_grad():
        weight_VZ = decoder.rows(decoder.decoder.weight)
        if (log_scale := decoder.decoder.log_scale) is not None:
            weight_VZ = weight_VZ * log_scale.exp()
        return weight_VZ.clone().contiguous(), decoder.decoder.bias.clone()


class MixturePiece(nn.Module):
    """See the module."""

    def __init__(self, trunk: Network, router: RouterPiece, experts: Sequence[ExpertPiece], decoder: DecoderPiece) -> None:
        super().__init__()
        self.trunk, self.router, self.experts, self.decoder = trunk, router, nn.ModuleList(experts), decoder

    def forward(self, pixels_B3SS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Experts int64 [B], places float32 [B, Z], probabilities float32 [B, V]."""
        experts_B = self.router(self.trunk(pixels_B3SS))
        places_BKZ = torch.stack([expert(pixels_B3SS) for expert in self.experts], dim=1)
        chosen_B1Z = experts_B[:, None, None].expand(-1, 1, places_BKZ.shape[2])
        unified_BZ = places_BKZ.gather(1, chosen_B1Z)[:, 0]
        return experts_B, unified_BZ, self.decoder(unified_BZ)


def trunk_piece(mixture: Mixture) -> Network:
    """The trunk of a mixture that is on the CPU."""
    return Network(mixture.trunk.backbone).eval()


def expert_piece(mixture: Mixture, expert: int) -> ExpertPiece:
    """An expert of a mixture that is on the CPU."""
    return ExpertPiece(mixture.experts.get(expert).backbone, mixture.decoder.alignment, expert).eval()
