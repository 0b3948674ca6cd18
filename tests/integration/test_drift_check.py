"""`hardmoe partition --check`: another dataset routed by a finished run; the numbers by NumPy, the files, every refusal."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import PREPARATION, copied_run, invoke, real_images, refusal, snapshot, write_photos, write_recipe

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.mixture import Mixture
from hardmoe.storage import open_storage

CHECK = ("partition", "--check", "other.yaml", "--backend", "inline")
OTHER_DATASET = {"path": "others/*.parquet", "test_fraction": 0.3, "near_duplicates": "none"}


def prepare(finished: Path, directory: Path, **changes: Any) -> Path:
    """A partitioned run, and another recipe of other photos, 180 of which are among this run's 500."""
    root = copied_run(finished, directory, keep=PREPARATION)
    write_photos(directory / "others", real_images(1000)[::5], num_files=2)
    write_recipe(directory, "other.yaml", root="runs/other", dataset={**OTHER_DATASET, **changes})
    return root


@pytest.fixture(scope="module")
def checked(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a check was made. Tests must not change it."""
    directory = tmp_path_factory.mktemp("checked")
    prepare(finished, directory)
    result = invoke(directory, *CHECK)
    assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture(scope="module")
def told(checked: Path) -> dict[str, Any]:
    """The check as JSON."""
    body: dict[str, Any] = json.loads(invoke(checked, *CHECK, "--json").stdout)
    return body


def place_of(directory: Path) -> Path:
    (place,) = (directory / "runs" / "small" / "checks").iterdir()
    return place


def table(pattern: str, root: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(root.glob(pattern)) for row in pq.read_table(path, partitioning=None).to_pylist()]


def test_features_are_those_that_this_run_s_own_trunk_gives(checked: Path) -> None:
    """To the very bits, of the images that both datasets have."""
    own = {row["example_id"]: row["feature"] for row in table("features/split=*/*.parquet", checked / "runs" / "small")}
    theirs = {row["example_id"]: row["feature"] for row in table("features/split=*/*.parquet", place_of(checked))}
    images = {row["example_id"]: row["image"] for row in table("dataset/split=*/*.parquet", checked / "runs" / "other")}
    assert theirs.keys() == images.keys()
    common = own.keys() & theirs.keys()
    assert 50 < len(common) < len(theirs)
    assert all(own[key] == theirs[key] for key in common)
    assert not (checked / "runs" / "other" / "trunk").exists()


def test_sizes_and_distances_equal_a_brute_force_over_the_images(checked: Path, finished: Path, told: dict[str, Any]) -> None:
    images = [row["image"] for row in table("dataset/split=*/*.parquet", checked / "runs" / "other")]
    routed = Mixture.load(str(finished / "runs" / "small")).route(images)
    new = told["sets"]["new"]
    assert new["sizes"] == np.bincount(routed, minlength=3).tolist()
    root = checked / "runs" / "small"
    centroids = np.load(root / "router" / "centroids.npy").astype(np.float64)
    vectors = np.array([row["feature"] for row in table("features/split=*/*.parquet", place_of(checked))], np.float64)
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    distances = np.sqrt(np.square(unit[:, None] - centroids[None]).sum(axis=2))
    part, nearest = distances.argmin(axis=1), distances.min(axis=1)
    np.testing.assert_allclose(new["mean_distance"], [nearest[part == k].mean() for k in range(3)], rtol=1e-5)
    assigned = [row for row in table("partition/assignments/*.parquet", root) if row["split"] == "train"]
    trained = [np.array([row["distance"] for row in assigned if row["expert"] == k]) for k in range(3)]
    assert told["sets"]["training"]["sizes"] == [len(each) for each in trained]
    np.testing.assert_allclose(told["sets"]["training"]["mean_distance"], [each.mean() for each in trained], rtol=1e-5)
    for k in range(3):
        limit = np.quantile(trained[k], 0.99, method="inverted_cdf")
        far = nearest[part == k]
        assert (far > 1.002 * limit).sum() <= new["far"][k] <= (far > limit).sum()
    against = told["against_training"]["new"]
    usual = sum(size * each.mean() for size, each in zip(new["sizes"], trained, strict=True))
    assert against["distance_ratio"] == pytest.approx(nearest.sum() / usual, rel=1e-5)
    assert against["far_share"] == pytest.approx(sum(new["far"]) / len(images))
    shares = [np.array(told["sets"][name]["sizes"]) / sum(told["sets"][name]["sizes"]) for name in ("training", "new")]
    assert against["total_variation"] == pytest.approx(np.abs(shares[0] - shares[1]).sum() / 2)


def test_held_out_images_are_those_of_validation_and_test(checked: Path, told: dict[str, Any]) -> None:
    sizes = ArtifactStore(open_storage(str(checked / "runs" / "small"))).get("partition").payload["sizes"]
    expected = [a + b for a, b in zip(sizes["validation"], sizes["test"], strict=True)]
    assert told["sets"]["held_out"]["sizes"] == expected
    assert told["against_training"]["held_out"]["examples"] == sum(expected)


def test_check_prints_a_table_per_part_and_one_overall(checked: Path, told: dict[str, Any]) -> None:
    out = invoke(checked, *CHECK).stdout
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines if line and line[0].startswith("expert-")] == [f"expert-000{k}" for k in range(3)]
    (new,) = [line for line in lines if line[:1] == ["new"]]
    assert new[1] == str(told["against_training"]["new"]["examples"])
    assert new[2] == f"{100 * told['against_training']['new']['total_variation']:.1f}"
    for said in ("total variation", "by chance", "far out", "held out"):
        assert out.count(said) >= 2
    assert out.startswith(f"{checked}/runs/other, routed by {checked}/runs/small")


def test_same_check_again_changes_no_file(checked: Path) -> None:
    before, first = snapshot(checked / "runs"), invoke(checked, *CHECK).stdout
    assert invoke(checked, *CHECK).stdout == first
    assert snapshot(checked / "runs") == before


def test_dataset_is_taken_over_by_reference_and_known_to_status_and_verify(checked: Path) -> None:
    place = place_of(checked)
    assert place.name.startswith("other-")
    assert json.loads((place / "dataset" / "artifact.json").read_text())["reused_from"] == f"{checked}/runs/other/dataset"
    assert not list(place.glob("dataset/**/*.parquet"))
    states = {row["artifact"]: row["state"] for row in json.loads(invoke(checked, "status", "--json").stdout)}
    prefix = f"checks/{place.name}"
    assert [states[f"{prefix}/{name}"] for name in ("dataset", "features", "drift")] == ["reused", "done", "done"]
    verified = invoke(checked, "verify")
    assert verified.returncode == 0
    assert f"{prefix}/features: ok" in verified.stdout


def test_run_goes_on_after_a_check_as_if_there_had_been_none(checked: Path) -> None:
    states = {line.split()[0]: line.split()[1] for line in invoke(checked, "run", "--dry-run").stdout.splitlines()[:8]}
    assert (states["partition"], states["router"]) == ("done", "done")
    assert not [name for name in states if name.startswith("checks")]


def test_the_run_s_own_photos_are_within_chance_and_those_of_one_part_are_not(finished: Path, tmp_path: Path) -> None:
    """All photos as another dataset hold the held-out ones beside the training images; one part's are all in that part."""
    root = copied_run(finished, tmp_path, keep=PREPARATION)
    write_recipe(tmp_path, "other.yaml", root="runs/other")
    same = json.loads(invoke(tmp_path, *CHECK, "--json").stdout)
    everything = [sum(same["sets"][name]["sizes"][k] for name in ("training", "held_out")) for k in range(3)]
    assert same["sets"]["new"]["sizes"] == everything
    against = same["against_training"]["new"]
    assert against["total_variation"] < 2 * against["chance_total_variation"]
    assert against["chi_square_p"] > 0.05
    assert against["distance_ratio"] == pytest.approx(1.0, abs=0.05)
    part = table("partition/split=train/expert=0001/*.parquet", root)
    (tmp_path / "narrow").mkdir()
    columns = {"image": [row["image"] for row in part], "hashtags": [row["tags"] for row in part]}
    pq.write_table(pa.table(columns), tmp_path / "narrow" / "0.parquet")
    write_recipe(tmp_path, "other.yaml", root="runs/narrow", dataset={"path": "narrow/*.parquet", "near_duplicates": "none"})
    found = json.loads(invoke(tmp_path, *CHECK, "--json").stdout)
    assert found["sets"]["new"]["sizes"] == [0, len(part), 0]
    other, training = found["against_training"]["new"], found["sets"]["training"]["sizes"]
    assert other["total_variation"] == pytest.approx(1 - training[1] / sum(training))
    assert other["total_variation"] > 5 * other["chance_total_variation"]
    assert other["chi_square_p"] < 1e-9
    assert other["distance_ratio"] == pytest.approx(1.0, rel=1e-5)
    assert len(list((root / "checks").iterdir())) == 2


def test_dataset_that_only_refers_to_its_images_is_read_through_its_own_source(
    finished: Path, checked: Path, told: dict[str, Any], tmp_path: Path
) -> None:
    prepare(finished, tmp_path, store="reference")
    assert json.loads(invoke(tmp_path, *CHECK, "--json").stdout)["sets"] == told["sets"]


def test_check_builds_the_partition_first_where_it_is_missing_and_goes_on_after_a_failure(
    finished: Path, told: dict[str, Any], tmp_path: Path
) -> None:
    root = prepare(finished, tmp_path)
    for artifact in ("router", "partition"):
        shutil.rmtree(root / artifact)
    shutil.move(tmp_path / "others", tmp_path / "elsewhere")
    assert "matches no file" in refusal(invoke(tmp_path, *CHECK))
    shutil.move(tmp_path / "elsewhere", tmp_path / "others")
    assert json.loads(invoke(tmp_path, *CHECK, "--json").stdout)["sets"] == told["sets"]


def test_changed_photos_of_the_other_dataset_are_refused_there_and_a_new_root_is_another_check(
    finished: Path, tmp_path: Path
) -> None:
    prepare(finished, tmp_path)
    assert invoke(tmp_path, *CHECK).returncode == 0
    write_photos(tmp_path / "others", real_images(1000)[2::5], num_files=2)
    assert refusal(invoke(tmp_path, *CHECK)).startswith(f"{tmp_path}/runs/other/dataset was built from other files")
    write_recipe(tmp_path, "other.yaml", root="runs/Other May!", dataset=OTHER_DATASET)
    assert invoke(tmp_path, *CHECK).returncode == 0
    names = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "runs" / "small" / "checks").iterdir())
    assert names == ["other", "other-may"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("--set", "partition.method=random"),
            "--check cannot route other images by the run in runs/small: its parts are random",
        ),
        (
            ("--set", "features.path=f.parquet"),
            "--check cannot route other images by the run in runs/small: its parts go by feat",
        ),
        (("--check", "hardmoe.yaml"), "--check hardmoe.yaml: its root is this run's own, runs/small; give the other dataset"),
        (("--check", "nowhere.yaml"), "there is no recipe nowhere.yaml"),
    ],
)
def test_check_that_makes_no_sense_is_refused_before_anything_is_built(
    project: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    write_recipe(project, "other.yaml", root="runs/other")
    assert refusal(invoke(project, *CHECK, *arguments)).startswith(sentence)
    assert not (project / "runs").exists()
