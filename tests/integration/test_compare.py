"""`hardmoe report --compare`: finished runs side by side; paired where the test examples are the same, and only read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import CHROMIUM, browser
from s3 import Store
from support import invoke, metrics, payload, refusal, snapshot

from hardmoe.evaluation.metrics import METRICS
from hardmoe.storage import open_storage


def compared(directory: Path, *arguments: str) -> dict[str, Any]:
    result = invoke(directory, "report", "--compare", "--json", *arguments)
    assert result.returncode == 0, result.stderr
    body: dict[str, Any] = json.loads(result.stdout)
    return body


def replicates(root: Path) -> dict[tuple[str, str], Any]:
    """Every system's and metric's draws, read without hardmoe."""
    names, values = metrics(root)["replicates"], np.load(root / "evaluation/replicates.npy")
    return {(s, m): values[i, j] for i, s in enumerate(names["systems"]) for j, m in enumerate(names["metrics"])}


def test_runs_of_one_test_set_are_paired_image_by_image(root: Path, root_of_one_expert: Path, tmp_path: Path) -> None:
    before = snapshot(root), snapshot(root_of_one_expert)
    body = compared(tmp_path, str(root), str(root_of_one_expert), "--against", "dense_refit")
    assert (snapshot(root), snapshot(root_of_one_expert)) == before, "a root that is compared is only read"
    assert body["test_sets"]["is_same"] and "every difference is paired" in body["test_sets"]["sentence"]
    first, second = body["runs"]
    assert (body["against"]["run"], body["against"]["system"]) == (first["name"], "dense_refit")
    ours, theirs = replicates(root_of_one_expert), replicates(root)
    for metric in METRICS:
        told = second["systems"]["mixture"]["difference"]["metrics"][metric]
        draws = ours["mixture", metric] - theirs["dense_refit", metric]
        assert told["value"] == pytest.approx(draws[0])
        assert (told["low"], told["high"]) == pytest.approx(np.quantile(draws[1:], [0.025, 0.975]))
    assert "difference" not in first["systems"]["dense_refit"]
    # In one run the difference is the evaluation's own.
    own = metrics(root)["differences"]["mixture - dense_refit"]["precision@1"]
    assert first["systems"]["mixture"]["difference"]["metrics"]["precision@1"] == pytest.approx(own)
    assert first["gain"] == pytest.approx(own)
    assert [run["num_experts"] for run in body["runs"]] == [3, 1]
    page = (tmp_path / "compare.html").read_text()
    seen = [run["systems"]["mixture"]["cost"]["images_seen"] for run in body["runs"]]
    assert all(f"after {count:,} images" in page for count in seen), "a point for each run in the chart of gains"


def test_every_system_comes_with_metrics_costs_and_what_its_trainings_noted(root: Path, tmp_path: Path) -> None:
    (run,) = compared(tmp_path, str(root))["runs"]
    results = metrics(root)
    assert list(run["systems"]) == list(results["systems"])
    for system, told in run["systems"].items():
        assert told["metrics"] == results["systems"][system]
        assert told["cost"] == {**results["costs"][system], "rho": 0.0}
    experts = [f"experts/expert-{number:04d}" for number in range(3)]
    seen, seconds, spans = 0, 0.0, 0.0
    for name in ["trunk", *experts]:
        provenance = json.loads((root / name / "provenance.json").read_text())
        (unit,) = provenance["units"]
        examples = payload(root, name)["examples_seen"]
        seen, seconds = seen + examples, seconds + examples / unit["said"]["examples/s"]
        spans += provenance["seconds"]
    mixture = run["systems"]["mixture"]
    assert mixture["examples_per_second"] == pytest.approx(seen / seconds)
    # Inline they come one after the other, each a little after it was begun.
    assert 0 < mixture["training_seconds"] <= spans + 1e-3
    assert mixture["training_seconds"] <= run["training_seconds"]
    assert run["machines"] == [next(iter(provenance["machines"].values()))]
    assert run["commits"] == [provenance["commit"]] if provenance["commit"] else run["commits"] == []


def test_what_was_taken_over_tells_of_where_it_was_built(root: Path, root_of_one_expert: Path, tmp_path: Path) -> None:
    """Its own provenance says zero seconds: the training of a trunk that is reused would be free, and as fast as can be."""
    assert "units" in json.loads((root / "trunk/provenance.json").read_text())
    first, second = compared(tmp_path, str(root), str(root_of_one_expert))["runs"]
    trunk = [run["systems"]["trunk"] for run in (first, second)]
    assert trunk[0]["examples_per_second"] == trunk[1]["examples_per_second"] is not None
    assert trunk[0]["training_seconds"] == trunk[1]["training_seconds"] > 0


def test_runs_of_other_test_examples_are_said_to_be_so_and_not_paired(root: Path, resharded_root: Path, tmp_path: Path) -> None:
    body = compared(tmp_path, str(root), str(resharded_root))
    said = body["test_sets"]["sentence"]
    assert not body["test_sets"]["is_same"] and "different datasets" in said and "unpaired" in said
    difference = body["runs"][1]["systems"]["dense"]["difference"]
    ours, theirs = (metrics(each)["systems"] for each in (resharded_root, root))
    expected = ours["dense"]["precision@1"]["value"] - theirs["mixture"]["precision@1"]["value"]
    told = difference["metrics"]["precision@1"]
    assert not difference["is_paired"]
    assert (told["value"], told["low"], told["high"]) == (pytest.approx(expected), None, None)
    printed = invoke(tmp_path, "report", "--compare", str(root), str(resharded_root)).stdout
    assert said in printed and "(unpaired)" in printed
    page = (tmp_path / "compare.html").read_text()
    assert said in page and "<small>unpaired</small>" in page


def test_runs_in_an_object_store_are_compared_like_those_in_a_directory(root: Path, s3_store: Store, tmp_path: Path) -> None:
    uri = s3_store.root()
    storage = open_storage(uri)
    for path in root.rglob("*"):
        if path.suffix in (".json", ".npy") and "_progress" not in path.parts:
            storage.write_bytes(str(path.relative_to(root)), path.read_bytes())
    here, there = compared(tmp_path, str(root), uri)["runs"]
    assert there["systems"]["dense"]["metrics"] == here["systems"]["dense"]["metrics"]
    assert there["systems"]["dense"]["examples_per_second"] == here["systems"]["dense"]["examples_per_second"]
    assert there["systems"]["mixture"]["difference"]["metrics"]["precision@1"]["value"] == 0


def test_tables_name_runs_by_what_tells_them_apart(root: Path, root_of_one_expert: Path, tmp_path: Path) -> None:
    result = invoke(tmp_path, "report", "--compare", str(root), str(root_of_one_expert), "-o", "page.html")
    assert result.returncode == 0, result.stderr
    names = [each.parts[-3] for each in (root, root_of_one_expert)]
    for name in names:
        rows = [line.split() for line in result.stdout.splitlines() if line.startswith(name)]
        assert [row[1] for row in rows if row[1] == "mixture"] == ["mixture"] * 3, "metrics, costs, times"
    for heading in (
        "precision@1",
        "parameters",
        "FLOP/image",
        "training FLOP",
        "images shown",
        "examples/s",
        "commit",
        "machine",
    ):
        assert heading in result.stdout
    assert result.stdout.rstrip().endswith("page: page.html") and (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("{root}", "nowhere"), "nowhere has no finished evaluation; finish it with 'hardmoe evaluate', or leave it out"),
        (("{root}", "{root}/"), "is named twice; name every run once"),
        (("{root}", "--against", "best"), "--against best: the run 'small' has no system 'best'; it has trunk, dense"),
        (("{root}", "--against", "other:dense"), "--against other:dense: there is no run 'other'; the runs are small"),
        (("{root}", "-o", "missing/page.html"), "cannot write missing/page.html: no such file or directory; name another file"),
    ],
)
def test_mistake_is_one_sentence(root: Path, tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    said = refusal(invoke(tmp_path, "report", "--compare", *(each.format(root=root) for each in arguments)))
    assert sentence in said
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--compare",), "--compare needs the root of at least one finished run"),
        (("--compare", "runs/a", "--root", "runs/b"), "--compare reads finished runs and takes no recipe"),
        (("runs/a",), "ROOT, --against, --out and --json go with --compare"),
    ],
)
def test_wrong_command_line_is_refused(tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    result = invoke(tmp_path, "report", *arguments)
    assert result.returncode == 2 and sentence in result.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_page_fits_a_desk_and_a_telephone_and_asks_for_nothing(
    root: Path, root_of_one_expert: Path, resharded_root: Path, tmp_path: Path
) -> None:
    compared(tmp_path, str(root), str(root_of_one_expert), str(resharded_root))
    with browser(tmp_path / "profile") as page:
        for width in (1200, 390):
            page.open((tmp_path / "compare.html").as_uri(), width)
            assert page.run("document.documentElement.scrollWidth <= window.innerWidth"), "something is wider than the screen"
            assert page.run("performance.getEntriesByType('resource').length") == 0
            page.screenshot(tmp_path / f"compare-{width}.png")
            assert page.errors == []
