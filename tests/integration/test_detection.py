"""`hardmoe detection` from images to the page: killed anywhere it ends with the same bits, and mistakes are one sentence."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import invoke, merged, real_images, records, refusal, write_photos, write_recipe

from hardmoe.detection import fit

TINY: dict[str, Any] = {
    "root": "runs/detection",
    "dataset": {"source": "parquet", "path": "photos/*.parquet", "shard_rows": 128},
    "canvases": {
        "size": 64,
        "num_train": 24,
        "num_test": 12,
        "num_classes": 2,
        "skip": ["thin", "light", "bold", "fill", "duotone"],
        "sizes": [[8, 10], [16, 22], [30, 50]],
        "shard_canvases": 10,
    },
    "detector": {"width": 4, "channels": 8, "depth": 1},
    "baseline": {"epochs": 2, "batch_size": 8, "checkpoint_every_steps": 2},
    "heads": {"epochs": 1, "batch_size": 8, "checkpoint_every_steps": 2, "systems": ["regression", "both"]},
    "bootstrap_replicates": 10,
    "execution": {"backend": "inline"},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with images and a small file."""
    directory = tmp_path_factory.mktemp("detection")
    write_photos(directory / "photos", real_images(500))
    (directory / "detection.yaml").write_text(yaml.safe_dump(TINY))
    return directory


@pytest.fixture(scope="module")
def whole(project: Path) -> dict[str, bytes]:
    """The records of a run that nobody disturbed, which vouch for every file."""
    result = invoke(project, "detection", "-f", "detection.yaml")
    assert result.returncode == 0, result.stderr
    assert "which expert takes which objects" in result.stdout
    return records(project / "runs" / "detection")


def test_run_leaves_table_and_a_page_that_needs_nothing_else(project: Path, whole: dict[str, bytes]) -> None:
    result = invoke(project, "detection", "-f", "detection.yaml", "--json")
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert list(told["systems"]) == ["baseline", "dense", "regression", "both"]
    assert set(told["differences"]) == {"regression - dense", "both - dense"}
    assert set(told["systems"]["both"]["experts"]) == {"regression", "classification"}
    for system in ("regression", "both"):
        for facts in told["systems"][system]["experts"].values():
            assert [round(sum(row), 6) for row in facts["by_range"]] == [1, 1, 1]
    seen = {system: each["training"]["canvases_seen"] for system, each in told["systems"].items()}
    assert seen == {"baseline": 48, "dense": 24, "regression": 24, "both": 24}, "the control is trained as long"
    page = Path(told["page"]).read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)
    assert page.count("<svg viewBox=") >= 12 and "which sizes" not in page
    assert records(project / "runs" / "detection") == whole


def test_run_killed_in_every_training_ends_with_the_same_bits(
    project: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = fit._step, []

    def dying(*given: Any) -> Any:
        calls.append(given)
        if len(calls) % 5 == 0:
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(fit, "_step", dying)
    codes = []
    while not codes or codes[-1] == 130:
        assert len(codes) < 12
        codes.append(invoke(project, "detection", "-f", "detection.yaml", "--root", "runs/killed").returncode)
    assert codes[-1] == 0 and codes.count(130) >= 3
    killed = records(project / "runs" / "killed")
    assert killed.keys() == whole.keys()
    for name, record in whole.items():
        assert json.loads(killed[name])["files"] == json.loads(record)["files"], name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"canvases": {"size": 70}}, "70 is no multiple of 32; set it to 64"),
        ({"canvases": {"sizes": [[8, 10], [9, 22], [30, 50]]}}, "not three ascending ranges"),
        ({"canvases": {"sizes": [[8, 10], [16, 22], [30, 65]]}}, "65 pixels do not fit on a canvas of 64"),
        ({"canvases": {"num_classes": 900}}, "fewer than 900; set it lower"),
        ({"heads": {"systems": ["both", "both"]}}, "names one twice"),
        ({"heads": {"moe": {"placement": "stage4"}}}, "mean nothing in heads"),
        ({"heads": {"moe": {"k": 5, "num_experts": 4}}}, "k: 5 is more than there are experts"),
        ({"trunk": {"epochs": 1}}, "unknown key 'trunk'; the sections are root"),
    ],
)
def test_mistakes_in_the_file_are_one_sentence(project: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    (project / "wrong.yaml").write_text(yaml.safe_dump(merged(TINY, changes)))
    result = invoke(project, "detection", "-f", "wrong.yaml", "--root", str(tmp_path / "run"))
    assert said in refusal(result, 3 if "fewer than" in said else 1)


def test_commands_that_look_know_the_run_by_its_root(project: Path, whole: dict[str, bytes]) -> None:
    def look(command: str, *arguments: str) -> str:
        result = invoke(project, command, *arguments, "--root", "runs/detection")
        assert result.returncode == 0, result.stderr
        return result.stdout

    rows = json.loads(look("status", "--json"))
    trained = [f"detectors/{system}" for system in ("baseline", "dense", "regression", "both")]
    assert [row["artifact"] for row in rows] == ["detection_set", *trained, "detection"]
    assert {row["state"] for row in rows} == {"done"}
    assert "detectors/both" in look("status")
    assert [line.partition(":")[0] for line in look("verify").splitlines()] == [row["artifact"] for row in rows]
    assert json.loads(look("show", "both", "--json"))["record"]["config"]["system"] == "both"
    look("logs")
    assert "nothing is running" in look("stop")
    assert "holds detectors and no mixture" in refusal(invoke(project, "export", "-o", "out", "--root", "runs/detection"))


def test_root_of_another_file_is_refused_with_what_differs(project: Path, whole: dict[str, bytes]) -> None:
    result = invoke(project, "detection", "-f", "detection.yaml", "--set", "canvases.num_test=13")
    assert "canvases.num_test: 12 -> 13" in refusal(result)
    assert "reads a file of its own" in refusal(invoke(project, "detection"))


def test_mixtures_and_detectors_never_lie_in_one_root(project: Path, whole: dict[str, bytes]) -> None:
    write_recipe(project)
    sentence = refusal(invoke(project, "run", "--root", "runs/detection"))
    assert sentence.endswith("holds detectors, and a mixture cannot lie beside; name another root with --root")
    (project / "runs" / "mine").mkdir()
    (project / "runs" / "mine" / "recipe.yaml").write_text("{}")
    sentence = refusal(invoke(project, "detection", "-f", "detection.yaml", "--root", "runs/mine"))
    assert sentence.endswith("holds a mixture, and detectors cannot lie beside; name another root with --root")
