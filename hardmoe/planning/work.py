"""How much there is to do: of every stage the rows it goes through, its phases, what it reads and stores, its memory.

Everything is a function of the recipe and of a few numbers about the collection; no image is looked at.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hardmoe.artifacts.names import DENSE
from hardmoe.data.config import AUTO_COPY_BYTES
from hardmoe.recipe import Recipe
from hardmoe.stage import Stage

_ROW_BYTES = 60
"""Of a row without its image: identity, hashtags, distances."""
_HALF = 2
_FLOAT = 4
_COPIES = 4
"""A network in training: weights, gradients, momentum, the checkpoint being written."""
_PROCESS_BYTES = 1.2 * 2**30
"""A worker with torch imported."""
_KEPT_CHECKPOINTS = 3


@dataclass(frozen=True)
class Network:
    """What the plan must know of a backbone."""

    flops: float
    """Of one image, forward."""
    parameters: float
    features: int


@dataclass(frozen=True)
class Shape:
    """How large everything is."""

    images: int
    experts: int
    shard_rows: int
    train: int
    held_out: int
    """Validation and test together."""
    test: int
    clusters: int

    @classmethod
    def of_recipe(cls, recipe: Recipe, images: int) -> "Shape":
        """By the recipe's fractions."""
        test = round(images * recipe.dataset.test_fraction)
        held_out = test + round(images * recipe.dataset.validation_fraction)
        experts = recipe.partition.experts
        clusters = recipe.partition.num_clusters if recipe.partition.is_fitted else experts
        return cls(images, experts, recipe.dataset.shard_rows, images - held_out, held_out, test, clusters)

    @property
    def shards(self) -> int:
        """Files of the dataset."""
        return max(1, math.ceil(self.images / self.shard_rows))


def rows_of(stage: Stage, recipe: Recipe, shape: Shape) -> float:
    """Rows that all units of a stage go through together; every epoch counts, and for the router every centroid."""
    kind = stage.kind
    if kind == "trunk":
        return float(shape.train * recipe.trunk.epochs)
    if kind == "expert":
        share = shape.train if stage.name == DENSE else shape.train / shape.experts
        return share * recipe.experts.epochs
    if kind == "distilled":
        return float(shape.train * stage.config["training"]["epochs"])
    if kind == "router":
        return float(shape.train * shape.clusters)
    if kind == "decoder":
        return float(shape.train * recipe.decoder.epochs)
    if kind in ("dataset", "vocabulary", "features", "partition", "embeddings"):
        return float(shape.images)
    if kind in ("nearest", "nearest-embeddings"):
        passes = shape.experts if stage.name.startswith("all_experts") else recipe.evaluation.top_k or 1
        return float(shape.held_out * (passes if kind == "nearest-embeddings" else 1))
    return float(max(1, shape.test))


def phases_of(stage: Stage, shape: Shape) -> Sequence[tuple[str, int, float]]:
    """Name, units and share of the stage's work of each phase."""
    kind, shards = stage.kind, shape.shards
    held_out = max(1, math.ceil(shape.held_out / shape.shard_rows))
    if kind == "dataset":
        return [("ingest", shards, 0.7), ("merge", min(shards, 256), 0.05), ("write", shards, 0.25)]
    if kind == "vocabulary":
        return [("count", shards, 0.4), ("choose", 1, 0.01), ("label", shards, 0.59)]
    if kind == "router":
        return [
            ("sample", shards, 0.1),
            ("start", 8, 0.1),
            ("climb", 1, 0.02),
            ("pass-1", shards, 0.39),
            ("pass-2", shards, 0.39),
        ]
    if kind == "partition":
        return [("assign", shards, 0.5), ("merge", max(shape.experts, shards // 8), 0.5)]
    if kind in ("features", "embeddings"):
        return [("extract", shards, 1.0)]
    if kind in ("nearest", "nearest-embeddings"):
        return [("route", held_out, 1.0)]
    if kind == "evaluation":
        return [("score", max(1, math.ceil(shape.test / shape.shard_rows)), 1.0)]
    return [("do", 1, 1.0)]


@dataclass(frozen=True)
class Volume:
    """Bytes of a stage."""

    read: float
    stored: float
    memory: float
    """Of one unit at its peak."""


def volume_of(stage: Stage, recipe: Recipe, shape: Shape, network: Network, image_bytes: float) -> Volume:
    """What a stage reads, keeps in the root and holds in memory."""
    kind, images = stage.kind, shape.images
    pixels = images * (image_bytes + _ROW_BYTES)
    features = images * (network.features * _HALF + _ROW_BYTES)
    weights = network.parameters * _FLOAT
    shard = shape.shard_rows * (image_bytes + _ROW_BYTES)
    copied = recipe.dataset.store == "copy" or (recipe.dataset.store == "auto" and images * image_bytes <= AUTO_COPY_BYTES)
    size, batch = recipe.trunk.image_size, recipe.experts.batch_size
    activations = batch * (3 * size * size + 60.0 * network.flops / 1e9 * 1e5) * _FLOAT
    if kind == "dataset":
        return Volume(pixels * (2 if copied else 1), pixels if copied else images * 2.0 * _ROW_BYTES, _PROCESS_BYTES + shard)
    if kind == "vocabulary":
        return Volume(2.0 * images * _ROW_BYTES, float(images * _ROW_BYTES), _PROCESS_BYTES)
    if kind in ("trunk", "expert", "distilled"):
        share = rows_of(stage, recipe, shape) * (image_bytes + _ROW_BYTES)
        return Volume(share, weights * (1 + _COPIES * _KEPT_CHECKPOINTS), _PROCESS_BYTES + _COPIES * weights + activations)
    if kind == "features":
        return Volume(pixels, features, _PROCESS_BYTES + weights + shard)
    if kind == "router":
        sample = min(shape.train, recipe.partition.sample_size) * network.features * _FLOAT
        return Volume(3.0 * features, shape.clusters * network.features * _FLOAT, _PROCESS_BYTES + 2 * sample)
    if kind == "partition":
        return Volume(2 * pixels + features, pixels, _PROCESS_BYTES + 2 * shard)
    if kind in ("embeddings", "nearest-embeddings"):
        rows = rows_of(stage, recipe, shape)
        return Volume(rows * (image_bytes + _ROW_BYTES), rows * (network.features * _HALF + _ROW_BYTES), _PROCESS_BYTES + weights)
    if kind == "decoder":
        held = min(shape.train * network.features * _HALF, recipe.decoder.memory_gib * 2**30)
        tags = recipe.hashtags.max_tags * network.features * _FLOAT
        return Volume(features * recipe.decoder.epochs, float(tags), _PROCESS_BYTES + held + 4 * tags)
    return Volume(shape.test * (network.features * _HALF + _ROW_BYTES), 1e6, _PROCESS_BYTES)
