"""`trunk.decode: reduced`: one setting for the trunk, the experts, the control and the images of a request."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import run_here, write_recipe

from hardmoe.data.images import load_square
from hardmoe.mixture import Mixture

NETWORKS = ("trunk", "baselines/dense", "experts/expert-0000", "experts/expert-0001")
SIZE = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on JPEGs of coarse noise that is eight times as large as the network wants it."""
    directory = tmp_path_factory.mktemp("reduced")
    chance = np.random.default_rng(0)
    images, tags = [], []
    for index in range(120):
        buffer = io.BytesIO()
        coarse = chance.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        coarse[..., index % 3] //= 4
        Image.fromarray(coarse).resize((128, 128), Image.Resampling.BILINEAR).save(buffer, format="JPEG", quality=95)
        images.append(buffer.getvalue())
        tags.append([["red", "green", "blue"][index % 3]])
    (directory / "photos").mkdir()
    pq.write_table(pa.table({"image": images, "hashtags": tags}), directory / "photos" / "0.parquet")
    write_recipe(
        directory,
        dataset={"near_duplicates": "none", "test_fraction": 0.3},
        trunk={"decode": "reduced", "image_size": SIZE},
        partition={"experts": 2},
        evaluation={"map_replicates": 2},
    )
    run_here(directory, "evaluate")
    return directory / "runs" / "small"


def test_every_network_of_a_run_is_shown_reduced_images(root: Path) -> None:
    for name in NETWORKS:
        payload = json.loads((root / name / "artifact.json").read_text())["payload"]
        assert payload["architecture"]["decode"] == "reduced", name


def test_mixture_decodes_as_the_run_did(root: Path) -> None:
    """Routing is the place where another pixel shows: an image near a border would go to the other expert."""
    rows = [
        (row["image"], expert, row["example_id"])
        for expert in range(2)
        for path in root.glob(f"partition/split=test/expert={expert:04d}/*")
        for row in pq.read_table(path).to_pylist()
    ]
    images = [image for image, _, _ in rows]
    full, reduced = (load_square(images[0], SIZE, 1 << 20, reduced=flag) for flag in (False, True))
    assert not np.array_equal(full, reduced), "the two ways must differ for this test to say anything"
    mixture = Mixture.load(str(root))
    assert np.array_equal(mixture.pixels(images[:1])[0], reduced)
    assert mixture.route(images).tolist() == [expert for _, expert, _ in rows]
    stored = {
        row["example_id"]: row["feature"]
        for path in root.glob("features/split=test/*")
        for row in pq.read_table(path).to_pylist()
    }
    found = mixture._features(mixture.trunk, mixture.see(mixture.pixels(images)), np.arange(len(images)))
    np.testing.assert_allclose(found, np.array([stored[identity] for _, _, identity in rows], np.float32), rtol=0, atol=2e-3)
