"""Features of a stream: the same whatever pieces it comes in."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hardmoe.models.backbones import Backbone, build_backbone, normalise_images
from hardmoe.training.inference import batch_sizes, predict_features

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.set_num_threads(1)
    return build_backbone("quicknet_w4", image_size=8, seed=0)


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (23, 3, 8, 8), dtype=np.uint8)


def predict(backbone: Backbone, pieces: list[NDArray[np.uint8]], batch_size: int) -> NDArray[np.float32]:
    return torch.cat(list(predict_features(backbone, pieces, batch_size, CPU))).numpy()


def test_predict_features_equals_a_plain_forward_pass_in_evaluation_mode(backbone: Backbone, images: NDArray[np.uint8]) -> None:
    backbone.eval()
    with torch.inference_mode():
        expected = backbone(normalise_images(torch.from_numpy(images))).numpy()
    backbone.train()
    np.testing.assert_allclose(predict(backbone, [images], 5), expected, rtol=1e-4, atol=1e-5)
    assert backbone.training
    assert backbone.network.stem[1].num_batches_tracked == 0


@pytest.mark.parametrize("bounds", [[], [1, 2, 3], [10], [5, 5, 20]])
def test_predict_features_has_the_same_bits_however_the_stream_is_cut(
    backbone: Backbone, images: NDArray[np.uint8], bounds: list[int]
) -> None:
    assert np.array_equal(predict(backbone, np.split(images, bounds), 8), predict(backbone, [images], 8))


def test_features_of_an_image_have_the_same_bits_alone_and_among_others(backbone: Backbone, images: NDArray[np.uint8]) -> None:
    alone = np.concatenate([predict(backbone, [images[row : row + 1]], 8) for row in range(10)])
    assert np.array_equal(alone, predict(backbone, [images], 8)[:10])


def test_convolutions_compute_in_full_float32_and_the_switch_is_put_back(images: NDArray[np.uint8]) -> None:
    """torch lets convolutions on a GPU use TF32 by default: features there had ten bits, those of a CPU twenty-three."""
    seen: list[bool] = []

    class Watching(torch.nn.Module):
        def forward(self, images_B3SS: torch.Tensor) -> torch.Tensor:
            seen.append(torch.backends.cudnn.allow_tf32)
            return images_B3SS.mean(dim=(2, 3))

    before = torch.backends.cudnn.allow_tf32
    for _ in predict_features(Backbone(Watching(), 3), [images], 8, CPU):
        assert torch.backends.cudnn.allow_tf32 is before
    assert seen == [False] * 3


def test_predict_features_of_nothing_is_nothing(backbone: Backbone) -> None:
    assert list(predict_features(backbone, [], 8, CPU)) == []


@pytest.mark.parametrize(
    ("num_images", "sizes"),
    [
        (0, []),
        (1, [1]),
        (3, [4]),
        (17, [32]),
        (33, [32, 1]),
        (130, [128, 2]),
        (188, [128, 64]),
        (239, [128, 64, 32, 16]),
        (240, [256]),
        (700, [256, 256, 128, 64]),
    ],
)
def test_batches_hold_all_images_and_few_blanks(num_images: int, sizes: list[int]) -> None:
    assert batch_sizes(num_images, 256) == sizes
    assert num_images <= sum(sizes) <= num_images + 16
