"""The recipe's `decoder` section."""

from typing import Literal, Self

from pydantic import Field, model_validator

from hardmoe.config import Config, operational


class DecoderConfig(Config):
    """How the alignment and the shared decoder are fitted on the experts' cached embeddings."""

    epochs: int = Field(6, ge=1)
    """Passes over the cached embeddings; a pass costs seconds, as no network runs."""

    align: Literal["affine", "none"] = "affine"
    """`affine`: an affine map per expert into the unified space; `none`: the experts' own features are that space."""

    dim: int | None = Field(None, ge=1)
    """Width of the unified space; null for the experts' width, at most twice that. Needs `align: affine`."""

    batch_size: int = Field(512, ge=1)
    """Examples per step at most; the batches of an epoch differ by at most one example."""

    learning_rate: float = Field(3e-3, gt=0)
    """Peak learning rate of AdamW; half a cosine takes it to zero."""

    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of the decoder's weight; the alignment and the biases are never pulled towards zero."""

    checkpoint_every_steps: int | None = operational(500, ge=1)
    """Steps between checkpoints; null for none."""

    num_threads: int = operational(1, ge=1)
    """CPU threads of the fit. Results are the same bytes only for the same number."""

    @model_validator(mode="after")
    def _width_needs_alignment(self) -> Self:
        if self.align == "none" and self.dim is not None:
            raise ValueError(f"dim: {self.dim} needs align: affine; without alignment the width is the experts'. Set dim: null")
        return self
