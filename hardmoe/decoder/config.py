"""The recipe's `decoder` section."""

from typing import Literal, Self

from pydantic import Field, model_validator

from hardmoe.config import Config, added, operational
from hardmoe.training.config import LossName

_RANK, _SAMPLED_TAGS = 8, 8192
Classes = Literal["full", "sharded", "sampled"]


class DecoderConfig(Config):
    """How the alignment and the shared decoder are fitted on the experts' cached embeddings."""

    epochs: int = Field(6, ge=1)
    """Passes over the cached embeddings; a pass costs seconds, as no network runs."""

    align: Literal["affine", "lowrank", "scale", "none"] = "affine"
    """Each expert's map into the unified space. `affine`: a matrix and a bias of its own; `lowrank`: a correction of rank
    `rank` to one matrix of all experts; `scale`: a factor and a bias per feature; `none`: the features are that space."""

    rank: int = added(_RANK, ge=1)
    """Rank of each expert's correction under `align: lowrank`."""

    dim: int | None = Field(None, ge=1)
    """Width of the unified space; null for the experts' width, at most four times that. Needs `align: affine` or `lowrank`."""

    temperature: float | None = added(None, gt=0)
    """A number makes the decoder one of cosines, cos / temperature + bias, with the temperature learned from there on (0.05 is a
    usual start); null for inner products."""

    loss: LossName = added("softmax")
    """As for a network: `softmax`, `one_tag` or `sigmoid`; the last starts with biases at the hashtags' log odds."""

    classes: Classes = added("full")
    """`full`: a batch's logits of all hashtags at once; `sharded`: the same loss and gradient a few thousand hashtags at a time,
    in memory that does not grow with their number, for a third more arithmetic; `sampled`: estimated from the batch's hashtags
    and about `sampled_tags` others, the frequent ones rather, for vocabularies that are too dear to compute in full."""

    sampled_tags: int = added(_SAMPLED_TAGS, ge=1)
    """Hashtags in the mean step of `classes: sampled`, beside those of the batch."""

    rounds: int = added(0, ge=0, le=16)
    """How often the experts go on against what was fitted: alignment and decoder are held while each trains for `round_epochs`,
    then fitted anew. These epochs are the last ones of `experts.epochs`, so that everything costs what it costs without."""

    round_epochs: int = added(1, ge=1)
    """Epochs of the experts in each of the `rounds`."""

    batch_size: int = Field(512, ge=1)
    """Examples per step at most; the batches of an epoch differ by at most one example."""

    learning_rate: float = Field(3e-3, gt=0)
    """Peak learning rate of AdamW; half a cosine takes it to zero."""

    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of the decoder's weight; the alignment and the biases are never pulled towards zero."""

    checkpoint_every_steps: int | None = operational(500, ge=1)
    """Steps between checkpoints; null for none."""

    memory_gib: float = operational(4.0, gt=0)
    """Memory for the cached embeddings, in GiB. What needs more is put in order on local disk (TMPDIR), with the same result."""

    num_threads: int = operational(1, ge=1)
    """CPU threads of the fit. Results are the same bytes only for the same number."""

    @model_validator(mode="after")
    def _width_needs_alignment(self) -> Self:
        if self.align in ("none", "scale") and self.dim is not None:
            raise ValueError(
                f"dim: {self.dim} needs align: affine or lowrank; with {self.align} the width is the experts'. Set dim: null"
            )
        if self.rounds == 0 and self.round_epochs != 1:
            raise ValueError(f"round_epochs: {self.round_epochs} is read with rounds only; take it out, or set rounds: 1")
        if self.rounds and self.temperature is not None:
            raise ValueError(
                f"rounds: {self.rounds} holds the decoder as a part of each expert, which a decoder of cosines cannot be; "
                "set temperature: null, or rounds: 0"
            )
        if self.align != "lowrank" and self.rank != _RANK:
            raise ValueError(f"rank: {self.rank} is read by align: lowrank only; take it out, or set align: lowrank")
        return self

    @model_validator(mode="after")
    def _samples_need_sampling(self) -> Self:
        if self.classes != "sampled" and self.sampled_tags != _SAMPLED_TAGS:
            raise ValueError(
                f"sampled_tags: {self.sampled_tags} is read by classes: sampled only; take it out, or set classes: sampled"
            )
        return self

    def of_one_fit(self) -> Self:
        """The section without the rounds: what one fit needs to know, the same with them and without."""
        return self.model_copy(update={"rounds": 0, "round_epochs": 1})
