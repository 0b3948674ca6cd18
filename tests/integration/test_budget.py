"""Experts of unequal parts that are shown equally many images: a whole run, and what it costs beside the dense baseline."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import payload, real_images, run_here, write_photos, write_recipe

from hardmoe.errors import RecipeError
from hardmoe.experts.config import ExpertsConfig
from hardmoe.experts.stages import dense_stage, expert_stage
from hardmoe.recipe import parse_recipe


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("budget")
    write_photos(directory / "photos", real_images(200))
    write_recipe(
        directory,
        experts={"budget": "examples", "epochs": 3},
        partition={"experts": 3},
        evaluation={"map_replicates": 2},
    )
    run_here(directory, "report")
    return directory / "runs" / "small"


def test_experts_are_shown_as_many_images_and_together_as_many_as_the_dense_baseline(root: Path) -> None:
    facts = [payload(root, f"experts/expert-{expert:04d}") for expert in range(3)]
    assert len({told["unique_examples"] for told in facts}) > 1, "parts of one size would prove nothing"
    seen = [told["examples_seen"] for told in facts]
    assert max(seen) - min(seen) <= 1
    dense = payload(root, "baselines/dense")
    assert sum(seen) == dense["examples_seen"] == 3 * dense["unique_examples"]
    for told in facts:
        *whole, last = told["samples_per_epoch"]
        assert set(whole) <= {told["unique_examples"]}
        assert 0 < last <= told["unique_examples"]
        assert sum(whole) + last == told["examples_seen"]


def test_metrics_of_an_expert_say_what_each_epoch_showed(root: Path) -> None:
    facts = payload(root, "experts/expert-0000")
    rows = [json.loads(line) for line in (root / "experts/expert-0000" / "metrics.jsonl").read_text().splitlines()]
    assert [row["samples"] for row in rows if "samples" in row] == facts["samples_per_epoch"]
    assert rows[-1]["step"] == facts["steps"]


def test_budget_is_part_of_an_experts_identity_and_not_of_the_dense_baselines() -> None:
    by_epochs, by_examples = ExpertsConfig(), ExpertsConfig(budget="examples")
    assert expert_stage(by_epochs, 1, 0).config != expert_stage(by_examples, 1, 0).config
    assert dense_stage(by_epochs, 0) == dense_stage(by_examples, 0)


@pytest.mark.parametrize(
    ("recipe", "remedy"),
    [
        ({"experts": {"budget": "examples", "repeat_threshold": 0.1}}, "repeat_threshold: null"),
        ({"experts": {"budget": "examples"}, "partition": {"overlap": 1.1}}, "experts.budget: epochs"),
        ({"experts": {"loss": "sigmoid"}}, "trunk.loss: sigmoid"),
        ({"experts": {"augment": {"flop": True}}}, "did you mean 'experts.augment.flip'"),
        ({"trunk": {"augment": {"crop": 2}}}, "trunk.augment.crop must be at most 1"),
    ],
)
def test_training_sections_that_cannot_be_are_refused_with_the_remedy(recipe: dict[str, Any], remedy: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(recipe, "recipe.yaml")
    assert remedy in str(refused.value)
