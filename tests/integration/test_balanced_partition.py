"""Balanced parts through the command line: sizes, who serves whom, other shardings and backends, and SIGKILL in every phase."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import invoke, records, write_recipe
from test_theorems_partition import by_id, payload

from hardmoe.mixture import Mixture

BALANCED = {"experts": 3, "max_passes": 5, "method": "balanced", "slack": 0.02}
CAPACITY = 127  # of 374 training images and 3 parts, 1.02 times the mean is 127.16

_FEW_ROWS = """
import os, signal
from hardmoe.partitioning import balance, regroup
balance._MOST_ROWS = 60  # of 374 rows, so that it takes passes
run = regroup.PartitionWork.run
def dying(self, context):
    if os.environ.get("DIE_AT") == f"{context.phase}/{context.unit.name}":
        os.kill(os.getpid(), signal.SIGKILL)
    return run(self, context)
regroup.PartitionWork.run = dying
os.cpu_count = lambda: 4
from hardmoe.cli.main import main
main()
"""


def partition(directory: Path, backend: str = "inline", die_at: str = "") -> subprocess.CompletedProcess[str]:
    """`hardmoe partition` with excerpts so small that it takes several passes; killed at a unit (`phase/unit`) if asked."""
    return subprocess.run(
        [sys.executable, "-c", _FEW_ROWS, "partition", "--backend", backend],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "DIE_AT": die_at},
    )


def project(directory: Path, photos: Path, reuse: Path, **changes: Any) -> Path:
    """A directory whose recipe takes over everything but the partition; returns the root."""
    (directory / "photos").symlink_to(photos.resolve())
    write_recipe(directory, root="runs/balanced", reuse=[str(reuse)], partition=BALANCED, **changes)
    return directory / "runs" / "balanced"


def parts(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.glob("partition/split=*/*/*.parquet")}


@pytest.fixture(scope="module")
def balanced_root(tmp_path_factory: pytest.TempPathFactory, photos: Path, root: Path) -> Path:
    """Balanced in several passes, inline and uninterrupted."""
    directory = tmp_path_factory.mktemp("balanced")
    made = project(directory, photos, root)
    result = partition(directory)
    assert result.returncode == 0, result.stderr
    told = payload(made, "partition")["balance"]
    elsewhere = sum(told["serve_elsewhere"])
    assert f"balanced to {CAPACITY} training examples a part, at most 0.00" in result.stdout
    assert f"; {elsewhere} of 374 ({100 * elsewhere / 374:.1f} %) serve elsewhere than they trained\n" in result.stdout
    return made


def test_training_parts_are_no_larger_than_allowed_and_the_router_is_the_unbalanced_runs(balanced_root: Path, root: Path) -> None:
    told, sizes = payload(balanced_root, "partition")["balance"], payload(balanced_root, "partition")["sizes"]
    assert max(payload(root, "partition")["sizes"]["train"]) > CAPACITY, "nothing had to be balanced"
    assert told["capacity"] == told["largest"] == max(sizes["train"]) == CAPACITY
    assert sum(sizes["train"]) == 374
    assert told["passes"] >= 2
    assert not (balanced_root / "router" / "centroids.npy").exists(), "the router is taken over, not fitted again"
    for split in ("validation", "test"):
        assert sizes[split] == payload(root, "partition")["sizes"][split]


def test_assignments_name_the_part_trained_in_and_the_nearest_other_one(balanced_root: Path, root: Path) -> None:
    assigned, routed = (by_id(each.glob("partition/assignments/*.parquet")) for each in (balanced_root, root))
    assert assigned.keys() == routed.keys()
    elsewhere = [0, 0, 0]
    for key, row in assigned.items():
        if row["expert"] == routed[key]["expert"]:
            assert row == routed[key]
            continue
        assert row["split"] == "train"
        # It would be served by the nearest expert, which is the second now; the record counts it where it trains.
        assert (row["second"], row["second_distance"]) == (routed[key]["expert"], routed[key]["distance"])
        assert row["distance"] >= row["second_distance"]
        elsewhere[row["expert"]] += 1
    told = payload(balanced_root, "partition")["balance"]
    assert told["serve_elsewhere"] == elsewhere
    assert sum(elsewhere) > 0
    training = [row for row in assigned.values() if row["split"] == "train"]
    assert told["cost"] == pytest.approx(sum(row["distance"] ** 2 for row in training), rel=1e-5)
    nearest = [min(row["distance"], row["second_distance"]) for row in training]
    assert told["unconstrained_cost"] == pytest.approx(sum(value**2 for value in nearest), rel=1e-5)
    assert told["unconstrained_cost"] < told["lower_bound"] <= told["cost"] <= told["lower_bound"] * 1.0001


def test_parts_hold_the_examples_assigned_to_them(balanced_root: Path) -> None:
    assigned = by_id(balanced_root.glob("partition/assignments/*.parquet"))
    seen = 0
    for expert in range(3):
        for path in balanced_root.glob(f"partition/split=train/expert={expert:04d}/*.parquet"):
            for row in pq.read_table(path, columns=["example_id", "distance"], partitioning=None).to_pylist():
                assert (assigned[row["example_id"]]["expert"], assigned[row["example_id"]]["distance"]) == (
                    expert,
                    row["distance"],
                )
                seen += 1
    assert seen == 374


def test_all_rows_at_once_give_the_same_parts_as_excerpts(balanced_root: Path, root: Path, photos: Path, tmp_path: Path) -> None:
    other = project(tmp_path, photos, root)
    result = invoke(tmp_path, "partition", "--backend", "inline")
    assert result.returncode == 0, result.stderr
    assert payload(other, "partition")["balance"]["passes"] == 0
    assert parts(other) == parts(balanced_root)


def test_another_sharding_gives_the_same_parts_and_the_same_balance(
    balanced_root: Path, resharded_root: Path, tmp_path: Path
) -> None:
    other = project(tmp_path, resharded_root.parents[1] / "photos", resharded_root, dataset={"shard_rows": 47})
    result = partition(tmp_path)
    assert result.returncode == 0, result.stderr
    assert parts(other) == parts(balanced_root)
    assert payload(other, "partition") == payload(balanced_root, "partition")


def test_four_ray_workers_give_the_same_bytes(balanced_root: Path, root: Path, photos: Path, tmp_path: Path) -> None:
    other = project(tmp_path, photos, root)
    result = partition(tmp_path, "ray")
    assert result.returncode == 0, result.stderr
    assert records(other)["partition/artifact.json"] == records(balanced_root)["partition/artifact.json"]


def test_killed_in_every_phase_and_resumed_equals_uninterrupted(
    balanced_root: Path, root: Path, photos: Path, tmp_path: Path
) -> None:
    other = project(tmp_path, photos, root)
    for moment in ("balance-sample/00001", "balance-0000/00002", "balance-0001/00000", "assign/00001", "merge/train-0001"):
        result = partition(tmp_path, die_at=moment)
        assert result.returncode == -signal.SIGKILL, f"{moment}: {result.stdout}{result.stderr}"
        assert not (other / "partition" / "artifact.json").exists()
    result = partition(tmp_path)
    assert result.returncode == 0, result.stderr
    assert records(other)["partition/artifact.json"] == records(balanced_root)["partition/artifact.json"]


def test_a_balanced_run_reports_what_it_cost_and_serves_by_the_nearest_centroid(root: Path, photos: Path, tmp_path: Path) -> None:
    other = project(tmp_path, photos, root, experts={"epochs": 1})
    result = invoke(tmp_path, "run", "--backend", "inline")
    assert result.returncode == 0, result.stderr
    page = (other / "report" / "index.html").read_text()
    elsewhere = sum(payload(other, "partition")["balance"]["serve_elsewhere"])
    assert f"{elsewhere} images, {100 * elsewhere / 374:.1f}\N{NO-BREAK SPACE}%" in page
    mixture = Mixture.load(str(other))
    rows = [row for path in root.glob("dataset/split=train/*.parquet") for row in pq.read_table(path).to_pylist()]
    routed = by_id(root.glob("partition/assignments/*.parquet"))
    experts = mixture.route([row["image"] for row in rows])
    np.testing.assert_array_equal(experts, [routed[row["example_id"]]["expert"] for row in rows])
    # The check for drift compares with where the training images would be served, not with how they were balanced.
    write_recipe(tmp_path, "other.yaml", root="runs/other")
    checked = invoke(tmp_path, "partition", "--check", "other.yaml", "--backend", "inline", "--json")
    assert checked.returncode == 0, checked.stderr
    training = json.loads(checked.stdout)["sets"]["training"]
    assert training["sizes"] == payload(root, "partition")["sizes"]["train"]
    assert training["mean_distance"] == pytest.approx(payload(root, "partition")["mean_distance"], rel=1e-5)


def test_slack_without_balance_is_refused(root: Path, photos: Path, tmp_path: Path) -> None:
    project(tmp_path, photos, root)
    result = invoke(tmp_path, "partition", "--set", "partition.method=kmeans")
    assert result.returncode == 1
    assert "partition: slack 0.02 does nothing with method 'kmeans': set method: balanced, or leave slack out" in result.stderr
