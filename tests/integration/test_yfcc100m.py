"""The shipped recipe for YFCC100M over fifty photos in the collection's layout, on networks that fit a test."""

import json
from pathlib import Path

import pyarrow.parquet as pq
from support import PREPARATION, run_here, snapshot
from yfcc_layout import write_yfcc

RECIPE = Path(__file__).parents[2] / "pipelines" / "yfcc100m.yaml"
TINY = {
    "dataset.image_root": "images",
    "dataset.test_fraction": 0.15,
    "dataset.validation_fraction": 0.1,
    "dataset.shard_rows": 16,
    "dataset.near_duplicates": "none",
    "hashtags.min_count": 2,
    "trunk.backbone": "quicknet_w4",
    "trunk.image_size": 16,
    "trunk.epochs": 1,
    "trunk.batch_size": 16,
    "trunk.num_threads": 1,
    "partition.experts": 2,
    "partition.sample_size": 64,
}


def test_recipe_partitions_the_photos_and_leaves_them_where_they_are(tmp_path: Path) -> None:
    layout = write_yfcc(tmp_path / "data" / "yfcc100m", tmp_path / "images")
    photos = snapshot(tmp_path / "images")
    settings = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    run_here(tmp_path, "partition", "-f", str(RECIPE), *settings)
    root = tmp_path / "runs" / "yfcc100m"
    assert all((root / name / "artifact.json").exists() for name in PREPARATION)
    assert snapshot(tmp_path / "images") == photos

    summary = json.loads((root / "dataset" / "artifact.json").read_text())["payload"]
    assert summary["quarantined"] == len(layout.bad)
    assert sum(summary["sizes"].values()) + summary["copies_merged"] == len(layout.good)

    origin = pq.read_table(root / "dataset" / "origin").to_pylist()
    assert {row["source_uri"] for row in origin} == {f"yfcc100m:{identifier}" for identifier in layout.good}
    assert {row["source_uri"]: row["license"] for row in origin} == {
        f"yfcc100m:{identifier}": line.license for identifier, line in layout.good.items()
    }
    # References: the run is smaller than the photos that it was made from would be in it.
    examples = [path for path in (root / "dataset").rglob("*.parquet") if "split=" in str(path)]
    assert sum(path.stat().st_size for path in examples) < sum(size for size, _ in photos.values())
