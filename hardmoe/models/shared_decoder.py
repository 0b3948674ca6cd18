"""The shared decoder: an affine alignment per expert, then one linear decoding layer over the unified space.

    z = A_e h + b_e        alignment.weight [K, Z, E], alignment.bias [K, Z]
    logits = D z + d       decoder.weight [V, Z], decoder.bias [V]

Independently trained experts' features do not lie in one space; a plain shared decoder gives away most of what the
mixture gained, and a per-expert affine map wins it back at one decoder and one space for neighbours. Rejected: a decoder
per expert (no common space), and concatenating the experts' features (K times the width is K private decoders in disguise).

Shape letters: B batch, E features of an expert, Z unified dims, V tags, K experts, n examples of one expert.
"""

from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from hardmoe.errors import CorruptFileError, RecipeError
from hardmoe.hashing import derive_seed
from hardmoe.stage import InputArtifact

DECODER_FILE = "decoder.safetensors"

EXTRA_SCALE = 0.1
"""Length of the further rows of an alignment at the start: small, so that z is close to h; on synthetic blobs 1 did as well."""


class _Affine(nn.Module):
    """A weight and a bias, given."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)


def check_width(dim: int, num_features: int) -> None:
    """Hold the width of the unified space against the experts'.

    Raises:
        RecipeError: it is more than twice as wide.
    """
    if dim > 2 * num_features:
        raise RecipeError(
            f"decoder.dim {dim} is more than twice the experts' width {num_features}, where a shared decoder becomes "
            f"private ones in disguise: set it to at most {2 * num_features}"
        )


class SharedDecoder(nn.Module):
    """Alignment and decoder over K experts' features.

    Args:
        decoder_weight_VZ: float [V, Z].
        decoder_bias_V: float [V].
        alignment_weight_KZE: float [K, Z, E], or None for no alignment (the features are the unified space, Z = E).
        alignment_bias_KZ: float [K, Z], or None with it.
    """

    def __init__(
        self,
        decoder_weight_VZ: Tensor,
        decoder_bias_V: Tensor,
        alignment_weight_KZE: Tensor | None = None,
        alignment_bias_KZ: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.alignment: _Affine | None = None
        if alignment_weight_KZE is not None and alignment_bias_KZ is not None:
            self.alignment = _Affine(alignment_weight_KZE, alignment_bias_KZ)
        self.decoder = _Affine(decoder_weight_VZ, decoder_bias_V)

    @classmethod
    def initial(
        cls,
        num_experts: int,
        num_features: int,
        dim: int | None,
        start_weight_VE: Tensor,
        start_bias_V: Tensor,
        seed: int,
        align: str = "affine",
    ) -> "SharedDecoder":
        """Start from the trunk's decoder and the identity alignment, the same for every expert.

        The first logits are then those of the trunk's decoder on the experts' features (for Z < E, of its best rank-Z
        approximation). Where Z > E, every alignment gets the same seeded random orthonormal rows below the identity,
        and the decoder's further columns are zero: were both zero, neither would have a gradient and they would stay so.

        Args:
            num_experts: K.
            num_features: E, the experts' width.
            dim: Z, or None for E.
            start_weight_VE: the trunk's decoder, float [V, E]; of another width (an expert's network may differ from the
                trunk's) only the tags count, and the decoder starts from zero weights.
            start_bias_V: its bias, float [V].
            seed: the recipe's seed.
            align: `affine` or `none`.

        Raises:
            RecipeError: if `dim` is more than twice the experts' width.
        """
        width = num_features if dim is None else dim
        check_width(width, num_features)
        start_weight_VE = start_weight_VE.detach().float().cpu()
        if start_weight_VE.shape[1] != num_features:
            start_weight_VE = torch.zeros(start_weight_VE.shape[0], num_features)
        start_bias_V = start_bias_V.detach().float().cpu().clone()
        if align == "none":
            return cls(start_weight_VE.clone(), start_bias_V)
        weight_ZE, decoder_VZ = _initial_maps(start_weight_VE, width, seed)
        return cls(decoder_VZ, start_bias_V, weight_ZE.repeat(num_experts, 1, 1), torch.zeros(num_experts, width))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "SharedDecoder":
        """Build from a state dict, as loaded from `decoder.safetensors`."""
        weight, bias = tensors["decoder.weight"], tensors["decoder.bias"]
        return cls(weight, bias, tensors.get("alignment.weight"), tensors.get("alignment.bias"))

    @property
    def dim(self) -> int:
        """Z, the width of the unified space."""
        return int(self.decoder.weight.shape[1])

    @property
    def num_experts(self) -> int | None:
        """K, or None without alignment, where the experts are all alike."""
        return None if self.alignment is None else int(self.alignment.weight.shape[0])

    @property
    def num_tags(self) -> int:
        """V."""
        return int(self.decoder.weight.shape[0])

    def align(self, embeddings_BE: Tensor, experts_B: Tensor) -> Tensor:
        """Map every expert's features into the unified space.

        Examples are grouped by expert, so a step costs one small product per expert present. Gathering A_e for every
        example would move B·Z·E numbers instead, 37 MB at 512 x 192 x 96.

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
        # Unbinding once makes one gradient of [K, Z, E]; indexing expert by expert would add K of that size.
        weights, biases = self.alignment.weight.unbind(0), self.alignment.bias.unbind(0)
        counts_K = torch.bincount(experts_B, minlength=len(weights)).tolist()
        if len(counts_K) > len(weights):
            raise ValueError(f"expert {len(counts_K) - 1} has no alignment: there are {len(weights)} experts")
        order_B = torch.argsort(experts_B, stable=True)
        groups = torch.split(embeddings_BE.index_select(0, order_B), counts_K)
        aligned = [
            functional.linear(group_nE, weight_ZE, bias_Z)
            for group_nE, weight_ZE, bias_Z in zip(groups, weights, biases, strict=True)
            if len(group_nE)
        ]
        return torch.cat(aligned).index_select(0, torch.argsort(order_B)) if aligned else embeddings_BE.new_zeros(0, self.dim)

    def decode(self, unified_BZ: Tensor) -> Tensor:
        """Logits float [B, V] of points of the unified space."""
        return functional.linear(unified_BZ, self.decoder.weight, self.decoder.bias)

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
    generator = torch.Generator().manual_seed(derive_seed(seed, "decoder", "alignment"))
    extra = torch.randn(num_features, dim - num_features, generator=generator, dtype=torch.float64)
    extra_rows = torch.linalg.qr(extra).Q.T.float() * EXTRA_SCALE
    decoder_VZ = torch.cat([start_weight_VE, torch.zeros(num_tags, dim - num_features)], dim=1)
    return torch.cat([torch.eye(num_features), extra_rows]), decoder_VZ


def load_shared_decoder(decoder: InputArtifact) -> SharedDecoder:
    """A finished alignment and decoder, in evaluation mode on the CPU.

    Raises:
        CorruptFileError: the file is not what was written.
    """
    path = decoder.path(DECODER_FILE)
    try:
        tensors = safetensors.torch.load(decoder.storage.read_bytes(path))
        return SharedDecoder.from_tensors(tensors).eval()
    except (SafetensorError, KeyError) as error:
        raise CorruptFileError(f"{decoder.storage.where(path)} is damaged: {error}; delete the decoder and run again") from error
