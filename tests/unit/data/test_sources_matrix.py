"""The same images through every source, from a disk and from S3: the same rows, and the same bytes when fetched again."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from collection_writers import WRITERS, moved_to_store
from s3 import Faults, Store
from support import real_images

from hardmoe.data.config import DatasetConfig
from hardmoe.data.sources.base import RawExample, ReferableSource, Source, SourceShard
from hardmoe.data.sources.registry import open_source

EXAMPLES = real_images(40)
EXPECTED = sorted((row.image, tuple(sorted(row.tags))) for row in EXAMPLES)
ON_A_DISK = [(kind, "local") for kind in WRITERS]


@pytest.fixture
def section(request: pytest.FixtureRequest, tmp_path: Path, kind: str, place: str) -> dict[str, Any]:
    """The recipe's section for the examples, on a disk or in a store that misbehaves."""
    folder = tmp_path / "photos"
    config = WRITERS[kind](folder, EXAMPLES)
    if place == "local":
        return config
    store: Store = request.getfixturevalue("s3_store")
    moved = moved_to_store(config, folder, store.root("photos"))
    store.proxy.faults = Faults(busy=0.1, cut=0.05, refuse=0.05, seed=3)
    return moved


def opened(section: dict[str, Any], **changes: Any) -> Source:
    return open_source(DatasetConfig(**section | {"shard_rows": 17} | changes))


def rows_of(section: dict[str, Any]) -> list[RawExample]:
    """Every row, each shard read by a source of its own, as a worker on another machine does."""
    rows = []
    for shard in opened(section).shards():
        sent = SourceShard(shard.name, json.loads(json.dumps(shard.items)))
        rows += list(opened(section).read(sent))
    assert all(isinstance(row, RawExample) for row in rows), rows
    return rows


@pytest.mark.parametrize(("kind", "place"), [*ON_A_DISK, ("webdataset", "s3-misbehaving"), ("parquet-paths", "s3-misbehaving")])
def test_every_source_reads_back_the_same_rows(section: dict[str, Any], kind: str) -> None:
    rows = rows_of(section)
    assert sorted((row.image, tuple(sorted(row.tags))) for row in rows) == EXPECTED
    uris = {row.source_uri for row in rows}
    assert len(uris) == len(rows)
    assert not any("/tmp" in uri or "bucket" in uri or "://" in uri for uri in uris)
    assert rows_of(section) == rows


@pytest.mark.parametrize(("kind", "place"), ON_A_DISK)
def test_location_fetches_the_same_bytes_in_any_order(section: dict[str, Any], kind: str) -> None:
    rows = [row for row in rows_of(section) if row.location is not None]
    assert len(rows) == (0 if kind in ("webdataset-gz", "huggingface") else len(EXAMPLES))
    if not rows:
        return
    source = opened(section)
    assert isinstance(source, ReferableSource)
    rows.sort(key=lambda row: (row.location.file, row.location.offset))
    assert list(source.fetch([row.location for row in rows])) == [row.image for row in rows]
    random.Random(4).shuffle(rows)
    assert list(source.fetch([row.location for row in rows])) == [row.image for row in rows]


@pytest.mark.parametrize("kind", WRITERS)
def test_moved_collection_has_the_same_names_rows_and_locations(tmp_path: Path, kind: str) -> None:
    first, second = (WRITERS[kind](tmp_path / home / "photos", EXAMPLES) for home in ("here", "there/below"))
    assert [(file.name, file.size) for file in opened(first).files()] == [(f.name, f.size) for f in opened(second).files()]
    assert rows_of(first) == rows_of(second)


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "huggingface"])
def test_collection_in_a_store_has_the_names_rows_and_locations_of_the_one_on_disk(
    tmp_path: Path, s3_store: Store, kind: str
) -> None:
    local = WRITERS[kind](tmp_path / "photos", EXAMPLES)
    remote = moved_to_store(local, tmp_path / "photos", s3_store.root("a/photos"))
    here, there = opened(local).files(), opened(remote).files()
    assert [(file.name, file.size) for file in here] == [(file.name, file.size) for file in there]
    assert all(file.digest is None for file in here) and all(file.digest.startswith("etag:") for file in there)
    rows = rows_of(local)
    assert rows_of(remote) == rows
    locations = [row.location for row in rows if row.location is not None]
    assert list(opened(remote).fetch(locations)) == [row.image for row in rows][: len(locations)]


@pytest.mark.parametrize("kind", WRITERS)
def test_files_are_those_of_the_collection_and_change_their_version_with_their_content(tmp_path: Path, kind: str) -> None:
    section = WRITERS[kind](tmp_path / "photos", EXAMPLES)
    files = opened(section).files()
    assert files == sorted(files, key=lambda file: file.name)
    assert all(Path(file.path).stat().st_size == file.size for file in files)
    below = [path for path in (tmp_path / "photos").rglob("*") if path.is_file()]
    if kind == "parquet-paths":
        below = [path for path in below if path.suffix == ".parquet"]
    elif kind == "huggingface":
        below = [path for path in below if path.suffix == ".arrow"]
    assert {file.path for file in files} == {str(path) for path in below}


@pytest.mark.parametrize("kind", WRITERS)
def test_shards_hold_about_as_many_rows_as_asked_for(tmp_path: Path, kind: str) -> None:
    section = WRITERS[kind](tmp_path / "photos", EXAMPLES)
    sizes = [len(list(opened(section).read(shard))) for shard in opened(section).shards()]
    assert sum(sizes) == len(EXAMPLES)
    assert len(sizes) >= 3 and max(sizes) <= 20
    names = [shard.name for shard in opened(section).shards()]
    assert names == [f"{number:05d}-of-{len(names):05d}" for number in range(len(names))]
