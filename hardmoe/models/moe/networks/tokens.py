"""The layer of experts of networks that route patches or pixels: MLPs behind a router of single items."""

from torch import nn

from hardmoe.errors import RecipeError
from hardmoe.models.moe.config import MoeConfig
from hardmoe.models.moe.experts.mlp import MlpExperts
from hardmoe.models.moe.layer import MoeLayer, Plan
from hardmoe.models.moe.routers.base import Router
from hardmoe.models.moe.routers.expert_choice import ExpertChoiceRouter
from hardmoe.models.moe.routers.noisy_topk import NoisyTopKRouter
from hardmoe.models.moe.routers.soft import SoftRouter
from hardmoe.models.moe.scores.cosine import CosineScores
from hardmoe.models.moe.scores.distance import DistanceScores
from hardmoe.models.moe.scores.linear import LinearScores

_LOSSES = {"none": (), "importance": ("importance",), "importance_load": ("importance", "load"), "gshard": ("gshard",)}
_SCORES = {"linear": LinearScores, "cosine": CosineScores, "distance": DistanceScores}

DEFAULTS = MoeConfig(
    placement="last2",
    num_experts=8,
    k=2,
    mlp_ratio=4.0,
    capacity_factor=1.05,
    inference_capacity_factor=0.0,
    priority=False,
    router="linear",
    noise=1.0,
    constraint="importance_load",
    loss_weight=0.005,
    dropout=0.0,
)


def token_layer(first: nn.Linear, second: nn.Linear, config: MoeConfig, kind: type[MoeLayer] = MoeLayer) -> MoeLayer:
    """A layer whose experts begin as a dense MLP.

    Args:
        first: the MLP's first layer.
        second: its second one.
        config: nothing of it null but what such layers have not.
        kind: of layer.

    Raises:
        RecipeError: such layers have no such router or constraint.
    """
    num_experts, k = config.num_experts or 1, config.k or 1
    check_k(k, num_experts)
    router = _router(config, first.in_features, num_experts)
    experts = MlpExperts(first, second, num_experts, config.dropout or 0.0)
    weights = dict.fromkeys(_losses(config), config.loss_weight or 0.0)
    return kind(router, experts, plan_of(config, config.group_images), weights)


def plan_of(config: MoeConfig, group_images: int) -> Plan:
    """The plan of a layer, of a config without nulls."""
    k = config.num_experts if config.router == "soft" else config.k
    in_use = config.inference_capacity_factor or 0.0
    if config.router == "expert_choice" and in_use == 0:
        # Without a limit every expert would take everything.
        in_use = config.capacity_factor or 0.0
    return Plan(
        k or 1,
        config.capacity_factor or 0.0,
        in_use,
        bool(config.priority),
        group_images,
        config.dispatch,
    )


def check_k(k: int, num_experts: int) -> None:
    """Whether there are so many experts.

    Raises:
        RecipeError: there are not.
    """
    if k > num_experts:
        raise RecipeError(f"moe.k: {k} is more than there are experts ({num_experts}); set moe.k to {num_experts} or less")


def _losses(config: MoeConfig) -> tuple[str, ...]:
    if config.constraint not in _LOSSES:
        raise RecipeError(
            f"moe.constraint: {config.constraint} is one for a choice per image, as moe_resnet18 makes; of networks "
            f"that route patches "
            f"or pixels it is one of {', '.join(_LOSSES)}"
        )
    return _LOSSES[config.constraint]


def _router(config: MoeConfig, dim: int, num_experts: int) -> Router:
    if config.router == "expert_choice":
        return ExpertChoiceRouter(LinearScores(dim, num_experts), num_experts)
    if config.router == "soft":
        return SoftRouter(LinearScores(dim, num_experts), num_experts)
    if config.router not in _SCORES:
        names = ", ".join([*_SCORES, "expert_choice", "soft"])
        raise RecipeError(
            f"moe.router: {config.router} decides once an image; of networks that route patches or pixels it is {names}"
        )
    return NoisyTopKRouter(_SCORES[config.router](dim, num_experts), num_experts, config.noise or 0.0)
