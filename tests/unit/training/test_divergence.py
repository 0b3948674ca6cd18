"""A loss that is no number: back once, on at half the learning rate, and the same way whatever was killed or saved."""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import torch
from labelled_examples import make_examples
from torch import nn

from hardmoe.errors import HardmoeError
from hardmoe.models.backbones import TagClassifier, build_backbone
from hardmoe.storage import LocalStorage
from hardmoe.training import divergence, loop
from hardmoe.training.checkpoint import Checkpoints
from hardmoe.training.config import TrainingConfig
from hardmoe.training.divergence import Divergence, anchor_before, anchors_needed
from hardmoe.training.loop import TrainingReferences, TrainingResult, train
from hardmoe.training.metrics_log import MetricsLog
from hardmoe.training.reporting import TrainingProgress, TrainingSinks

CONFIG = TrainingConfig(epochs=4, batch_size=8, learning_rate=2.0, warmup_fraction=0, checkpoint_every_steps=None)
ANCHOR, MARGIN = 6, 2
STEPS = 28


class Fuse(nn.Module):
    """A linear network that gives no numbers any more once a weight has moved too far, as where an activation overflows."""

    num_features = 8
    limit = float("inf")

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Flatten()
        self.layer = nn.Linear(3 * 64, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layer(self.flat(images))
        return features * float("nan") if self.training and self.size() > self.limit else features

    def size(self) -> float:
        return float(self.layer.weight.detach().norm())


@pytest.fixture(autouse=True, scope="module")
def _short_way_back() -> Iterator[None]:
    module = ModuleType("their_fuse")
    module.build = lambda image_size: Fuse()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "their_fuse", module)
        patch.setattr(divergence, "ANCHOR_STEPS", ANCHOR)
        patch.setattr(divergence, "MARGIN_STEPS", MARGIN)
        yield


EXAMPLES, VALIDATION = make_examples(52, 0), make_examples(9, 1)


class Killed(Exception):
    """Stands for a signal."""


@dataclass
class Attempt:
    folder: Path
    config: TrainingConfig = CONFIG
    steps: list[int] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)
    """Of the weights, after every step."""

    def run(self, kill_after: int | None = None) -> tuple[TrainingResult, dict[str, torch.Tensor], bytes]:
        """`kill_after` counts the steps of this attempt, those done again as well."""
        torch.manual_seed(3)
        model = TagClassifier(build_backbone("their_fuse:build", image_size=8, seed=1), 5, seed=2)
        fuse = next(module for module in model.modules() if isinstance(module, Fuse))
        self.steps.clear()
        self.sizes.clear()

        def watch(progress: TrainingProgress) -> None:
            self.steps.append(progress.step)
            self.sizes.append(fuse.size())
            if len(self.steps) == kill_after:
                raise Killed

        log = MetricsLog()
        sinks = TrainingSinks(Checkpoints(LocalStorage(self.folder), "c"), log, watch)
        device, references = torch.device("cpu"), TrainingReferences(VALIDATION)
        result = train(model, EXAMPLES, self.config, seed=0, devices=[device], references=references, sinks=sinks)
        return result, model.state_dict(), log.to_bytes()


@dataclass(frozen=True)
class Blown:
    """A fuse that blows once, at full learning rate."""

    limit: float
    step: int
    """Whose loss is then no number."""
    whole: tuple[TrainingResult, dict[str, torch.Tensor], bytes]
    """The training that went back, undisturbed."""


@pytest.fixture(scope="module")
def _blown(_short_way_back: None, tmp_path_factory: pytest.TempPathFactory) -> Blown:
    tmp_path = tmp_path_factory.mktemp("blown")
    Fuse.limit = float("inf")
    plain = Attempt(tmp_path / "plain")
    plain.run()
    sizes = list(plain.sizes)
    # The step is found by trying: the first that is late enough to go back to somewhere, and that half the rate never reaches.
    for step in range(ANCHOR + MARGIN + 2, STEPS):
        Fuse.limit = sizes[step - 2] * (1 - 1e-6)
        if max(sizes[: step - 2]) < Fuse.limit:
            attempt = Attempt(tmp_path / f"try-{step}")
            try:
                return Blown(Fuse.limit, step, attempt.run())
            except HardmoeError:
                continue
    raise AssertionError("half the learning rate is no remedy in this setup")


@pytest.fixture
def blown(_blown: Blown) -> Iterator[Blown]:
    """With the fuse in place."""
    Fuse.limit = _blown.limit
    yield _blown
    Fuse.limit = float("inf")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_place_to_go_back_to_is_a_multiple_that_lies_before_the_margin() -> None:
    assert [anchor_before(step) for step in (1, 8, 9, 14, 15, 21)] == [0, 0, 6, 6, 12, 18]
    for done in range(60):
        for later in range(done + 1, 61):
            assert anchor_before(later) in anchors_needed(done) | {0} or anchor_before(later) > done


def test_training_goes_back_and_on_at_half_the_rate_and_says_so(
    tmp_path: Path, blown: Blown, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lost_at = blown.step
    back_to = (lost_at - 1 - MARGIN) // ANCHOR * ANCHOR
    assert 0 < back_to < lost_at
    attempt = Attempt(tmp_path / "fuse")
    with caplog.at_level(logging.WARNING):
        result, weights, metrics = attempt.run()
    assert result.divergence == Divergence(lost_at, back_to, 0.5)
    assert result.steps == STEPS
    assert f"the loss became nan at step {lost_at} of {STEPS}" in caplog.text
    assert f"goes back to step {back_to} and on from there with half the learning rate" in caplog.text
    rows = [json.loads(line) for line in metrics.splitlines()]
    assert [row for row in rows if "diverged_at" in row] == [
        {"step": back_to, "diverged_at": lost_at, "learning_rate_factor": 0.5}
    ]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert [row["epoch"] for row in rows if "validation_loss" in row] == [1, 2, 3, 4]
    # The oracle never loses its loss: it is a training whose rate is halved from that step on.
    Fuse.limit = float("inf")
    rate = loop.learning_rate_at
    monkeypatch.setattr(loop, "learning_rate_at", lambda step, *rest: rate(step, *rest) * (0.5 if step >= back_to else 1))
    oracle = Attempt(tmp_path / "oracle").run()
    assert same(weights, oracle[1])
    assert result.final_loss == oracle[0].final_loss


@pytest.mark.parametrize("every", [None, 1, 4, 5, 7])
@pytest.mark.parametrize("kills", [(), (3,), (9, 2), (14,), (17, 1), (25, 4)])
def test_killed_anywhere_it_takes_the_same_way_wherever_its_checkpoints_fell(
    tmp_path: Path, blown: Blown, every: int | None, kills: tuple[int, ...]
) -> None:
    expected = blown.whole
    attempt = Attempt(tmp_path / "killed", CONFIG.model_copy(update={"checkpoint_every_steps": every}))
    for kill_after in kills:
        try:
            attempt.run(kill_after)
        except Killed:
            continue
    result, weights, metrics = attempt.run()
    assert (result, metrics) == (expected[0], expected[2])
    assert same(weights, expected[1])


@pytest.mark.usefixtures("blown")
def test_loss_lost_a_second_time_names_both_steps_and_the_remedy(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path / "lost", CONFIG.model_copy(update={"checkpoint_every_steps": 3}))
    Fuse.limit = 0.0
    with pytest.raises(HardmoeError) as caught:
        attempt.run()
    sentence = str(caught.value)
    assert sentence.startswith("the loss became nan at step 1 of 28, at learning rate 0.03")
    assert "after it was lost at step 1 already and the training went back to step 0 with half the learning rate" in sentence
    assert sentence.endswith("lower learning_rate (now 2) and run again")
    with pytest.raises(HardmoeError) as again:
        attempt.run()
    assert str(again.value) == sentence, "run again without a change, it comes to the same end"
