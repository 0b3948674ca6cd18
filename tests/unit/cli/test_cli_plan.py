"""`hardmoe plan`: answers about runs of any size in seconds, from stated rates or from what a finished run took."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from support import SMALL, copied_run, invoke, payload, refusal, run_here, write_recipe

HUGE = ("--images", "1e9", "--experts", "64", "--gpus", "32", "--cpus", "192")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_recipe(tmp_path, dataset={"shard_rows": 8192})
    return tmp_path


def plan(directory: Path, *arguments: str) -> dict[str, Any]:
    result = invoke(directory, "plan", "--json", *arguments)
    assert result.returncode == 0, result.stderr
    body: dict[str, Any] = json.loads(result.stdout)
    return body | {"stages": {stage["stage"]: stage for stage in body["stages"]}}


def test_thousand_million_images_are_planned_in_seconds_and_nothing_is_begun(place: Path) -> None:
    began = time.process_time()
    body = plan(place, *HUGE)
    assert time.process_time() - began < 10.0
    assert body["images"] == 10**9 and body["experts"] == 64
    assert body["stages"]["experts"]["units"] == 64
    assert sorted(path.name for path in place.iterdir()) == ["hardmoe.yaml"]


def test_twice_the_images_take_twice_the_hours_and_bytes(place: Path) -> None:
    once, twice = plan(place, *HUGE)["stages"], plan(place, "--images", "2e9", *HUGE[2:])["stages"]
    for name in ("dataset", "features", "experts", "embeddings"):
        for column in ("cpu_hours", "read_bytes"):
            assert twice[name][column] == pytest.approx(2 * once[name][column], rel=0.02), (name, column)


def test_price_of_a_gpu_is_paid_for_gpu_hours_alone(place: Path) -> None:
    stages = plan(place, *HUGE, "--rate", "gpu_price=2.5", "--rate", "cpu_price=0.1")["stages"]
    assert stages["experts"]["cost"] == pytest.approx(2.5 * stages["experts"]["gpu_hours"])
    assert stages["dataset"]["cost"] == pytest.approx(0.1 * stages["dataset"]["cpu_hours"])
    assert stages["dataset"]["gpu_hours"] == 0.0


def test_experts_in_waves_take_as_many_times_as_long(place: Path) -> None:
    def hours(gpus: str) -> float:
        where = ("--gpus", gpus, "--nodes", "1", "--cpus", "64")
        stage = plan(place, "--images", "1e8", "--experts", "64", *where)["stages"]["experts"]
        return float(stage["end_hours"] - stage["begin_hours"])

    assert hours("32") == pytest.approx(2 * hours("64"), rel=0.3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "say it with --images"),
        (("--images", "1e6", "--rate", "speed=3"), "there is no such rate; state gpu_tflops"),
        (("--images", "1e6", "--rate", "decode=-3"), "not a number above zero"),
        (("--images", "1e6", "--gpus", "7", "--nodes", "2"), "7 GPUs do not divide among 2 nodes"),
        (("--images", "1e6", "--rate", "decode=inf"), "not a number above zero"),
        (("--images", "1e6", "--calibrate", "runs/none"), "no run was begun in"),
        (("--images", "10", "--experts", "5000"), "10 images do not make 5,000 parts"),
        (
            ("--images", "1e6", "--cpus", "1", "--set", "trunk.num_threads=4"),
            "units of 4 CPUs and 0 GPUs fit on no node (1 nodes of 1",
        ),
        (("--images", "1e6", "--gpus", "8", "--set", "trunk.gpus=16"), "16 GPUs fit on no node (1 nodes of"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(place: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in refusal(invoke(place, "plan", *arguments))


@pytest.mark.parametrize("option", ["--images", "--image-bytes"])
@pytest.mark.parametrize("amount", ["0", "-5", "nan", "inf", "1e308"])
def test_amounts_that_there_cannot_be_are_a_wrong_command_line(place: Path, option: str, amount: str) -> None:
    result = invoke(place, "plan", *HUGE, option, amount)
    assert result.returncode == 2 and "is not a number from 1 to 1e+18" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("said", ['{"units": [{', "[]", '{"units": [{"unit": "trunk"}]}', '{"units": [{"seconds": NaN}]}'])
def test_damaged_provenance_is_refused_in_a_sentence(finished: Path, tmp_path: Path, said: str) -> None:
    root = copied_run(finished, tmp_path)
    (root / "trunk" / "provenance.json").write_text(said)
    assert "trunk/provenance.json is damaged" in refusal(invoke(tmp_path, "plan", "--calibrate", str(root)))


def test_resumed_training_is_planned_at_its_speed_and_not_by_its_last_try_alone(finished: Path, tmp_path: Path) -> None:
    root = copied_run(finished, tmp_path)
    path = root / "trunk" / "provenance.json"
    body = json.loads(path.read_text())
    (unit,) = body["units"]
    steps = payload(root, "trunk")["examples_seen"] / unit["said"]["examples/s"]
    unit["seconds"] = steps / 100
    path.write_text(json.dumps(body))
    trunk = plan(tmp_path, "--calibrate", str(root), "--cpus", "1", "--rate", "unit_seconds=1e-9")["stages"]["trunk"]
    assert 3600 * trunk["cpu_hours"] == pytest.approx(steps, rel=0.02)


def test_stage_that_was_taken_over_is_measured_where_it_was_built(finished: Path, tmp_path: Path) -> None:
    """Seen: a run that reuses another's dataset and trunk was planned with the rates of usual machines for both."""
    write_recipe(tmp_path, root="runs/more", partition={"experts": 2}, reuse=[str(finished / "runs" / "small")])
    (tmp_path / "photos").symlink_to((finished / "photos").resolve())
    run_here(tmp_path, "partition")
    options = ("--cpus", "1", "--rate", "unit_seconds=1e-9", "--calibrate")
    ours, theirs = (plan(tmp_path, *options, str(root))["rates"] for root in ("runs/more", finished / "runs" / "small"))
    for rates in ("seconds_per_row", "seconds_per_unit"):
        for stage in ("dataset", "trunk", "features"):
            assert ours[rates][stage] == theirs[rates][stage], stage


def test_plan_calibrated_by_a_run_tells_that_runs_own_hours(finished: Path, tmp_path: Path) -> None:
    """Every stage's hours of the same recipe and collection must come out as they were, whatever the machine did meanwhile."""
    root = finished / "runs" / "small"
    write_recipe(tmp_path, root="runs/other", dataset=SMALL["dataset"])
    stages = plan(tmp_path, "--calibrate", str(root), "--cpus", "1", "--rate", "unit_seconds=1e-9")["stages"]
    for name in ("dataset", "trunk", "features", "router", "decoder", "evaluation"):
        body = json.loads((root / name / "provenance.json").read_text())
        seconds = sum(unit["seconds"] for unit in body["units"])
        assert 3600 * stages[name]["cpu_hours"] == pytest.approx(seconds, rel=0.5 if name == "decoder" else 0.02), name
    assert plan(tmp_path, "--calibrate", str(root))["images"] == sum(payload(root, "dataset")["sizes"].values())


def test_table_is_for_people(place: Path) -> None:
    out = invoke(place, "plan", *HUGE).stdout
    assert "1,000,000,000 images, 64 experts, 4 nodes of 192 CPUs and 8 GPUs" in out
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["stage", "dataset"] and out.splitlines()[-1].startswith("all")
