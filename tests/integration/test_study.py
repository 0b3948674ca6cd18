"""`hardmoe sweep`: variations of one recipe, each a run that takes over what is the same, and one table of all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support import invoke, metrics, refusal, run_here, write_recipe

STUDY: dict[str, Any] = {
    "recipe": "hardmoe.yaml",
    "root": "runs/study",
    "seeds": [0, 5],
    "lines": {"affine": None, "plain": {"decoder.align": "none"}},
}


def write_study(directory: Path, **changes: Any) -> str:
    (directory / "study.yaml").write_text(yaml.safe_dump({**STUDY, **changes}))
    return "study.yaml"


@pytest.fixture(scope="module")
def directory(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two lines and two seeds, of which the finished run is one."""
    directory = tmp_path_factory.mktemp("study")
    (directory / "photos").symlink_to((finished / "photos").resolve())
    write_recipe(directory)
    write_study(directory, reuse=[str(finished / "runs/small")])
    run_here(directory, "sweep", "study.yaml", "--backend", "inline")
    return directory


def test_lines_share_what_they_have_in_common(directory: Path, finished: Path) -> None:
    def origin(run: str, artifact: str) -> str | None:
        record = json.loads((directory / "runs/study" / run / artifact / "artifact.json").read_bytes())
        return record.get("reused_from")

    assert "runs/small" in (origin("affine-seed0", "experts/expert-0001") or "")
    assert "runs/small" in (origin("affine-seed5", "dataset") or "")
    assert origin("affine-seed5", "trunk") is None
    assert "affine-seed5" in (origin("plain-seed5", "experts/expert-0001") or "")
    assert origin("plain-seed5", "decoder") is None


def test_the_table_has_every_line_with_intervals_over_seeds_and_images(directory: Path, finished: Path) -> None:
    # The finished run is the first line's first seed to the last byte, its evaluation included.
    roots = {(name, seed): directory / f"runs/study/{name}-seed{seed}" for name in ("affine", "plain") for seed in (0, 5)}
    roots["affine", 0] = finished / "runs/small"
    result = invoke(directory, "sweep", "study.yaml", "--backend", "inline", "--json")
    assert result.returncode == 0, result.stderr
    affine, plain = json.loads(result.stdout)
    for row, name in ((affine, "affine"), (plain, "plain")):
        found = [metrics(roots[name, seed]) for seed in (0, 5)]
        for system in ("mixture", "dense_refit"):
            values = [each["systems"][system]["precision@1"]["value"] for each in found]
            assert row["systems"][system]["value"] == pytest.approx(np.mean(values))
            assert row["systems"][system]["low"] <= row["systems"][system]["value"] <= row["systems"][system]["high"]
        differences = [each["differences"]["mixture - dense_refit"]["precision@1"]["value"] for each in found]
        assert row["mixture - dense_refit"]["value"] == pytest.approx(np.mean(differences))
    between = plain["systems"]["mixture"]["value"] - affine["systems"]["mixture"]["value"]
    assert plain["mixture - first line's"]["value"] == pytest.approx(between)
    assert "mixture - first line's" not in affine
    printed = invoke(directory, "sweep", "study.yaml", "--backend", "inline", "--only", "plain").stdout
    assert "mean of 2 seeds; 95 % bootstrap intervals over seeds and test images" in printed
    assert [line.split()[0] for line in printed.splitlines()[3:]] == ["affine", "plain"]


@pytest.mark.parametrize(
    ("changes", "arguments", "sentence"),
    [
        ({"lines": {"A line": None}}, (), "the line 'A line' names a directory; use small letters"),
        ({"lines": {}}, (), "study.yaml: lines: dictionary should have at least 1 item"),
        ({"seeds": [1, 1]}, (), "seeds: [1, 1] names one twice"),
        (
            {"lines": {"bad": {"decoder.algin": "none"}}},
            (),
            "line 'bad': hardmoe.yaml: unknown key 'decoder.algin'",
        ),
        ({"recipe": "other.yaml"}, (), "there is no recipe other.yaml"),
        ({}, ("--only", "none"), "--only none: the lines of study.yaml are affine, plain"),
        ({"folder": "x"}, (), "a study has recipe, root and lines, and may have seeds, metric and reuse"),
    ],
)
def test_a_wrong_study_is_refused_before_anything_is_built(
    tmp_path: Path, changes: dict[str, Any], arguments: tuple[str, ...], sentence: str
) -> None:
    write_recipe(tmp_path)
    write_study(tmp_path, **changes)
    assert sentence in refusal(invoke(tmp_path, "sweep", "study.yaml", *arguments))
    assert not (tmp_path / "runs").exists()


def test_a_study_that_is_not_there_is_refused(tmp_path: Path) -> None:
    said = refusal(invoke(tmp_path, "sweep", "study.yaml"))
    assert said == "there is no study study.yaml; name a YAML file with recipe, root and lines"
