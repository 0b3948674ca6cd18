"""The recipe's `moe` section, of every network whose backbone has layers of experts.

What is null is the backbone's own (see `networks/`), which is what its paper did. Rejected: names such as
`vmoe_b16_e32_k2_last2`, which say the same in an order that nobody remembers.
"""

from typing import Literal, Self

from pydantic import model_validator

from hardmoe.config import Config, added
from hardmoe.errors import RecipeError

RouterName = Literal["linear", "cosine", "distance", "expert_choice", "soft", "pooled", "convolved"]
ConstraintName = Literal["none", "importance", "importance_load", "gshard", "kl", "relative", "mean"]

HARD: tuple[ConstraintName, ...] = ("relative", "mean")
"""Constraints under which experts sit out, from a threshold on; ResNets and heads of detectors have them."""


def has_experts(backbone: str) -> bool:
    """Whether a backbone of this name has layers of experts."""
    return backbone.startswith(("moe_", "vmoe_"))


class MoeConfig(Config):
    """Where the layers of experts are, how they route, and what keeps their use even."""

    placement: str | None = added(None, min_length=1)
    """Which blocks have experts: of transformers `every2` or `last2` (any number), of ConvNeXts `every2`, `stage`, `last2` or
    `last3`, of ResNets `stage1` to `stage4` (a whole stage, beside a shortcut), `plain1` to `plain4` (without one), `conv0` to
    `conv4`."""
    num_experts: int | None = added(None, ge=1, le=4096)
    """Experts of a layer."""
    k: int | None = added(None, ge=1)
    """Experts of each item: of a patch, a pixel of a map, or an image."""
    mlp_ratio: float | None = added(None, gt=0, le=16)
    """Hidden width of an expert, over the layer's width; ResNets' experts have widths of their own."""
    capacity_factor: float | None = added(None, ge=0)
    """Slots of an expert in training: 1 where an even routing fills them all; 0 for no limit."""
    inference_capacity_factor: float | None = added(None, ge=0)
    """The same in use; with 0, the backbones' own, an image's features do not depend on the images beside it."""
    priority: bool | None = added(None)
    """Batch Priority Routing: items of which the router is surest are given slots first."""
    group_images: int = added(8, ge=1)
    """Images whose patches or pixels are routed together, and share the slots."""
    router: RouterName | None = added(None)
    """`linear`, `cosine` or `distance` scores of each item, `expert_choice` (experts take items), `soft` (all experts, mixed);
    of ResNets, which decide once an image, `pooled` or `convolved` scores, or `soft`."""
    noise: float | None = added(None, ge=0)
    """In training: deviation of what is added to the scores, over the number of experts; of ResNets 1 for learned noise, 0 for
    none."""
    constraint: ConstraintName | None = added(None)
    """What keeps the experts' use even: an auxiliary loss (`importance`, `importance_load`, `gshard`, of ResNets `importance`
    or `kl`), or, of ResNets, a hard constraint (`relative` or `mean` importance), or `none`."""
    loss_weight: float | None = added(None, ge=0)
    """Weight of each auxiliary loss; they are added to the loss on the hashtags."""
    threshold: float | None = added(None, ge=0)
    """Of the constraints `relative` and `mean`: from where on an expert sits out."""
    dropout: float | None = added(None, ge=0, lt=1)
    """Share of the values in and behind an expert's hidden layer that are dropped in training."""
    dispatch: Literal["grouped", "index", "einsum"] = added("grouped")
    """How items get to their experts; the same numbers up to rounding. `grouped` computes only what is kept."""

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k is not None and self.num_experts is not None and self.k > self.num_experts:
            raise ValueError(f"k: {self.k} is more than there are experts; set num_experts: {self.k} or more, or k lower")
        return self

    @model_validator(mode="after")
    def _threshold_is_of_a_hard_constraint(self) -> Self:
        if self.threshold is None:
            return self
        if self.router == "soft":
            raise ValueError(
                f"threshold: {self.threshold:g} means nothing to router: soft, which has no constraint; leave it out"
            )
        if self.constraint is not None and self.constraint not in HARD:
            raise ValueError(
                f"threshold: {self.threshold:g} means nothing to constraint: {self.constraint}; leave it out, or set constraint: "
                f"{' or '.join(HARD)}, under which experts sit out"
            )
        return self

    def over(self, defaults: "MoeConfig") -> "MoeConfig":
        """These fields, and of those that are null the defaults'.

        Raises:
            RecipeError: a threshold is given, and the defaults' constraint knows none.
        """
        given = {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}
        whole = defaults.model_copy(update=given)
        if self.threshold is not None and whole.constraint not in HARD:
            raise RecipeError(
                f"moe.threshold: {self.threshold:g} means nothing to this backbone, whose constraint is {whole.constraint}; "
                "leave it out, as only constraints of ResNets (relative, mean) know one"
            )
        return whole
