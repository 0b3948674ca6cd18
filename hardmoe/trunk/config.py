"""The `trunk` section of the recipe."""

from typing import Literal

from pydantic import Field

from hardmoe.config import added, operational
from hardmoe.models.moe.config import MoeConfig
from hardmoe.training.config import Gpus, TrainingConfig


class TrunkConfig(TrainingConfig):
    """The trunk: trained on the hashtags of all training examples."""

    backbone: str = "resnet18"
    """A torchvision model, `resnet20` to `resnet110`, `quicknet_w<width>`, `timm/<model>` (extra `timm`), or
    `package.module:factory` for your own."""
    stem: Literal["auto", "small", "imagenet"] = "auto"
    """First layers of torchvision's ResNets: `small` keeps the resolution of small images; `auto` is `small` up to 64 px."""
    moe: MoeConfig = added(MoeConfig())
    """Layers of experts, of backbones that have some, such as `moe_resnet18` and `vmoe_s32`."""
    image_size: int = Field(32, ge=8, le=1024)
    """Side in pixels to which every image is resized (shorter side, then centre crop), for trunk and experts alike."""
    decode: Literal["full", "reduced"] = "full"
    """`reduced` lets the JPEG decoder scale down by 2, 4 or 8 while it decodes, where the image stays at least twice as large
    as `image_size`: faster, and other pixels by a little, in training and in use alike."""
    gpus: Gpus = operational("auto")
    """GPUs for the training; `auto` takes one where there are any."""
