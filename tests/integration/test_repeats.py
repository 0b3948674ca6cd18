"""Rare hashtags shown more often: a whole run, its control, and how unique images and samples are reported apart."""

import json
import re
from pathlib import Path

import pytest
from support import payload, real_images, run_here, write_photos, write_recipe

TRAINED = ("trunk", "baselines/dense", "experts/expert-0000")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("repeats")
    write_photos(directory / "photos", real_images(200))
    write_recipe(
        directory,
        trunk={"repeat_threshold": 0.2},
        experts={"repeat_threshold": 0.2},
        partition={"experts": 1},
        evaluation={"map_replicates": 2},
    )
    run_here(directory, "report")
    return directory / "runs" / "small"


@pytest.mark.parametrize("name", TRAINED)
def test_networks_report_unique_images_and_samples_apart(root: Path, name: str) -> None:
    facts = payload(root, name)
    labelled = payload(root, "dataset")["sizes"]["train"]
    assert facts["unique_examples"] <= labelled
    assert all(samples > facts["unique_examples"] for samples in facts["samples_per_epoch"])
    assert facts["examples_seen"] == sum(facts["samples_per_epoch"])
    rows = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    assert [row["samples"] for row in rows if "samples" in row] == facts["samples_per_epoch"]
    assert rows[-1]["step"] == facts["steps"]


def test_expert_of_a_mixture_of_one_is_the_control_with_repeats_as_well(root: Path) -> None:
    expert, dense = (root / name / "model.safetensors" for name in ("experts/expert-0000", "baselines/dense"))
    assert expert.read_bytes() == dense.read_bytes()
    assert payload(root, "experts/expert-0000")["samples_per_epoch"] == payload(root, "baselines/dense")["samples_per_epoch"]


def test_page_shows_unique_images_and_samples_per_epoch(root: Path) -> None:
    page = (root / "report" / "index.html").read_text()
    facts = payload(root, "trunk")
    row = re.search(r"<code>trunk</code></th>(.*?)</tr>", page[page.index(">Networks<") :], re.DOTALL)
    assert row is not None
    cells = re.findall(r"<td>(?:<code>)?([^<]*)", row[1])
    assert cells[3:6] == [str(facts["unique_examples"]), str(facts["samples_per_epoch"][0]), str(facts["examples_seen"])]
