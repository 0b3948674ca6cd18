"""The systems' spaces: where an image lies in each, as it is stored or, under a shared decoder, as the alignment maps it there.

Both the evaluation and the probes read them, from inputs that are named alike: `mixture:embeddings`, `mixture:decoder-0000`.

Shape letters: N images of a system, M of the mixture, D features.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hardmoe.config import Json
from hardmoe.data.ids import order_of_distinct, sortable
from hardmoe.data.reading import labels_of
from hardmoe.data.schemas import EMBEDDINGS, FEATURES
from hardmoe.evaluation.bootstrap import BOOTSTRAP_SEED
from hardmoe.evaluation.config import EvaluationConfig
from hardmoe.evaluation.retrieval import Points, replicated_shares
from hardmoe.evaluation.stage import COMPARED
from hardmoe.hashing import hash_fractions
from hardmoe.models.shared_decoder import load_shared_decoder
from hardmoe.stage import UnitContext
from hardmoe.tables import ids_to_array, read_table, vectors_to_array

SystemRows = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64]]
"""Ids [N, 16], features float32 [N, D] and experts int64 [N]."""


def read_rows(context: UnitContext, system: str, path: str) -> SystemRows:
    """One shard of a system's features as they are stored; one network counts as expert 0."""
    column = context.stage.config["systems"][system]["column"]
    artifact = context.input(f"{system}:embeddings")
    schema = FEATURES if column == "feature" else EMBEDDINGS
    table = read_table(artifact.storage, path, schema)
    ids_N16 = ids_to_array(table.column("example_id"))
    experts_N = np.zeros(len(ids_N16), np.int64) if column == "feature" else table.column("expert").to_numpy().astype(np.int64)
    return ids_N16, vectors_to_array(table.column(column)).astype(np.float32), experts_N


def sampled_rows(context: UnitContext, system: str, path: str, fraction: float, purpose: str) -> SystemRows:
    """The same of the images whose hash for a purpose falls under the sample's share, which are those of every system."""
    ids_N16, features_ND, experts_N = read_rows(context, system, path)
    kept_N = hash_fractions(ids_N16, BOOTSTRAP_SEED, purpose) < fraction
    return ids_N16[kept_N], features_ND[kept_N], experts_N[kept_N]


def aligned(
    context: UnitContext, system: str, features_ND: NDArray[np.float32], experts_N: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Features in the system's space, float32 [N, Z]: the unified one under a shared decoder, else their own."""
    if not context.stage.config["systems"][system]["shared"]:
        return features_ND
    model = load_shared_decoder(context.input(f"{system}:decoder-0000"))
    with torch.inference_mode():
        unified_NZ: NDArray[np.float32] = model.align(torch.from_numpy(features_ND), torch.from_numpy(experts_N)).numpy()
    return unified_NZ


def retrieve(context: UnitContext) -> Json:
    """The neighbours of one system's test images, of a sample that is the same for all systems."""
    config = context.stage.section(EvaluationConfig, "evaluation")
    system, fraction = context.unit.arguments["system"], context.unit.arguments["fraction"]
    ids_M16, _, part_M = _sample_of(context, COMPARED, fraction)
    ids_N16, features_ND, experts_N = _sample_of(context, system, fraction)
    order_M = order_of_distinct(ids_M16)
    own_N = part_M[order_M][np.searchsorted(sortable(ids_M16[order_M]), sortable(ids_N16))]
    labels = labels_of(context.input("vocabulary"), ids_N16, split="test")
    points = Points.of(ids_N16, aligned(context, system, features_ND, experts_N), own_N, labels)
    return replicated_shares(points, config.bootstrap_replicates, BOOTSTRAP_SEED)


def joined(parts: Sequence[SystemRows]) -> SystemRows:
    """The rows of several shards, at least one, one after another."""
    ids, features, experts = (np.concatenate(each) for each in zip(*parts, strict=True))
    return ids, features, experts


def _sample_of(context: UnitContext, system: str, fraction: float) -> SystemRows:
    paths = context.input(f"{system}:embeddings").files("split=test/")
    return joined([sampled_rows(context, system, path, fraction, "retrieval") for path in paths])
