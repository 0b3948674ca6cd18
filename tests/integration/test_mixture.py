"""The mixture as one object: it must give what the cached tables and the evaluation gave."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import copied_run, metrics

from hardmoe.errors import DataError, MissingRecordError
from hardmoe.mixture import Mixture


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
    with pytest.raises(TypeError, match=r"images must be encoded images \(bytes each\), but item 0 is a int"):
        mixture.predict(b"one image")  # type: ignore[arg-type]
