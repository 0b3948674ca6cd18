"""The same 500 images through every source, from a disk and from S3: the same dataset, row for row and byte for byte."""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from collection_writers import WRITERS, moved_to_store
from s3 import Store
from support import real_images, run_here, write_recipe

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.data.config import DatasetConfig
from hardmoe.data.reading import ReferringExamples, read_examples
from hardmoe.errors import DataError
from hardmoe.storage import LocalStorage

EXAMPLES = real_images(500)
WITHOUT_FETCH = {"huggingface", "webdataset-gz"}
"""Rows of these cannot be found again one by one."""
LOCAL_ONLY = {"huggingface"}
PLACES = [(kind, place) for kind in WRITERS for place in ("local", "s3") if place == "local" or kind not in LOCAL_ONLY]

Row = tuple[bytes, bytes, tuple[str, ...]]


def expected() -> set[Row]:
    """What must come out: an example per picture, called by its content, with the hashtags of all its copies."""
    tags: dict[bytes, set[str]] = {}
    for row in EXAMPLES:
        tags.setdefault(row.image, set()).update(row.tags)
    return {(hashlib.sha256(image).digest()[:16], image, tuple(sorted(words))) for image, words in tags.items()}


def build(directory: Path, section: dict[str, Any], **more: Any) -> Path:
    """Build the dataset and stop at the vocabulary; returns the root."""
    dataset = {"path": None, "shard_rows": 128, "near_duplicates": "none", **section, **more}
    write_recipe(directory, dataset=dataset, hashtags={"min_count": 1_000_000})
    with pytest.raises(DataError, match="no hashtag is on"):
        run_here(directory, "partition")
    return directory / "runs" / "small"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards that Parquet on a disk gives."""
    directory = tmp_path_factory.mktemp("plain")
    return shards(build(directory, WRITERS["parquet"](directory / "photos", EXAMPLES)))


def shards(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob("dataset/split=*/*.parquet"))}


@pytest.fixture
def section(request: pytest.FixtureRequest, tmp_path: Path, kind: str, place: str) -> dict[str, Any]:
    """The recipe's section for the images, on a disk or in a bucket."""
    config = WRITERS[kind](tmp_path / "photos", EXAMPLES)
    if place == "local":
        return config
    store: Store = request.getfixturevalue("s3_store")
    return moved_to_store(config, tmp_path / "photos", store.root(f"matrix-{kind}"))


def test_parquet_on_a_disk_gives_the_rows_that_it_must(plain: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "shard").mkdir()
    rows: set[Row] = set()
    for number, data in enumerate(plain.values()):
        (tmp_path / "shard" / f"{number}.parquet").write_bytes(data)
        table = pq.read_table(tmp_path / "shard" / f"{number}.parquet").to_pylist()
        rows |= {(row["example_id"], row["image"], tuple(row["tags"])) for row in table}
    assert rows == expected()


@pytest.mark.parametrize(("kind", "place"), PLACES)
def test_every_source_gives_the_same_dataset(section: dict[str, Any], tmp_path: Path, plain: dict[str, bytes]) -> None:
    root = build(tmp_path, section, store="copy")
    assert shards(root) == plain
    origins = [row for path in root.glob("dataset/origin/*.parquet") for row in pq.read_table(path).to_pylist()]
    assert len(origins) == len({row["source_uri"] for row in origins}) == len(EXAMPLES)
    assert not list(root.glob("dataset/quarantine/*"))


@pytest.mark.parametrize(("kind", "place"), [(kind, place) for kind, place in PLACES if kind not in WITHOUT_FETCH])
def test_every_source_that_can_be_referred_to_gives_the_same_rows(section: dict[str, Any], tmp_path: Path) -> None:
    root = build(tmp_path, section, store="reference")
    config = DatasetConfig.model_validate({"shard_rows": 128, **section})
    dataset = ReferringExamples(ArtifactStore(LocalStorage(root)).get("dataset"), config)
    rows = [row for table in read_examples(dataset, dataset.files("split=")) for row in table.to_pylist()]
    assert {(row["example_id"], row["image"], tuple(row["tags"])) for row in rows} == expected()
    assert len(rows) == len(expected())


@pytest.mark.parametrize(("kind", "place"), [("parquet-paths", "local"), ("parquet-paths", "s3")])
def test_images_that_a_table_only_names_stay_where_they_are_unless_the_recipe_says_otherwise(
    section: dict[str, Any], tmp_path: Path
) -> None:
    """`auto` went by the size of the tables: 10 MB of paths to a terabyte of photos were a small collection, to be copied."""
    root = build(tmp_path, section)
    payload = ArtifactStore(LocalStorage(root)).get("dataset").payload
    assert payload["store"] == "reference"
    assert sum(payload["sizes"].values()) == len(expected())


def test_scaled_copies_are_copies_of_what_a_table_names(tmp_path: Path) -> None:
    root = build(tmp_path, WRITERS["parquet-paths"](tmp_path / "photos", EXAMPLES[:20]), store_size=8)
    assert ArtifactStore(LocalStorage(root)).get("dataset").payload["store"] == "copy"
