"""What the report reads: its cost must not grow with the images."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support import real_images

from hardmoe.artifacts.record import Record
from hardmoe.artifacts.store import Artifact
from hardmoe.data.schemas import EXAMPLES
from hardmoe.report import collect
from hardmoe.stage import FileEntry
from hardmoe.storage import LocalStorage
from hardmoe.tables import build_table, ids_to_array


def test_thumbnails_read_only_the_shards_that_hold_a_chosen_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One unit once read every image of the collection to show a few dozen of each part."""
    images, names = real_images(6), [f"split=train/expert=0000/part-{index:05d}-of-00003.parquet" for index in range(3)]
    for index, name in enumerate(names):
        ids = [bytes([2 * index + row]) * 16 for row in range(2)]
        pair = images[2 * index : 2 * index + 2]
        columns = {"example_id": ids, "image": [image.image for image in pair], "tags": [[] for _ in pair]}
        (tmp_path / "partition" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(build_table(EXAMPLES, columns), tmp_path / "partition" / name)
    record = Record("partition", 1, "", {}, {}, [FileEntry(name, 0, "") for name in names])
    partition = Artifact("partition", record, LocalStorage(tmp_path))
    read: list[str] = []
    original = collect.read_examples

    def watched(examples: Any, paths: Sequence[str], columns: Sequence[str]) -> Iterator[Any]:
        read.extend(path for path in paths if "image" in columns)
        return original(examples, paths, columns)

    monkeypatch.setattr(collect, "read_examples", watched)
    ids_N16 = ids_to_array(pq.read_table(tmp_path / "partition" / names[1]).column("example_id"))
    found = collect._thumbnails(partition, 0, ids_N16)
    assert set(found) == {bytes([2]) * 16, bytes([3]) * 16}
    assert read == [f"partition/{names[1]}"]
