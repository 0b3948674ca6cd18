"""From encoded images to features: one shard read, decoded, put through a network, as float16.

Shared by the trunk's features and the experts' embeddings. Batches have one fixed size, whatever the shard's, because a
matrix product's last bits depend on it.

Shape letters: N examples, B batch, S side in pixels, D features.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from hardmoe.data.config import PILLOW_MAX_PIXELS
from hardmoe.data.images import decode, resize_square
from hardmoe.data.reading import read_examples
from hardmoe.errors import DataError
from hardmoe.models.backbones import Backbone
from hardmoe.stage import InputArtifact, UnitContext
from hardmoe.tables import ids_to_array
from hardmoe.training.determinism import deterministic
from hardmoe.training.inference import predict_features

BATCH_SIZE = 256


def extract_shard(
    context: UnitContext, backbone: Backbone, image_size: int, examples: InputArtifact, path: str, device: torch.device
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Ids uint8 [N, 16] and features float16 [N, D] of one shard, in its order.

    Raises:
        DataError: a feature is not finite in float16: the network diverged.
    """
    ids: list[NDArray[np.uint8]] = []

    def images() -> Iterator[NDArray[np.uint8]]:
        for table in read_examples(examples, [path], columns=["example_id", "image"], rows=BATCH_SIZE):
            ids.append(ids_to_array(table.column("example_id")))
            # Every image was decoded once by the dataset stage, so a failure here is damage on disk and may be loud.
            encoded = table.column("image").to_pylist()
            yield np.stack([resize_square(decode(data, PILLOW_MAX_PIXELS), image_size) for data in encoded])

    features: list[NDArray[np.float16]] = []
    with deterministic(context.stage.resources.num_cpus, device):
        for features_BD in predict_features(backbone.to(device), images(), BATCH_SIZE, device):
            features.append(features_BD.cpu().numpy().astype(np.float16))
    features_ND = np.concatenate(features) if features else np.zeros((0, backbone.num_features), np.float16)
    if bad := int((~np.isfinite(features_ND)).any(axis=1).sum()):
        raise DataError(
            f"{bad} of {len(features_ND)} features of {path} are not finite in float16: the network diverged; "
            "train it with a lower learning_rate"
        )
    return np.concatenate(ids), features_ND
