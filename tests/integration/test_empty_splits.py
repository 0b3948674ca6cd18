"""Splits without examples, or without hashtags: said as soon as it is known, and not after the experts were trained."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import invoke, real_images, refusal, run_here, write_recipe

TINY = {"partition": {"experts": 1}, "hashtags": {"min_count": 2}}
RUN = ("run", "--backend", "inline")


def collection(directory: Path, splits: list[str], tags: list[list[str]] | None = None) -> None:
    """Drawings with these splits, and with their own hashtags if no others are given."""
    images = real_images(len(splits))
    hashtags = tags or [list(row.tags) for row in images]
    (directory / "photos").mkdir(exist_ok=True)
    columns = {"image": [row.image for row in images], "hashtags": hashtags, "part": splits}
    pq.write_table(pa.table(columns), directory / "photos" / "0.parquet")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "small"


def test_collection_without_test_examples_is_refused_before_its_record_and_the_mended_recipe_goes_on(
    tmp_path: Path, root: Path
) -> None:
    """The evaluation found it out after every expert had been trained, and the dataset could not be changed any more."""
    collection(tmp_path, ["train"] * 36 + ["validation"] * 4)
    write_recipe(tmp_path, **TINY, dataset={"split_column": "part"})
    assert refusal(invoke(tmp_path, *RUN)) == (
        "none of the 40 examples is a test example, and the evaluation needs some; write 'test' into more rows of "
        "dataset.split_column ('part'), or leave it out"
    )
    assert not (root / "dataset" / "artifact.json").exists()
    write_recipe(tmp_path, **TINY, dataset={"test_fraction": 0.3})
    run_here(tmp_path, "partition")
    assert (root / "partition" / "artifact.json").exists()


def test_fraction_that_gives_no_test_example_is_named(tmp_path: Path) -> None:
    collection(tmp_path, ["train"] * 12)
    write_recipe(tmp_path, **TINY, dataset={"test_fraction": 0.001, "validation_fraction": 0.0})
    sentence = refusal(invoke(tmp_path, *RUN))
    assert sentence.endswith("and the evaluation needs some; raise dataset.test_fraction (0.001), or add images")


def test_partition_needs_no_test_examples_says_so_and_a_later_evaluation_is_refused_at_once(tmp_path: Path, root: Path) -> None:
    collection(tmp_path, ["train"] * 40)
    write_recipe(tmp_path, **TINY, dataset={"split_column": "part"})
    result = invoke(tmp_path, "partition", "--backend", "inline")
    assert result.returncode == 0, result.stderr
    assert "there are no test examples, which an evaluation needs: see the rows of dataset.split_column" in result.stderr
    assert "there are no validation examples to watch the training by: see the rows of dataset.split_column" in result.stderr
    before = {path for path in root.rglob("*") if path.is_file()}
    assert refusal(invoke(tmp_path, *RUN)).startswith("none of the 40 examples is a test example, and the evaluation needs some")
    assert {path for path in root.rglob("*") if path.is_file()} == before, "nothing was begun"
    write_recipe(tmp_path, "other.yaml", root="runs/other", reuse=["runs/small"], **TINY, dataset={"split_column": "part"})
    sentence = refusal(invoke(tmp_path, *RUN, "-f", "other.yaml"))
    assert sentence.startswith("none of the 40 examples is a test example"), "nor is it taken over"


def test_test_examples_without_a_hashtag_of_the_vocabulary_are_refused_after_the_vocabulary(tmp_path: Path, root: Path) -> None:
    tags = [["sea", "sky"]] * 30 + [["only", "elsewhere"]] * 10
    collection(tmp_path, ["train"] * 30 + ["validation"] * 5 + ["test"] * 5, tags)
    write_recipe(tmp_path, **TINY, dataset={"split_column": "part"})
    assert refusal(invoke(tmp_path, *RUN)) == (
        "no test example has a hashtag of the vocabulary, and the evaluation needs some; lower hashtags.min_count (2), or raise "
        "dataset.test_fraction or add images"
    )
    assert not (root / "vocabulary" / "artifact.json").exists() and not (root / "trunk" / "artifact.json").exists()
    result = invoke(tmp_path, "partition", "--backend", "inline")
    assert "none of the 5 validation examples has a hashtag of the vocabulary" in result.stderr
    assert "none of the 5 test examples has a hashtag of the vocabulary" in result.stderr


def test_training_examples_without_a_hashtag_are_refused_although_others_have_some(tmp_path: Path) -> None:
    collection(tmp_path, ["train"] * 30 + ["test"] * 10, [[]] * 30 + [["sea"]] * 10)
    write_recipe(tmp_path, **TINY, dataset={"split_column": "part"})
    sentence = refusal(invoke(tmp_path, *RUN))
    assert sentence == "no training example has a hashtag; correct dataset.tags_column or dataset.split_column"
