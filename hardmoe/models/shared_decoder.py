"""The shared decoder: an alignment per expert, then one linear decoding layer over the unified space.

    z = A_e h + b_e                              see `alignment`, which has smaller maps too
    logits = D z + d                             decoder.weight [V, Z], decoder.bias [V]
    logits_v = exp(t) cos(D_v, z) + d_v          the same with decoder.log_scale t, where a temperature is given

Independently trained experts' features do not lie in one space; a plain shared decoder gives away most of what the
mixture gained, and a per-expert affine map wins it back at one decoder and one space for neighbours. Rejected: a decoder
per expert (no common space), and concatenating the experts' features (K times the width is K private decoders in disguise).

Shape letters: B batch, E features of an expert, Z unified dims, V tags, K experts, R rank, T some of the tags.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from hardmoe.errors import CorruptFileError, RecipeError
from hardmoe.hashing import derive_seed
from hardmoe.models.alignment import AffineAlignment, Alignment, LowRankAlignment, ScaleAlignment, alignment_from_tensors
from hardmoe.stage import InputArtifact

DECODER_FILE = "decoder.safetensors"

EXTRA_SCALE = 0.1
"""Length of the further rows of an alignment at the start: small, so that z is close to h; on synthetic blobs 1 did as well."""


_START_LENGTH = 0.1
"""Length of a tag's first weights under a cosine where the trunk's cannot be taken: a zero vector has no direction."""


@dataclass(frozen=True)
class DecoderForm:
    """Which maps, and how wide."""

    align: str = "affine"
    """`affine`, `lowrank`, `scale` or `none`."""
    dim: int | None = None
    """Z; None for the experts' width, as `scale` and `none` need."""
    rank: int = 8
    """R, of `lowrank`."""
    temperature: float | None = None
    """Where the scale of a cosine decoder begins, as 1 / temperature; None for plain inner products."""


class _Linear(nn.Module):
    """The decoding layer's weights, given."""

    def __init__(self, weight_VZ: Tensor, bias_V: Tensor, log_scale: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_VZ)
        self.bias = nn.Parameter(bias_V)
        self.log_scale = None if log_scale is None else nn.Parameter(log_scale)


_WIDEST = 4
"""Of the experts' width. Claims are made with at most twice (`pipelines/README.md`); beyond it one may look at the trend."""


def check_width(dim: int, num_features: int) -> None:
    """Hold the width of the unified space against the experts'.

    Raises:
        RecipeError: it is more than four times as wide.
    """
    if dim > _WIDEST * num_features:
        raise RecipeError(
            f"decoder.dim {dim} is more than four times the experts' width {num_features}, where a shared decoder becomes "
            f"private ones in disguise: set it to at most {_WIDEST * num_features}"
        )


def check_rank(rank: int, dim: int, num_features: int) -> None:
    """Hold the rank of a low-rank alignment against the maps that it corrects.

    Raises:
        RecipeError: it is no lower than theirs.
    """
    if rank >= min(dim, num_features):
        raise RecipeError(
            f"decoder.rank {rank} is no less than the rank of a full map from {num_features} to {dim} dimensions; "
            f"set it to at most {min(dim, num_features) - 1}, or decoder.align: affine"
        )


class SharedDecoder(nn.Module):
    """Alignment and decoder over K experts' features.

    Args:
        decoder_weight_VZ: float [V, Z].
        decoder_bias_V: float [V].
        alignment: the experts' maps, or None for none (the features are the unified space, Z = E).
        log_scale: float scalar, which makes the decoder one of cosines; or None.
    """

    def __init__(
        self,
        decoder_weight_VZ: Tensor,
        decoder_bias_V: Tensor,
        alignment: Alignment | None = None,
        log_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.alignment = alignment
        self.decoder = _Linear(decoder_weight_VZ, decoder_bias_V, log_scale)

    @classmethod
    def initial(
        cls,
        num_experts: int,
        num_features: int,
        start_weight_VE: Tensor,
        start_bias_V: Tensor,
        seed: int,
        form: DecoderForm = DecoderForm(),
    ) -> "SharedDecoder":
        """Start from the trunk's decoder and the identity alignment, the same for every expert.

        The first logits are then those of the trunk's decoder on the experts' features (for Z < E, of its best rank-Z
        approximation); under a cosine, their directions are. Where Z > E, every alignment gets the same seeded random orthonormal
        rows below the identity, and the decoder's further columns are zero: were both zero, neither would have a gradient and
        they would stay so. For the same reason a low-rank correction begins with random rows on the right and zero on the left.

        Args:
            num_experts: K.
            num_features: E, the experts' width.
            start_weight_VE: the trunk's decoder, float [V, E]; of another width (an expert's network may differ from the
                trunk's) only the tags count, and the decoder starts from zero weights, a cosine from random ones.
            start_bias_V: its bias, float [V].
            seed: the recipe's seed.
            form: which maps, and how wide.

        Raises:
            RecipeError: if `dim` is more than four times the experts' width, or `rank` not below a full map's.
        """
        width = num_features if form.dim is None else form.dim
        check_width(width, num_features)
        start_weight_VE = start_weight_VE.detach().float().cpu()
        if start_weight_VE.shape[1] != num_features:
            start_weight_VE = torch.zeros(start_weight_VE.shape[0], num_features)
            if form.temperature is not None:
                start_weight_VE = _random_rows(start_weight_VE.shape, seed) * _START_LENGTH
        start_bias_V = start_bias_V.detach().float().cpu().clone()
        log_scale = None if form.temperature is None else torch.tensor(-math.log(form.temperature))
        if form.align in ("none", "scale"):
            scale = ScaleAlignment(torch.ones(num_experts, width), torch.zeros(num_experts, width))
            return cls(start_weight_VE.clone(), start_bias_V, scale if form.align == "scale" else None, log_scale)
        weight_ZE, decoder_VZ = _initial_maps(start_weight_VE, width, seed)
        bias_KZ = torch.zeros(num_experts, width)
        if form.align == "affine":
            return cls(decoder_VZ, start_bias_V, AffineAlignment(weight_ZE.repeat(num_experts, 1, 1), bias_KZ), log_scale)
        check_rank(form.rank, width, num_features)
        right_KRE = _orthonormal_rows(form.rank, num_features, derive_seed(seed, "decoder", "lowrank")).repeat(num_experts, 1, 1)
        low_rank = LowRankAlignment(weight_ZE, torch.zeros(num_experts, width, form.rank), right_KRE, bias_KZ)
        return cls(decoder_VZ, start_bias_V, low_rank, log_scale)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "SharedDecoder":
        """Build from a state dict, as loaded from `decoder.safetensors`."""
        alignment = alignment_from_tensors(tensors)
        return cls(tensors["decoder.weight"], tensors["decoder.bias"], alignment, tensors.get("decoder.log_scale"))

    @property
    def dim(self) -> int:
        """Z, the width of the unified space."""
        return int(self.decoder.weight.shape[1])

    @property
    def num_experts(self) -> int | None:
        """K, or None without alignment, where the experts are all alike."""
        return None if self.alignment is None else self.alignment.num_experts

    @property
    def num_tags(self) -> int:
        """V."""
        return int(self.decoder.weight.shape[0])

    def align(self, embeddings_BE: Tensor, experts_B: Tensor) -> Tensor:
        """Map every expert's features into the unified space.

        Args:
            embeddings_BE: float [B, E], of any precision; computed in the parameters'.
            experts_B: int64 [B], which expert the features come from.

        Returns:
            float [B, Z], in the order given.

        Raises:
            ValueError: if an expert's number is not below K.
        """
        embeddings_BE = embeddings_BE.to(self.decoder.weight.dtype)
        if self.alignment is None:
            return embeddings_BE
        aligned_BZ: Tensor = self.alignment(embeddings_BE, experts_B)
        return aligned_BZ

    def scaled(self, unified_BZ: Tensor) -> Tensor:
        """Points of the unified space as the decoder's rows meet them: under a cosine of one length, the scale."""
        log_scale = self.decoder.log_scale
        return unified_BZ if log_scale is None else functional.normalize(unified_BZ, dim=1) * log_scale.exp()

    def rows(self, weight_TZ: Tensor) -> Tensor:
        """Some of the decoder's rows as they meet those points: under a cosine of length 1."""
        return weight_TZ if self.decoder.log_scale is None else functional.normalize(weight_TZ, dim=1)

    def decode(self, unified_BZ: Tensor) -> Tensor:
        """Logits float [B, V] of points of the unified space."""
        return functional.linear(self.scaled(unified_BZ), self.rows(self.decoder.weight), self.decoder.bias)

    def forward(self, embeddings_BE: Tensor, experts_B: Tensor) -> Tensor:
        """Logits float [B, V] of experts' features; arguments as for `align`."""
        return self.decode(self.align(embeddings_BE, experts_B))


def _initial_maps(start_weight_VE: Tensor, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """An alignment [Z, E] and a decoder [V, Z] whose product is the given decoder, or its best rank-Z approximation."""
    num_tags, num_features = start_weight_VE.shape
    if dim < num_features:
        # The Z leading right singular vectors (Eckart and Young 1936), from the E x E Gram matrix.
        start_VE = start_weight_VE.double()
        leading_ZE = torch.linalg.eigh(start_VE.T @ start_VE).eigenvectors.flip(1)[:, :dim].T
        return leading_ZE.float().contiguous(), (start_VE @ leading_ZE.T).float()
    starts = range(num_features, dim, num_features)
    seeds = [derive_seed(seed, "decoder", "alignment", *([start] if start > num_features else [])) for start in starts]
    blocks = [
        _orthonormal_rows(min(num_features, dim - start), num_features, block_seed)
        for start, block_seed in zip(starts, seeds, strict=True)
    ]
    extra_rows = torch.cat([torch.zeros(0, num_features), *blocks]) * EXTRA_SCALE
    decoder_VZ = torch.cat([start_weight_VE, torch.zeros(num_tags, dim - num_features)], dim=1)
    return torch.cat([torch.eye(num_features), extra_rows]), decoder_VZ


def _orthonormal_rows(num_rows: int, num_columns: int, seed: int) -> Tensor:
    """float32, at most as many rows as columns."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(num_columns, num_rows, generator=generator, dtype=torch.float64)
    rows: Tensor = torch.linalg.qr(gaussian).Q
    return rows.T.float()


def _random_rows(shape: Sequence[int], seed: int) -> Tensor:
    """float32, every row of length 1."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "decoder", "cosine"))
    return functional.normalize(torch.randn(*shape, generator=generator), dim=1)


def load_shared_decoder(decoder: InputArtifact) -> SharedDecoder:
    """A finished alignment and decoder, in evaluation mode on the CPU.

    Raises:
        CorruptFileError: the file is not what was written.
    """
    try:
        tensors = safetensors.torch.load(decoder.read(DECODER_FILE))
        return SharedDecoder.from_tensors(tensors).eval()
    except (SafetensorError, KeyError) as error:
        where = decoder.storage.where(decoder.path(DECODER_FILE))
        raise CorruptFileError(f"{where} is damaged: {error}; delete the decoder and run again") from error
