"""The mixture as one object: it must give what the cached tables and the evaluation gave."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support import copied_run, metrics

from hardmoe.errors import DataError, MissingRecordError
from hardmoe.mixture import Mixture, UseOptions


@pytest.fixture(scope="module")
def mixture(finished: Path) -> Mixture:
    return Mixture.load(str(finished / "runs" / "small"))


def part_rows(root: Path, expert: int) -> list[dict[str, object]]:
    return [
        row
        for path in sorted(root.glob(f"partition/split=test/expert={expert:04d}/*"))
        for row in pq.read_table(path).to_pylist()
    ]


def test_mixture_routes_every_test_image_to_the_part_it_lies_in(finished: Path, mixture: Mixture) -> None:
    root = finished / "runs" / "small"
    for expert in range(3):
        rows = part_rows(root, expert)
        assert mixture.route([row["image"] for row in rows]).tolist() == [expert] * len(rows)


def test_mixture_embeds_as_the_cached_tables_and_predicts_as_the_evaluation(finished: Path, mixture: Mixture) -> None:
    root = finished / "runs" / "small"
    images = {row["example_id"]: row["image"] for expert in range(3) for row in part_rows(root, expert)}
    labels = {row["example_id"]: row["tags"] for p in root.glob("vocabulary/labels/*") for row in pq.read_table(p).to_pylist()}
    labelled = {identity: image for identity, image in images.items() if labels[identity]}
    predictions = mixture.predict(list(labelled.values()), k=1)
    hits = [mixture.tags.index(p.tags[0]) in labels[identity] for identity, p in zip(labelled, predictions, strict=True)]
    measured = metrics(root)["systems"]["mixture"]["precision@1"]["value"]
    assert np.mean(hits) == pytest.approx(measured)
    assert mixture.embed(list(images.values())).shape == (len(images), mixture.decoder.dim)


def test_mixture_prediction_of_an_image_alone_equals_that_among_others(finished: Path, mixture: Mixture) -> None:
    images = [row["image"] for row in part_rows(finished / "runs" / "small", 0)][:5]
    together = mixture.embed(images)
    for position, image in enumerate(images):
        np.testing.assert_allclose(mixture.embed([image])[0], together[position], atol=2e-3)


def test_mixture_of_an_undecodable_image_names_its_position(mixture: Mixture) -> None:
    with pytest.raises(DataError, match=r"image 0 of 1"):
        mixture.predict([b"no image"])


def test_mixture_of_an_unfinished_run_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingRecordError, match="trunk"):
        Mixture.load(str(tmp_path))


def test_mixture_of_a_random_partition_says_that_nothing_routes_new_images(finished: Path, tmp_path: Path) -> None:
    """It said that the router was never finished; such a run has none, and finishing it brings none."""
    root = copied_run(finished, tmp_path, keep=["trunk", "partition", "decoder", "vocabulary"])
    record = root / "partition" / "artifact.json"
    body = json.loads(record.read_text())
    body["config"]["partition"]["method"] = "random"
    record.write_text(json.dumps(body))
    with pytest.raises(DataError, match=r"is random.*partition\.method: kmeans"):
        Mixture.load(str(root))


def test_mixture_of_one_image_instead_of_several_says_what_is_expected(mixture: Mixture) -> None:
    """Iterating over one image's bytes once gave "image 0 of 217: broken image"."""
    with pytest.raises(TypeError, match=r"not one of type bytes; put it into brackets"):
        mixture.predict(b"one image")  # type: ignore[arg-type]


def some_images(root: Path, count: int = 30) -> list[bytes]:
    return [row["image"] for expert in range(3) for row in part_rows(root, expert)][:count]


def test_mixture_is_given_an_image_as_a_file_a_uri_bytes_an_array_a_tensor_or_pillows(
    finished: Path, mixture: Mixture, tmp_path: Path
) -> None:
    data = some_images(finished / "runs" / "small")[0]
    (tmp_path / "an image.png").write_bytes(data)
    decoded = Image.open(io.BytesIO(data))
    pixels_HW3 = np.asarray(decoded.convert("RGB"))
    given = [
        data,
        tmp_path / "an image.png",
        (tmp_path / "an image.png").as_uri(),
        decoded,
        pixels_HW3,
        torch.from_numpy(pixels_HW3.transpose(2, 0, 1).copy()),
    ]
    vectors = mixture.embed(given)
    np.testing.assert_array_equal(vectors, np.repeat(vectors[:1], len(given), axis=0))
    assert len({tuple(prediction.tags) for prediction in mixture.predict(given, k=4)}) == 1


def test_experts_beyond_the_memory_budget_are_evicted_and_loaded_again(finished: Path) -> None:
    root = finished / "runs" / "small"
    tight, free = Mixture.load(str(root), UseOptions(memory_gib=1e-6)), Mixture.load(str(root))
    images = some_images(root, 500)
    np.testing.assert_array_equal(tight.embed(images), free.embed(images))
    assert tight.experts.num_loads == free.experts.num_loads == 3, "images are not grouped by expert"
    assert len(tight.experts.numbers) == 1 and sorted(free.experts.numbers) == [0, 1, 2]
    free.embed(images)
    assert free.experts.num_loads == 3
    tight.embed(images)
    assert tight.experts.num_loads > 3


def test_experts_in_bfloat16_say_nearly_the_same_and_the_gate_the_very_same(finished: Path, mixture: Mixture) -> None:
    root = finished / "runs" / "small"
    images = some_images(root)
    half = Mixture.load(str(root), UseOptions(precision="bfloat16"))
    assert half.route(images).tolist() == mixture.route(images).tolist()
    exact, rounded = mixture.embed(images), half.embed(images)
    assert not np.array_equal(exact, rounded)
    assert np.linalg.norm(rounded - exact) < 0.05 * np.linalg.norm(exact)


def test_mixture_answers_an_image_alone_as_among_others_to_five_digits(finished: Path, mixture: Mixture) -> None:
    images = some_images(finished / "runs" / "small", 40)
    together = mixture.embed(images)
    for count in (1, 2, 3, 17):
        np.testing.assert_allclose(mixture.embed(images[:count]), together[:count], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_mixture_says_the_same(finished: Path, mixture: Mixture) -> None:
    """Compiling takes a minute; experts of one shape are compiled once."""
    root = finished / "runs" / "small"
    images = some_images(root)
    compiled = Mixture.load(str(root), UseOptions(compiled=True))
    np.testing.assert_allclose(compiled.embed(images), mixture.embed(images), rtol=1e-4, atol=1e-4)
