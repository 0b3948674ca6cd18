"""What the report says of the partition, held against the run's own tables, read without hardmoe."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import mutual_info_score

from hardmoe.execution.worker import StageContext
from hardmoe.pipeline import ExternalInputs, build_stages
from hardmoe.recipe import load_recipe
from hardmoe.report.collect import collect
from hardmoe.stage import Stage
from hardmoe.storage import open_storage


def rows(root: Path, pattern: str) -> list[dict[str, Any]]:
    return [row for path in sorted(root.glob(pattern)) for row in pq.read_table(path).to_pylist()]


@pytest.fixture
def data(root: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((root / "report" / "data.json").read_text())
    return body


def report_stage(root: Path, *overrides: str) -> Stage:
    """The report of the small recipe, changed."""
    recipe = load_recipe(root.parents[1] / "hardmoe.yaml", overrides)
    return next(stage for stage in build_stages(recipe, ExternalInputs("")) if stage.name == "report")


def test_report_tells_of_the_partition_what_its_assignments_say(root: Path, data: dict[str, Any]) -> None:
    assigned = [row for row in rows(root, "partition/assignments/*.parquet") if row["split"] == "train"]
    tags = {row["example_id"]: row["tags"] for row in rows(root, "vocabulary/labels/*.parquet")}
    found, sizes = data["partition"], np.bincount([row["expert"] for row in assigned])
    assert found["looked_at"] == len(assigned)
    assert found["variation"] == pytest.approx(sizes.std() / sizes.mean())
    near = [row["second_distance"] <= 1.1 * row["distance"] for row in assigned]
    assert found["bordering"] == pytest.approx(np.mean(near), abs=1.5 / len(near))
    pairs = [(tag, row["expert"]) for row in assigned for tag in tags[row["example_id"]]]
    assert found["tag_bits"] == pytest.approx(mutual_info_score(*zip(*pairs, strict=True)) / math.log(2), abs=1e-9)
    assert 0 < found["tag_chance_bits"] < found["tag_bits"] < found["tag_entropy_bits"]
    for part in data["parts"]:
        distances = [row["distance"] for row in assigned if row["expert"] == part["expert"]]
        assert sum(part["distances"]["counts"]) == len(distances)
        assert part["distances"]["quantiles"]["50"] == pytest.approx(np.quantile(distances, 0.5, method="inverted_cdf"))
    totals = np.sum([part["distances"]["counts"] for part in data["parts"]], axis=0)
    assert totals.tolist() == found["distances"]["counts"]


def test_report_of_random_parts_has_no_distances_and_no_borders(root: Path) -> None:
    """They have no centroids: a distance of zero, or no distance, would be made up."""
    stage = report_stage(root, "partition.method=random")
    assert "router" not in stage.inputs
    found = collect(StageContext(stage, open_storage(str(root))))
    assert (found["partition"]["bordering"], found["partition"]["distances"]) == (None, None)
    assert [part["distances"] for part in found["parts"]] == [None] * 3
    assert found["router"]["zero_vectors"] is None


def test_report_tells_of_zero_vectors_where_the_router_counted_them(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = StageContext(report_stage(root), open_storage(str(root)))
    counted = context.input("router").record.payload
    monkeypatch.setitem(counted, "zero_vectors", 4)
    assert collect(context)["router"]["zero_vectors"] == 4
