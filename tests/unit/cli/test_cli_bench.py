"""`hardmoe bench data`: every step of the user's own recipe, the limit that they set, the slowest named."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import invoke, real_images, refusal, write_recipe

from hardmoe.features.speed import Speed, Step

QUICK = ("bench", "data", "--rows", "40", "--seconds", "0.01")


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """Forty good images, and one that is none, with a recipe."""
    (tmp_path / "photos").mkdir()
    images = [b"no image", *(row.image for row in real_images(40))]
    table = pa.table({"image": images, "hashtags": [["a"]] * len(images)})
    pq.write_table(table, tmp_path / "photos" / "0.parquet")
    write_recipe(tmp_path)
    return tmp_path


def test_every_step_is_measured_and_broken_images_are_passed_over(collection: Path) -> None:
    result = invoke(collection, *QUICK, "--json")
    assert result.returncode == 0, result.stderr
    body = json.loads(result.stdout)
    steps = {step["name"]: step["images_per_second"] for step in body["steps"]}
    assert {"read", "decode", "resize", "decode and resize", "network"} <= steps.keys()
    assert min(steps.values()) > 0 and body["pipeline"] > 0
    assert body["num_images"] == 39, "the first forty rows without the broken one"
    assert body["bottleneck"] == min(set(steps) - {"decode", "resize"}, key=lambda name: steps[name])
    assert not (collection / "runs").exists(), "it builds nothing"


def test_table_names_the_bottleneck_for_people(collection: Path) -> None:
    result = invoke(collection, *QUICK, "--set", "trunk.decode=reduced")
    assert result.returncode == 0, result.stderr
    assert "trunk.decode: reduced" in result.stdout
    assert "the bottleneck is '" in result.stdout or "something else ran meanwhile" in result.stdout
    assert "to 16 pixels" in result.stdout


def test_collection_without_images_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    pq.write_table(pa.table({"image": [b"x"], "hashtags": [["a"]]}), tmp_path / "photos" / "0.parquet")
    write_recipe(tmp_path)
    assert refusal(invoke(tmp_path, *QUICK)) == "none of the first 1 images of the source 'parquet' can be decoded"


def speed(*steps: Step, threads: int = 4) -> Speed:
    return Speed(100, 1000.0, threads, "a GPU", steps, pipeline=1.0)


def test_limit_is_the_slowest_step_or_what_the_cores_have_time_for() -> None:
    """Four cores: 1/400 core-seconds of reading and 4/1000 of decoding leave 1/615 s an image; the GPU alone manages 500."""
    read, both = Step("read", 400.0, 1), Step("decode and resize", 1000.0, 4)
    alone = Step("decode", 1.0, 4)
    assert speed(read, both, Step("network", 500.0, 0)).limit == 400
    assert speed(Step("read", 900.0, 1), both, Step("network", 500.0, 0)).limit == 500
    found = speed(Step("read", 900.0, 1), both, Step("network", 2000.0, 0), alone).limit
    assert found == pytest.approx(4 / (1 / 900 + 4 / 1000))
    assert speed(read, both, alone, Step("network", 500.0, 0)).bottleneck is read, "decoding alone is part of both"
