"""From encoded images to features: one shard read, decoded, put through a network, as float16.

Shared by the trunk's features and the experts' embeddings. Batches have one fixed size, whatever the shard's, because a
matrix product's last bits depend on it. On a GPU nothing waits for a batch's features but the end of the shard.

Shape letters: N examples, B batch, S side in pixels, D features.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hardmoe.data.reading import read_examples
from hardmoe.errors import DataError
from hardmoe.models.backbones import Backbone
from hardmoe.stage import InputArtifact, UnitContext
from hardmoe.tables import ids_to_array
from hardmoe.training.determinism import deterministic
from hardmoe.training.inference import predict_batches
from hardmoe.training.staging import EncodedImage, Staging, inference_batch_size, staged_batches

COLUMNS = ("example_id", "image")
ROWS_AT_ONCE = 64
"""A divisor of the rows of most row groups of images, so that none is put together from two."""


def extract_shard(
    context: UnitContext,
    backbone: Backbone,
    image_size: int,
    examples: InputArtifact,
    path: str,
    device: torch.device,
    reduced: bool,
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Ids and features of one shard, in its order.

    Args:
        context: of the unit; it decodes with as many threads as the unit has CPUs.
        backbone: in evaluation mode or not; it is moved to `device`.
        image_size: S.
        examples: the dataset or the partition.
        path: the shard's path in its storage.
        device: where the network runs.
        reduced: whether JPEGs may be scaled down while they are decoded (`trunk.decode`).

    Returns:
        uint8 [N, 16] and float16 [N, D].

    Raises:
        DataError: an image cannot be decoded, or a feature is not finite in float16: the network diverged.
    """
    tables = read_examples(examples, [path], columns=COLUMNS, rows=ROWS_AT_ONCE)
    return extract_tables(context, backbone, image_size, tables, path, device, reduced)


def extract_tables(
    context: UnitContext,
    backbone: Backbone,
    image_size: int,
    tables: Iterable[Any],
    path: str,
    device: torch.device,
    reduced: bool,
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """The same of tables with the columns `COLUMNS`, some rows at a time; the path is only told where something is wrong."""
    ids: list[NDArray[np.uint8]] = []

    def images() -> Iterator[EncodedImage]:
        for table in tables:
            ids.append(ids_to_array(table.column("example_id")))
            for row, data in zip(ids[-1], table.column("image").to_pylist(), strict=True):
                yield EncodedImage(row.tobytes(), data)

    features: list[Tensor] = []
    num_threads = context.stage.resources.num_cpus
    staging = Staging(image_size, inference_batch_size(image_size, device), num_threads, device, reduced)
    with deterministic(num_threads, device), closing(staged_batches(images(), staging)) as batches:
        for features_BD in predict_batches(backbone.to(device), batches):
            features.append(_to_host(features_BD.to(torch.float16)))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    features_ND = torch.cat(features).numpy() if features else np.zeros((0, backbone.num_features), np.float16)
    if bad := int((~np.isfinite(features_ND)).any(axis=1).sum()):
        raise DataError(
            f"{bad} of {len(features_ND)} features of {path} are not finite in float16: the network diverged; "
            "train it with a lower learning_rate"
        )
    return np.concatenate(ids) if ids else np.zeros((0, 16), np.uint8), features_ND


def _to_host(features_BD: Tensor) -> Tensor:
    """Into the host's memory; from a GPU without waiting, so the result may be read only after the device was waited for."""
    if features_BD.device.type != "cuda":
        return features_BD
    host_BD = torch.empty(features_BD.shape, dtype=features_BD.dtype, pin_memory=True)
    return host_BD.copy_(features_BD, non_blocking=True)
