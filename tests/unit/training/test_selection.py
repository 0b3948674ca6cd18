"""Early stop and best weights: decided by the validation split, and by nothing that an interruption could change."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_examples import make_examples

from hardmoe.errors import PreemptedError, RecipeError
from hardmoe.models.backbones import TagClassifier, build_backbone
from hardmoe.recipe import parse_recipe
from hardmoe.storage import LocalStorage
from hardmoe.training import loop
from hardmoe.training.checkpoint import Checkpoints
from hardmoe.training.config import TrainingConfig
from hardmoe.training.loop import TrainingReferences, TrainingResult, train
from hardmoe.training.metrics_log import MetricsLog
from hardmoe.training.reporting import TrainingProgress, TrainingSinks
from hardmoe.training.selection import Selection
from hardmoe.training.validation import ValidationScores, validate

CPU = torch.device("cpu")
CONFIG = TrainingConfig(
    epochs=6, batch_size=8, learning_rate=1.0, schedule="constant", checkpoint_every_steps=3, early_stop=2, keep="best"
)
SCORES = (0.2, 0.5, 0.5, 0.4, 0.9, 0.9)
"""Of the epochs, if there were no early stop: the second is not beaten by the third, which equals it, nor by the fourth."""


class Killed(Exception):
    """Stands for a signal."""


EXAMPLES, VALIDATION = make_examples(29, 0), make_examples(11, 1)
STEPS = 4
"""Of one epoch."""


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The validation's answers, by the epoch; what was really measured on these random images proves nothing."""
    torch.set_num_threads(1)
    wanted = list(SCORES)

    def scored(model: TagClassifier, *_: Any) -> ValidationScores:
        return ValidationScores(wanted[epochs_done(model) - 1], 1.0)

    monkeypatch.setattr(loop, "validate", scored)
    return wanted


def epochs_done(model: TagClassifier) -> int:
    """Batch normalisation counts the steps."""
    steps = int(model.state_dict()["backbone.network.stem.1.num_batches_tracked"])
    return steps // STEPS


def attempt(
    folder: Path | None, config: TrainingConfig = CONFIG, kill_at: int | None = None, stop_at: int | None = None
) -> tuple[TrainingResult, dict[str, torch.Tensor], list[dict[str, Any]]]:
    """One attempt: result, weights, log."""

    def watch(progress: TrainingProgress) -> None:
        if progress.step == kill_at:
            raise Killed

    model = TagClassifier(build_backbone("quicknet_w4", image_size=8, seed=1), 5, seed=2)
    log, checkpoints = MetricsLog(), None
    first = 1
    if folder is not None:
        checkpoints = Checkpoints(LocalStorage(folder), "checkpoints")
        latest = checkpoints.latest()
        first = 1 if latest is None else latest.step + 1
    asked = count(first)
    sinks = TrainingSinks(checkpoints, log, watch, lambda: "told to" if next(asked) == stop_at else None)
    result = train(model, EXAMPLES, config, seed=0, devices=[CPU], references=TrainingReferences(VALIDATION), sinks=sinks)
    return result, model.state_dict(), log.rows


def with_weights_after(epochs: int, **change: Any) -> dict[str, torch.Tensor]:
    """The weights of a training that is the same up to there, which a constant schedule without warm-up makes possible."""
    config = CONFIG.model_copy(update={"epochs": epochs, "early_stop": None, "keep": "last", **change})
    return attempt(None, config)[1]


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_training_ends_after_so_many_epochs_without_a_better_score_with_the_best_ones_weights(scores: list[float]) -> None:
    config = CONFIG.model_copy(update={"warmup_fraction": 0.0})
    result, weights, rows = attempt(None, config)
    assert result.selection == Selection(planned_steps=24, stopped_early=True, kept_step=8)
    assert (result.steps, result.examples_seen, result.samples_per_epoch) == (16, 4 * 29, (29,) * 4)
    assert result.validation_precision_at_1 == 0.5
    assert same_bits(weights, with_weights_after(2, warmup_fraction=0.0))
    assert rows[-1] == {"step": 16, "epoch": 4, "planned_steps": 24, "stopped_early": True, "kept_step": 8}


def test_row_of_the_last_loss_covers_every_step_before_an_early_stop(scores: list[float]) -> None:
    result, _, rows = attempt(None)
    losses = [row for row in rows if "loss" in row]
    assert [row["step"] for row in losses] == [4, 8, 12, 16]
    assert result.final_loss == losses[-1]["loss"]


@pytest.mark.parametrize(
    ("change", "kept", "steps", "epochs"),
    [
        ({"early_stop": None}, 20, 24, 5),
        ({"keep": "last"}, 16, 16, 4),
        ({"early_stop": 3}, 20, 24, 5),
        ({"early_stop": 1, "keep": "last"}, 12, 12, 3),
        ({"ema_decay": 0.9}, 8, 16, None),
    ],
)
def test_either_rule_works_without_the_other(
    scores: list[float], change: dict[str, Any], kept: int, steps: int, epochs: int | None
) -> None:
    config = CONFIG.model_copy(update={"warmup_fraction": 0.0, **change})
    result, weights, _ = attempt(None, config)
    assert result.selection is not None
    assert (result.selection.kept_step, result.steps) == (kept, steps)
    if epochs is not None:
        assert same_bits(weights, with_weights_after(epochs, warmup_fraction=0.0))


def test_best_weights_are_the_average_that_was_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def noted(model: TagClassifier, *arguments: Any) -> ValidationScores:
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        validate(model, *arguments)
        return ValidationScores(0.9 if len(seen) == 3 else 0.1, 1.0)

    monkeypatch.setattr(loop, "validate", noted)
    _, weights, _ = attempt(None, CONFIG.model_copy(update={"ema_decay": 0.9}))
    assert len(seen) == 5
    assert same_bits(weights, seen[2])


@pytest.mark.parametrize("change", [{}, {"keep": "last"}, {"early_stop": None, "ema_decay": 0.9}])
@pytest.mark.parametrize("kills", [(2,), (8, 9), (11, 13), (16,)])
def test_killed_and_resumed_training_ends_at_the_same_step_with_the_same_bits(
    tmp_path: Path, scores: list[float], change: dict[str, Any], kills: tuple[int, ...]
) -> None:
    config = CONFIG.model_copy(update=change)
    expected = attempt(None, config)
    for kill_at in kills:
        with pytest.raises(Killed):
            attempt(tmp_path, config, kill_at=kill_at)
    result, weights, rows = attempt(tmp_path, config)
    assert (result, rows) == (expected[0], expected[2])
    assert same_bits(weights, expected[1])


def test_killed_after_the_last_checkpoint_of_a_stopped_training_is_through(tmp_path: Path, scores: list[float]) -> None:
    config = CONFIG.model_copy(update={"checkpoint_every_steps": 4})
    with pytest.raises(Killed):
        attempt(tmp_path, config, kill_at=16)
    assert json.loads((tmp_path / "checkpoints/step-00000016/state.json").read_text())["step"] == 16
    result, weights, rows = attempt(tmp_path, config, kill_at=17)
    assert (result, rows) == (attempt(None, config)[0], attempt(None, config)[2])
    assert same_bits(weights, attempt(None, config)[1])


def test_asked_to_stop_at_the_step_of_an_early_stop_it_is_through(tmp_path: Path, scores: list[float]) -> None:
    with pytest.raises(PreemptedError, match="at step 15 of 24"):
        attempt(tmp_path, stop_at=15)
    assert attempt(tmp_path, stop_at=16)[0].steps == 16


def test_part_without_validation_images_is_trained_to_the_end(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = TagClassifier(build_backbone("quicknet_w4", image_size=8, seed=1), 5, seed=2)
    result = train(model, EXAMPLES, CONFIG, seed=0, devices=[CPU], references=TrainingReferences(VALIDATION.take(np.arange(0))))
    assert result.selection == Selection(24, stopped_early=False, kept_step=24)
    assert same_bits(model.state_dict(), with_weights_after(6))


@pytest.mark.parametrize("every", [2, None])
def test_best_weights_of_a_way_that_was_given_up_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int | None
) -> None:
    """The first pass is best after its second epoch and loses its loss after the third; the next, at half the rate, is worse."""
    torch.set_num_threads(1)
    answers = iter([(0.3, 1.0), (0.99, 1.0), (0.1, float("nan")), *((score, 1.0) for score in SCORES)])
    monkeypatch.setattr(loop, "validate", lambda *_: ValidationScores(*next(answers)))
    config = CONFIG.model_copy(update={"warmup_fraction": 0.0, "checkpoint_every_steps": every})
    result, weights, _ = attempt(tmp_path, config)
    assert result.divergence is not None
    assert result.validation_precision_at_1 == 0.5
    assert result.selection == Selection(24, stopped_early=True, kept_step=8)
    monkeypatch.setattr(loop, "validate", lambda *_: ValidationScores(0.5, 1.0))
    assert same_bits(weights, with_weights_after(2, warmup_fraction=0.0, learning_rate=0.5))


@pytest.mark.parametrize("section", ["trunk", "experts"])
@pytest.mark.parametrize("change", [{"early_stop": 2}, {"keep": "best"}])
def test_choosing_by_validation_images_is_refused_where_there_are_none(section: str, change: dict[str, Any]) -> None:
    recipe = {"dataset": {"validation_fraction": 0.0}, section: change}
    with pytest.raises(RecipeError, match=rf"{section}\.{next(iter(change))} is decided on validation images") as refused:
        parse_recipe(recipe, "recipe.yaml")
    assert "set that to 0.05" in str(refused.value)
    parse_recipe({**recipe, "dataset": {"validation_fraction": 0.0, "split_column": "split"}}, "recipe.yaml")
