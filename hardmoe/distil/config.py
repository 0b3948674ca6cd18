"""The `distil` section of the recipe: one dense network that learns from the finished mixture."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from hardmoe.config import Config, operational
from hardmoe.training.config import TrainingConfig


class StudentConfig(Config):
    """A network that is trained on all images like the control that starts where it does, and follows the mixture besides.

    With `init: trunk` that control is the dense baseline: the same keys of `experts`, the same epochs, images and seed. With
    `init: random` it is a rival: the keys of `trunk`, for as many epochs as trunk and experts together. The two then differ by
    the teacher alone. It holds nothing of the trunk, whatever `experts.branch_at` and `experts.decoder` say.
    """

    backbone: str | None = Field(None, min_length=1)
    """As `trunk.backbone`; null for the trunk's own."""
    stem: Literal["auto", "small", "imagenet"] = "auto"
    """As `trunk.stem`; the trunk's own where `backbone` is null."""
    init: Literal["trunk", "random"] = "trunk"
    """Where it starts: `trunk`, from the trunk's weights; `random`, from fresh ones."""
    epochs: int | None = Field(None, ge=1)
    """How often it sees every image; null for as often as its control."""
    weight: float = Field(0.5, ge=0, le=1)
    """Share of the loss that is the distance to the mixture's outputs on the same images; the hashtags have the rest."""
    temperature: float = Field(1.0, gt=0, le=100)
    """What both outputs are divided by before they are compared; above 1 the mixture's second thoughts count more."""
    embedding_weight: float = Field(1.0, ge=0)
    """How much it counts besides that the network's features, through a linear map that is learnt with them, point where the
    mixture's embedding does in the unified space: times 1 - cosine."""
    memory_gib: float | None = operational(None, gt=0)
    """What experts may take together in the memory of the device while they answer, in GiB; null for no limit. Beyond it they are
    read again whenever a batch has images of theirs, so let it hold all of them if it can. None is read where nothing is
    augmented."""

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        if self.weight == 0 and self.embedding_weight == 0:
            raise ValueError(
                "weight: 0 and embedding_weight: 0 learn nothing from the mixture; set weight: 0.5, or take distil out"
            )
        if self.weight == 0 and self.temperature != 1:
            raise ValueError(f"temperature: {self.temperature:g} changes nothing without weight; set weight: 0.5, or take it out")
        if self.backbone is None and self.stem != "auto":
            raise ValueError(f"stem: {self.stem} describes distil.backbone, which is null; set it too, or take stem out")
        return self

    def check_fits(self, trunk: TrainingConfig, experts: TrainingConfig, network: Mapping[str, str], decoder_loss: str) -> None:
        """Hold the section against the rest of the recipe.

        Args:
            trunk: the section of that name.
            experts: the section of that name.
            network: the trunk's `backbone` and `stem`.
            decoder_loss: with which the mixture's decoder is fitted.

        Raises:
            ValueError: the network is another than it starts from, or the mixture's outputs mean something else than its own.
        """
        if self.init == "trunk" and self.backbone is not None:
            for key, theirs in network.items():
                if (own := getattr(self, key)) != theirs:
                    raise ValueError(
                        f"distil.init is 'trunk' but distil.{key} '{own}' is not the trunk's '{theirs}'; "
                        "set distil.init: random, or leave distil.backbone out"
                    )
        name, section = ("experts", experts) if self.init == "trunk" else ("trunk", trunk)
        if (section.loss == "sigmoid") != (decoder_loss == "sigmoid"):
            raise ValueError(
                f"distil trains with {name}.loss '{section.loss}' on the outputs of a decoder fitted with decoder.loss "
                f"'{decoder_loss}', which mean something else; set both to the same, or take distil out"
            )
        if self.init == "trunk" and section.loss == "sigmoid" != trunk.loss:
            raise ValueError(
                f"distil.init is 'trunk' and experts.loss 'sigmoid', but the trunk is trained with '{trunk.loss}', whose outputs "
                "are no log odds; set trunk.loss: sigmoid, or distil.init: random"
            )
