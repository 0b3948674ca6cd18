"""The `experts` section of the recipe."""

from typing import Literal, Self

from pydantic import Field, model_validator

from hardmoe.config import Json, added, operational
from hardmoe.models.moe.config import MoeConfig
from hardmoe.training.config import DistillConfig, Gpus, TrainingConfig

_RUN = "run:"


class ExpertsConfig(TrainingConfig):
    """Every expert, and the dense baseline, is trained like this; an expert sees its part `epochs` times, or as `budget` says."""

    backbone: str | None = None
    """As `trunk.backbone`; null for the trunk's own."""
    stem: Literal["auto", "small", "imagenet"] = "auto"
    """As `trunk.stem`; the trunk's own where `backbone` is null."""
    moe: MoeConfig = added(MoeConfig())
    """As `trunk.moe`; the trunk's own where `backbone` is null."""
    init: str = "trunk"
    """Where an expert starts: `trunk`, from the trunk's weights; `random`, from fresh ones; the path or URI of a file of
    weights, `….safetensors`, of the same network, which bears identity by its content; or `run:ROOT`, from the one of that run's
    experts which would get most of its images."""
    learning_rate: float = Field(0.05, gt=0)
    """Peak learning rate for a batch of 256; half the trunk's default, since the experts start from a trained network."""
    budget: Literal["epochs", "examples"] = added("epochs")
    """What experts of unequal parts have alike: `epochs`, so that one with a larger part trains longer; or `examples`, so that
    each is shown `epochs` times the mean part and one with a smaller part sees each image more often. All experts together, and
    the dense baseline, are shown `epochs` times all images either way, unless `early_stop` ends some of them sooner."""
    branch_at: str = added("image", min_length=1)
    """Where an expert leaves the trunk: at the `image`, as a whole network of its own; or behind a stage of a residual network,
    `stem`, `layer1`, `layer2` and so on, up to which it stays the trunk. An image then costs the shared stages once, for gate and
    expert together. Needs `init: trunk`."""
    decoder: Literal["own", "fixed"] = added("own")
    """What an expert decodes with while it trains: a decoder of its own, which moves with it; or the trunk's, held `fixed`, so
    that the features of all experts mean the same by construction. `fixed` needs features as wide as the trunk's."""
    distill: DistillConfig = added(DistillConfig())
    """Learning from the trunk's outputs as well."""
    gpus: Gpus = operational("auto")
    """GPUs per expert; a fraction packs several onto one; `auto` takes one where there are any, else none."""

    @property
    def init_path(self) -> str | None:
        """The file of weights that experts start from; None if it is none."""
        return None if self.init in ("trunk", "random") or self.init_root is not None else self.init

    @property
    def init_root(self) -> str | None:
        """The run from whose experts they start; None if it is none."""
        return self.init.removeprefix(_RUN) if self.init.startswith(_RUN) else None

    def identity(self) -> dict[str, Json]:
        """As every section's, but for the place of a file or a run, whose content's digest the stage adds."""
        kind = {"init": "file"} if self.init_path is not None else {"init": "run"} if self.init_root is not None else {}
        return super().identity() | kind

    def operational_values(self) -> dict[str, Json]:
        """As every section's, and the place of a file or a run."""
        return super().operational_values() | ({} if self.init in ("trunk", "random") else {"init": self.init})

    @model_validator(mode="after")
    def _starts_somewhere(self) -> Self:
        if self.init_path is not None and not self.init_path.partition("?")[0].endswith(".safetensors"):
            raise ValueError(
                f"init: '{self.init}' is neither trunk nor random nor run:ROOT nor a file of weights; correct the word, or give "
                "a file that ends in .safetensors"
            )
        if self.init_root == "":
            raise ValueError("init: 'run:' names no run; give its root, as in run:runs/january")
        return self

    @model_validator(mode="after")
    def _has_a_backbone_of_its_own_to_describe(self) -> Self:
        if self.backbone is None and self.moe != MoeConfig():
            raise ValueError(
                "moe describes experts.backbone, which is null; set it too, or describe the trunk's network in trunk.moe"
            )
        return self

    @model_validator(mode="after")
    def _branches_off_the_trunk(self) -> Self:
        if self.branch_at != "image" and (self.init != "trunk" or self.backbone is not None):
            other = f"init: {self.init}" if self.init != "trunk" else f"backbone: {self.backbone}"
            raise ValueError(
                f"branch_at: {self.branch_at} keeps the trunk's first stages, which {other} does not start with; "
                "set init: trunk and backbone: null, or branch_at: image"
            )
        return self

    @property
    def shared_stage(self) -> str | None:
        """The stage up to which experts are the trunk; None if they have nothing in common."""
        return None if self.branch_at == "image" else self.branch_at

    @model_validator(mode="after")
    def _budget_counts_each_example_once(self) -> Self:
        if self.budget == "examples" and self.repeat_threshold is not None:
            raise ValueError(
                "budget: examples gives every expert as many images, where repeat_threshold shows those of rare hashtags more "
                "often; set repeat_threshold: null or budget: epochs"
            )
        return self
