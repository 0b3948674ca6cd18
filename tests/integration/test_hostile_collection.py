"""More than 3,000 broken, hostile and odd images through the dataset stage: every row accounted for, as it must be."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_images import MAX_PIXELS, HostileImage, hostile_images
from memory import run_measured
from support import write_recipe

LARGEST_PROCESS = (1 << 30) + 12 * MAX_PIXELS
"""Bytes: Python with torch, and an image of the most pixels allowed in a few forms at once. Its size is not in it."""


def build(directory: Path) -> int:
    """Build the dataset in a process of its own, which ends at the vocabulary; returns its peak memory in bytes."""
    code = "from hardmoe.cli.main import main; main()"
    result, peak = run_measured(code, ["partition", "--backend", "inline"], directory)
    assert result.returncode == 1 and "hashtags.min_count=1000000" in result.stderr, result.stderr[-2000:]
    return peak


def listed(root: Path, name: str, column: str) -> dict[str, str | bytes]:
    """A column by the row's place in the source."""
    found: dict[str, str | bytes] = {}
    for path in sorted(root.glob(f"dataset/{name}/*.parquet")):
        table = pq.read_table(path)
        found |= dict(zip(table["source_uri"].to_pylist(), table[column].to_pylist(), strict=True))
    return found


@pytest.mark.long
def test_every_hostile_image_is_an_example_or_in_quarantine_as_it_must_be(tmp_path: Path) -> None:
    images = hostile_images()
    assert len(images) >= 3000
    (tmp_path / "photos").mkdir()
    table = pa.table({"image": [image.data for image in images], "hashtags": [["a"]] * len(images)})
    pq.write_table(table, tmp_path / "photos" / "0.parquet", row_group_size=256)
    settings = {"max_pixels": MAX_PIXELS, "max_bad_fraction": 1.0, "near_duplicates": "held_out", "shard_rows": 1024}
    write_recipe(tmp_path, dataset=settings, hashtags={"min_count": 1_000_000})
    peak = build(tmp_path)
    root = tmp_path / "runs" / "small"
    examples, quarantined = listed(root, "origin", "example_id"), listed(root, "quarantine", "reason")
    places = {f"0.parquet#row={row}": image for row, image in enumerate(images)}
    assert examples.keys() | quarantined.keys() == places.keys()
    assert examples.keys() & quarantined.keys() == set()
    wrong = [_told(image, place in examples) for place, image in places.items() if not _fits(image, place in examples)]
    assert wrong == []
    assert all(reason for reason in quarantined.values())
    payload = json.loads((root / "dataset" / "artifact.json").read_text())["payload"]
    assert payload["quarantined"] == len(quarantined)
    assert sum(payload["quarantine_reasons"].values()) == len(quarantined)
    assert peak < LARGEST_PROCESS, f"{peak / 2**20:.0f} MiB"


def _fits(image: HostileImage, is_example: bool) -> bool:
    return {"decode": is_example, "refuse": not is_example}.get(image.outcome, True)


def _told(image: HostileImage, is_example: bool) -> str:
    return f"{image.name} was {'taken' if is_example else 'refused'} although: {image.reason}"
