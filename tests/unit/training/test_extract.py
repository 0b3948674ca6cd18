"""Features of a shard: those of a plain loop, whatever the number of threads."""

import io
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from hardmoe.data.images import load_square
from hardmoe.data.schemas import EXAMPLES
from hardmoe.errors import DataError
from hardmoe.models.backbones import Backbone, build_backbone, normalise_images
from hardmoe.stage import InputArtifact, Resources, Stage, UnitContext
from hardmoe.storage import LocalStorage, Storage
from hardmoe.tables import build_table, write_table
from hardmoe.training import extract
from hardmoe.training.extract import extract_shard

CPU = torch.device("cpu")
COUNT, SIZE = 23, 16


@dataclass
class OneShard:
    """An artifact of one file."""

    storage: Storage
    payload: dict[str, Any] = field(default_factory=dict)

    def path(self, relative: str) -> str:
        return relative

    def files(self, prefix: str = "", suffix: str = "") -> list[str]:
        return ["shard.parquet"]

    def read(self, relative: str) -> bytes:
        return self.storage.read_bytes(relative)


@dataclass
class Unit:
    """As much of a unit's context as the extraction sees."""

    stage: Stage


def unit(num_cpus: int) -> UnitContext:
    return cast(UnitContext, Unit(Stage("features", "features", 1, {}, "", resources=Resources(num_cpus))))


def encoded(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (70, 50 + 5 * number, 3), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, format="JPEG", quality=90)
    return target.getvalue()


def shard(directory: Path, images: list[bytes]) -> InputArtifact:
    ids = [bytes([number]) * 16 for number in range(len(images))]
    table = build_table(EXAMPLES, {"example_id": ids, "image": images, "tags": [["a"]] * len(images)})
    storage = LocalStorage(directory)
    write_table(storage.open_output("shard.parquet"), table, row_group_size=7)
    return OneShard(storage)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "inference_batch_size", lambda size, device: 4)


@pytest.fixture
def backbone() -> Backbone:
    torch.set_num_threads(1)
    return build_backbone("quicknet_w4", image_size=SIZE, seed=0)


def features(examples: InputArtifact, backbone: Backbone, num_cpus: int, reduced: bool = False) -> NDArray[np.float16]:
    ids_N16, features_ND = extract_shard(unit(num_cpus), backbone, SIZE, examples, "shard.parquet", CPU, reduced)
    assert ids_N16.dtype == np.uint8 and features_ND.dtype == np.float16
    np.testing.assert_array_equal(ids_N16[:, 0], np.arange(len(features_ND)))
    return features_ND


@pytest.mark.parametrize("reduced", [False, True])
def test_features_of_a_shard_are_those_of_a_plain_loop(tmp_path: Path, backbone: Backbone, reduced: bool) -> None:
    images = [encoded(number) for number in range(COUNT)]
    pixels = torch.from_numpy(np.stack([load_square(data, SIZE, 10**6, reduced=reduced) for data in images]))
    backbone.eval()
    with torch.inference_mode():
        expected = backbone(normalise_images(pixels)).numpy()
    backbone.train()
    np.testing.assert_allclose(features(shard(tmp_path, images), backbone, 1, reduced), expected, rtol=2e-3, atol=1e-3)
    assert backbone.training


def test_features_depend_on_reduced_decoding_and_on_no_number_of_threads(tmp_path: Path) -> None:
    class Pixels(torch.nn.Module):
        """A network that rounds nothing: a real one differs in its last bits with the number of its threads."""

        def forward(self, images_B3SS: torch.Tensor) -> torch.Tensor:
            return images_B3SS[:, :, ::5, ::5].flatten(1)

    examples = shard(tmp_path, [encoded(number) for number in range(COUNT)])
    network = Backbone(Pixels(), 48)
    one = features(examples, network, 1)
    for num_cpus in (2, 3):
        np.testing.assert_array_equal(features(examples, network, num_cpus), one)
    assert not np.array_equal(features(examples, network, 1, reduced=True), one)


def test_empty_shard_has_no_features(tmp_path: Path, backbone: Backbone) -> None:
    assert features(shard(tmp_path, []), backbone, 1).shape == (0, backbone.num_features)


@pytest.mark.parametrize("num_cpus", [1, 2])
def test_damaged_image_stops_the_shard_and_leaves_no_thread(tmp_path: Path, backbone: Backbone, num_cpus: int) -> None:
    images = [encoded(number) for number in range(COUNT)]
    images[9] = images[9][:200]
    before = set(threading.enumerate())
    with pytest.raises(DataError, match=r"the image of example (09){16} cannot be decoded"):
        features(shard(tmp_path, images), backbone, num_cpus)
    assert set(threading.enumerate()) <= before


def test_failing_network_leaves_no_thread(tmp_path: Path) -> None:
    class Failing(torch.nn.Module):
        def forward(self, images_B3SS: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("out of memory")

    examples = shard(tmp_path, [encoded(number) for number in range(COUNT)])
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="out of memory"):
        features(examples, Backbone(Failing(), 3), 2)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_features_that_are_not_finite_in_float16_are_refused(tmp_path: Path, value: float) -> None:
    class Diverged(torch.nn.Module):
        def forward(self, images_B3SS: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images_B3SS), 3), value)

    with pytest.raises(DataError, match=r"3 of 3 features of shard\.parquet are not finite"):
        features(shard(tmp_path, [encoded(number) for number in range(3)]), Backbone(Diverged(), 3), 1)
