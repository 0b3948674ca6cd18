"""The training loop: what it learns, and that an interruption leaves no trace."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hardmoe.data.loader import ExampleSet
from hardmoe.errors import HardmoeError, PreemptedError, StorageError
from hardmoe.models.backbones import TagClassifier, build_backbone, normalise_images
from hardmoe.models.single_values import running_statistics_for_single_values
from hardmoe.storage import LocalStorage
from hardmoe.training import loop
from hardmoe.training.checkpoint import Checkpoints
from hardmoe.training.config import AugmentConfig, TrainingConfig
from hardmoe.training.loop import TrainingReferences, TrainingResult, train
from hardmoe.training.metrics_log import MetricsLog
from hardmoe.training.optim import learning_rate_at
from hardmoe.training.reporting import TrainingProgress, TrainingSinks
from hardmoe.training.validation import validate

CPU = torch.device("cpu")
NUM_TAGS = 6
CONFIG = TrainingConfig(epochs=3, batch_size=8, learning_rate=1.0, checkpoint_every_steps=7)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_examples(num: int, seed: int = 0, size: int = 8) -> ExampleSet:
    """Noise with a bright channel that is the first tag; some examples carry further tags at random."""
    chance = np.random.default_rng(seed)
    ids = chance.integers(0, 256, (num, 16), dtype=np.uint8)
    images = chance.integers(0, 100, (num, 3, size, size), dtype=np.uint8)
    colours = chance.integers(0, 3, num)
    images[np.arange(num), colours] += 120
    labels = [[int(colour), *range(3, 3 + int(extra))] for colour, extra in zip(colours, chance.integers(0, 3, num), strict=True)]
    offsets = np.cumsum([0, *map(len, labels)])
    indices = np.array([tag for tags in labels for tag in tags], dtype=np.int32)
    return ExampleSet(ids, images, np.arange(num), indices, offsets)


def make_model(name: str = "quicknet_w4") -> TagClassifier:
    return TagClassifier(build_backbone(name, image_size=8, seed=1), NUM_TAGS, seed=2)


EXAMPLES, VALIDATION = make_examples(61), make_examples(21, seed=1)
REFERENCES = TrainingReferences(VALIDATION)


class Killed(Exception):
    """Stands for a signal."""


@dataclass
class Attempt:
    """A training in a folder that can be killed after a step and run again."""

    folder: Path
    config: TrainingConfig = CONFIG
    backbone: str = "quicknet_w4"
    seed: int = 0
    examples: ExampleSet | None = None
    stop_at: int | None = None
    """Step after which it is asked to stop."""

    def __post_init__(self) -> None:
        self.storage = LocalStorage(self.folder)
        self.progress: list[TrainingProgress] = []

    def run(self, kill_at: int | None = None) -> tuple[TrainingResult, dict[str, torch.Tensor], bytes]:
        def watch(progress: TrainingProgress) -> None:
            self.progress.append(progress)
            if progress.step == kill_at:
                raise Killed

        model = make_model(self.backbone)
        log = MetricsLog()
        steps_before = self.resumed_at()
        asked = count(steps_before + 1)
        sinks = TrainingSinks(
            Checkpoints(self.storage, "checkpoints"), log, watch, lambda: "told to" if next(asked) == self.stop_at else None
        )
        examples = EXAMPLES if self.examples is None else self.examples
        result = train(model, examples, self.config, seed=self.seed, devices=[CPU], references=REFERENCES, sinks=sinks)
        return result, model.state_dict(), log.to_bytes()

    def resumed_at(self) -> int:
        """Steps of the newest checkpoint."""
        found = Checkpoints(self.storage, "checkpoints").latest()
        return 0 if found is None else found.step


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingResult, dict[str, torch.Tensor], bytes]:
    return Attempt(tmp_path_factory.mktemp("uninterrupted")).run()


@pytest.mark.parametrize("kills", [(1,), (7,), (8,), (13,), (16,), (20,), (23,), (24,), (3, 9, 15, 22)])
def test_killed_and_resumed_training_has_the_bits_of_an_uninterrupted_one(
    tmp_path: Path, uninterrupted: tuple[TrainingResult, dict[str, torch.Tensor], bytes], kills: tuple[int, ...]
) -> None:
    attempt = Attempt(tmp_path)
    for kill_at in kills:
        with pytest.raises(Killed):
            attempt.run(kill_at)
    attempt.progress.clear()
    result, weights, metrics = attempt.run()
    # The last one due is always written; the best epoch's comes besides.
    assert kills[-1] // 7 * 7 < attempt.progress[0].step <= kills[-1] + 1
    assert result == uninterrupted[0]
    assert_same_bits(weights, uninterrupted[1])
    assert metrics == uninterrupted[2]


@pytest.mark.parametrize("every", [1, 2, 5, 24, None])
@pytest.mark.parametrize("seed", [0, 1])
def test_bits_do_not_depend_on_where_checkpoints_fall(
    tmp_path: Path,
    uninterrupted: tuple[TrainingResult, dict[str, torch.Tensor], bytes],
    monkeypatch: pytest.MonkeyPatch,
    every: int | None,
    seed: int,
) -> None:
    """By time they fall anywhere: here a clock that leaps at random decides, and kills come at random as well."""
    chance = np.random.default_rng(seed)
    now = [0.0]

    def leap() -> float:
        now[0] += float(chance.exponential(1.0))
        return now[0]

    monkeypatch.setattr(loop.time, "monotonic", leap)
    config = CONFIG.model_copy(update={"checkpoint_every_steps": every, "checkpoint_every_seconds": 12.0})
    attempt = Attempt(tmp_path, config)
    for kill_at in sorted(chance.choice(np.arange(2, 24), 3, replace=False).tolist()):
        with pytest.raises(Killed):
            attempt.run(kill_at)
    result, weights, metrics = attempt.run()
    assert (result, metrics) == (uninterrupted[0], uninterrupted[2])
    assert_same_bits(weights, uninterrupted[1])


def test_checkpoints_fall_due_by_time_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    attempt = Attempt(tmp_path, CONFIG.model_copy(update={"checkpoint_every_steps": None, "checkpoint_every_seconds": 10.0}))
    saved: list[int] = []
    monkeypatch.setattr(loop, "take_snapshot", noting(loop.take_snapshot, lambda: saved.append(len(attempt.progress) + 1)))

    class Ticking(list[TrainingProgress]):
        def append(self, progress: TrainingProgress) -> None:
            super().append(progress)
            now[0] += 3.0

    attempt.progress = Ticking()
    result = attempt.run()[0]
    assert result.steps == 24
    # The first one is the start; four steps take 12 seconds; the best epochs' ends count besides.
    assert saved[:3] == [1, 5, 8]
    assert attempt.progress[-1].checkpoint is not None


def noting(function: Callable[..., Any], note: Callable[[], None]) -> Callable[..., Any]:
    """The function, and something done before each call."""

    def noted(*arguments: Any) -> Any:
        note()
        return function(*arguments)

    return noted


def test_without_checkpoints_none_is_written(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, CONFIG.model_copy(update={"checkpoint_every_steps": None, "checkpoint_every_seconds": None}))
    attempt.run()
    assert attempt.storage.list("") == []


def test_best_checkpoint_is_kept_beside_the_newest_two(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"epochs": 6, "checkpoint_every_steps": 1})
    attempt = Attempt(tmp_path, config)
    rows = [json.loads(line) for line in attempt.run()[2].splitlines()]
    scores = {row["step"]: row["validation_precision@1"] for row in rows if "validation_loss" in row}
    best = min(step for step, score in scores.items() if score == max(scores.values()))
    steps = sorted({int(path.split("/")[1].removeprefix("step-")) for path in attempt.storage.list("")})
    assert best < 46, "the last epoch is the best: the test shows nothing"
    assert best in steps
    assert steps[-1] == 48
    assert len(steps) == 3


@pytest.mark.parametrize("stop_at", [1, 8, 13])
@pytest.mark.parametrize("every", [None, 7])
def test_training_that_is_asked_to_stop_loses_no_step(
    tmp_path: Path,
    uninterrupted: tuple[TrainingResult, dict[str, torch.Tensor], bytes],
    stop_at: int,
    every: int | None,
) -> None:
    config = CONFIG.model_copy(update={"checkpoint_every_steps": every, "checkpoint_every_seconds": None})
    attempt = Attempt(tmp_path, config, stop_at=stop_at)
    with pytest.raises(PreemptedError, match=f"^told to at step {stop_at} of 24, where a checkpoint was made$"):
        attempt.run()
    assert attempt.progress[-1].checkpoint == attempt.progress[-1].step == stop_at
    attempt.stop_at = None
    attempt.progress.clear()
    result, weights, metrics = attempt.run()
    assert attempt.progress[0].step == stop_at + 1
    assert (result, metrics) == (uninterrupted[0], uninterrupted[2])
    assert_same_bits(weights, uninterrupted[1])


def test_training_that_is_asked_to_stop_at_its_last_step_is_through(tmp_path: Path) -> None:
    assert Attempt(tmp_path, stop_at=24).run()[0].steps == 24


def test_checkpoint_that_cannot_be_written_fails_the_training_with_its_own_sentence(tmp_path: Path) -> None:
    class Full(LocalStorage):
        def write_bytes(self, path: str, data: bytes) -> None:
            raise StorageError("cannot write: the disk is full; free some space and run again")

    attempt = Attempt(tmp_path)
    attempt.storage = Full(tmp_path)
    with pytest.raises(StorageError, match="the disk is full"):
        attempt.run()


EVERYTHING = {
    "ema_decay": 0.9,
    "accumulate": 2,
    "max_grad_norm": 1.0,
    "schedule": "linear",
    "label_smoothing": 0.1,
    "class_weights": "inverse_sqrt",
    "augment": AugmentConfig(crop=0.4, flip=True, jitter=0.3, randaugment=1, mixup=0.3, cutmix=1.0),
}


@pytest.mark.parametrize(
    "change",
    [
        {**EVERYTHING, "optimizer": "sgd"},
        {**EVERYTHING, "optimizer": "adamw", "learning_rate": 0.01, "loss": "sigmoid"},
        {**EVERYTHING, "optimizer": "lamb", "learning_rate": 0.02},
        {"ema_decay": 0.9, "loss": "one_tag", "augment": AugmentConfig(randaugment=2)},
    ],
    ids=["sgd", "adamw", "lamb", "one_tag"],
)
def test_training_with_every_option_killed_and_resumed_has_the_bits_of_an_uninterrupted_one(
    tmp_path: Path, change: dict[str, object]
) -> None:
    config = TrainingConfig.model_validate(CONFIG.model_copy(update=change).model_dump())
    result, weights, metrics = Attempt(tmp_path / "whole", config).run()
    attempt = Attempt(tmp_path / "killed", config)
    for kill_at in (1, 9, 16, 22):
        with pytest.raises(Killed):
            attempt.run(kill_at)
        torch.rand(3)
    attempt.progress.clear()
    resumed = attempt.run()
    assert attempt.progress[0].step == 22
    assert (resumed[0], resumed[2]) == (result, metrics)
    assert_same_bits(resumed[1], weights)
    assert attempt.run()[0] == result, "a finished training that is run again goes on from its last checkpoint"


def test_training_with_an_average_validates_and_ends_with_it(tmp_path: Path) -> None:
    """The descent itself must be that of a training without one; the average is a loop over its weights after each step."""
    config = CONFIG.model_copy(update={"ema_decay": 0.8, "checkpoint_every_steps": 1})
    plain = Attempt(tmp_path / "plain", CONFIG.model_copy(update={"checkpoint_every_steps": 1}))
    expected = {name: tensor.double() for name, tensor in make_model().state_dict().items()}
    for step in range(24):
        with pytest.raises(Killed):
            plain.run(step + 1)
        checkpoint = Checkpoints(plain.storage, "checkpoints").latest()
        assert checkpoint is not None
        decay = min(0.8, (1 + step) / (10 + step))
        for name in expected:
            expected[name] = decay * expected[name] + (1 - decay) * checkpoint.tensors[f"model.{name}"]
    result, weights, _ = Attempt(tmp_path / "averaged", config).run()
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-4, atol=1e-5)
    model = make_model()
    model.load_state_dict(weights)
    scores = validate(model, VALIDATION, 8, CPU)
    assert result.validation_precision_at_1 == scores.precision_at_1
    last = Checkpoints(LocalStorage(tmp_path / "averaged"), "checkpoints").latest()
    assert last is not None
    assert not torch.equal(last.tensors["model.decoder.weight"], weights["decoder.weight"])


def test_training_with_repeats_killed_and_resumed_has_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Epochs then differ in length, so that the end of one is no longer a multiple of anything."""
    config = CONFIG.model_copy(update={"repeat_threshold": 0.5})
    result, weights, metrics = Attempt(tmp_path / "whole", config).run()
    attempt = Attempt(tmp_path / "killed", config)
    for kill_at in (9, 16, 22):
        with pytest.raises(Killed):
            attempt.run(kill_at)
    resumed = attempt.run()
    assert (resumed[0], resumed[2]) == (result, metrics)
    assert_same_bits(resumed[1], weights)


def test_training_that_shows_some_examples_more_often_says_so_and_survives_kills(tmp_path: Path) -> None:
    times = np.where(np.arange(61) % 3 == 0, 2, 1)
    often = EXAMPLES.shown(times)
    result, weights, metrics = Attempt(tmp_path / "whole", examples=often).run()
    assert result.samples_per_epoch == (82, 82, 82)
    assert result.examples_seen == 246
    rows = [json.loads(line) for line in metrics.decode().splitlines()]
    assert [(row["samples"], row["unique_examples"]) for row in rows if "samples" in row] == [(82, 61)] * 3
    attempt = Attempt(tmp_path / "killed", examples=often)
    with pytest.raises(Killed):
        attempt.run(16)
    resumed = attempt.run()
    assert (resumed[0], resumed[2]) == (result, metrics)
    assert_same_bits(resumed[1], weights)


def test_checkpoint_of_a_training_that_showed_other_examples_more_often_is_not_resumed(tmp_path: Path) -> None:
    """As many steps, the same examples: only how often each is shown tells the two apart."""
    first, second = (EXAMPLES.shown(np.where(np.arange(61) % 3 == at, 2, 1)) for at in (1, 2))
    with pytest.raises(Killed):
        Attempt(tmp_path, examples=first).run(16)
    other = Attempt(tmp_path, examples=second)
    assert_same_bits(other.run()[1], Attempt(tmp_path / "fresh", examples=second).run()[1])
    assert other.progress[0].step == 1


def test_training_with_repeats_reports_unique_examples_and_samples_apart(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"repeat_threshold": 0.5})
    attempt = Attempt(tmp_path, config)
    result, _, metrics = attempt.run()
    schedule = EXAMPLES.schedule(config.batch_size, config.epochs, 0, 0.5)
    assert result.samples_per_epoch == tuple(schedule.samples_E.tolist())
    assert result.examples_seen == sum(result.samples_per_epoch) > 3 * 61
    assert result.steps == schedule.total_steps == sum(-(-samples // 8) for samples in result.samples_per_epoch)
    assert attempt.progress[-1].total_steps == result.steps
    rows = [json.loads(line) for line in metrics.splitlines()]
    epochs = [(row["epoch"], row["samples"], row["unique_examples"]) for row in rows if "samples" in row]
    assert epochs == [(epoch, samples, 61) for epoch, samples in enumerate(result.samples_per_epoch, start=1)]
    assert [row["epoch"] for row in rows if "validation_loss" in row] == [1, 2, 3]
    assert [row["learning_rate"] for row in rows if "loss" in row][-1] == learning_rate_at(result.steps - 1, result.steps, config)


def test_a_damaged_checkpoint_costs_steps_and_nothing_else(
    tmp_path: Path, uninterrupted: tuple[TrainingResult, dict[str, torch.Tensor], bytes]
) -> None:
    attempt = Attempt(tmp_path)
    with pytest.raises(Killed):
        attempt.run(kill_at=22)
    attempt.storage.write_bytes("checkpoints/step-00000021/state.safetensors", b"rubbish")
    attempt.progress.clear()
    before = attempt.resumed_at()
    result, weights, metrics = attempt.run()
    assert attempt.progress[0].step == before + 1 < 21
    assert (result, metrics) == (uninterrupted[0], uninterrupted[2])
    assert_same_bits(weights, uninterrupted[1])


def test_running_a_finished_training_again_gives_the_same_result(
    tmp_path: Path, uninterrupted: tuple[TrainingResult, dict[str, torch.Tensor], bytes]
) -> None:
    config = CONFIG.model_copy(update={"checkpoint_every_steps": 24})
    Attempt(tmp_path, config).run()
    again = Attempt(tmp_path, config)
    result, weights, metrics = again.run()
    assert again.progress == []
    assert (result, metrics) == (uninterrupted[0], uninterrupted[2])
    assert_same_bits(weights, uninterrupted[1])


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"config": CONFIG.model_copy(update={"learning_rate": 0.5})}, {"backbone": "quicknet_w8"}]
)
def test_checkpoints_of_another_training_are_not_resumed(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(Killed):
        Attempt(tmp_path).run(kill_at=15)
    other = Attempt(tmp_path, **change)
    _, weights, metrics = other.run()
    assert other.progress[0].step == 1
    fresh = Attempt(tmp_path / "fresh", **change).run()
    assert_same_bits(weights, fresh[1])
    assert metrics == fresh[2]


def test_checkpoints_of_other_images_under_the_same_ids_are_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `dataset.id_column` an id is the user's own name of an image, and a corrected image keeps it.

    The digest of a training held ids and labels alone, so a trunk went on from what it had learnt of the old pixels.
    """
    with pytest.raises(Killed):
        Attempt(tmp_path).run(kill_at=15)
    corrected = replace(EXAMPLES, storage_M3SS=255 - EXAMPLES.storage_M3SS)
    monkeypatch.setitem(globals(), "EXAMPLES", corrected)
    attempt = Attempt(tmp_path)
    _, weights, _ = attempt.run()
    assert attempt.progress[0].step == 1
    assert_same_bits(weights, Attempt(tmp_path / "fresh").run()[1])


def test_dropout_is_a_function_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropping(nn.Module):
        num_features = 16

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 16), nn.Dropout(0.5))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.layers(images)

    module = ModuleType("their_dropout")
    module.build = lambda image_size: Dropping()
    monkeypatch.setitem(sys.modules, "their_dropout", module)
    whole = Attempt(tmp_path / "whole", backbone="their_dropout:build").run()
    attempt = Attempt(tmp_path / "killed", backbone="their_dropout:build")
    torch.rand(3)
    with pytest.raises(Killed):
        attempt.run(kill_at=17)
    before = torch.get_rng_state()
    resumed = attempt.run()
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_bits(resumed[1], whole[1])
    assert resumed[2] == whole[2]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_two_runs_have_the_same_bits(tmp_path: Path, num_threads: int) -> None:
    config = CONFIG.model_copy(update={"num_threads": num_threads, "epochs": 1})
    first, second = (Attempt(tmp_path / name, config).run() for name in ("first", "second"))
    assert_same_bits(first[1], second[1])


def test_training_learns_the_bright_channel(uninterrupted: tuple[TrainingResult, dict[str, torch.Tensor], bytes]) -> None:
    result = uninterrupted[0]
    assert (result.steps, result.examples_seen) == (24, 183)
    assert result.validation_precision_at_1 is not None
    assert result.validation_precision_at_1 > 0.8


def test_metrics_rows_are_due_every_20_steps_at_the_end_and_after_each_epoch(
    uninterrupted: tuple[TrainingResult, dict[str, torch.Tensor], bytes],
) -> None:
    rows = [json.loads(line) for line in uninterrupted[2].splitlines()]
    training = [row for row in rows if "loss" in row]
    assert [(row["step"], row["epoch"], row["examples"]) for row in training] == [(20, 3, 152), (24, 3, 183)]
    assert [(row["step"], row["epoch"]) for row in rows if "validation_loss" in row] == [(8, 1), (16, 2), (24, 3)]
    assert training[-1]["loss"] == uninterrupted[0].final_loss
    assert rows[-1]["validation_precision@1"] == uninterrupted[0].validation_precision_at_1


def test_the_losses_and_weights_are_those_of_a_plain_loop_written_out() -> None:
    config = TrainingConfig(
        epochs=1, batch_size=61, momentum=0, nesterov=False, weight_decay=0.01, warmup_fraction=0, learning_rate=0.5
    )
    trained, plain = make_model(), make_model()
    result = train(trained, EXAMPLES, config, seed=0, devices=[CPU])
    targets = torch.zeros(61, NUM_TAGS)
    for row in range(61):
        tags = EXAMPLES.label_indices_L[EXAMPLES.label_offsets[row] : EXAMPLES.label_offsets[row + 1]]
        targets[row, tags] = 1 / len(tags)
    loss = nn.functional.cross_entropy(plain.train()(normalise_images(torch.from_numpy(EXAMPLES.storage_M3SS)))[1], targets)
    loss.backward()
    assert result.final_loss == pytest.approx(loss.item(), rel=1e-5)
    for found, parameter in zip(trained.parameters(), plain.parameters(), strict=True):
        decay = 0.01 if parameter.ndim > 1 else 0.0
        expected = parameter - 0.5 * 61 / 256 * (parameter.grad + decay * parameter)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_validation_scores_equal_a_count_by_hand() -> None:
    model = make_model()
    log = MetricsLog()
    train(model, EXAMPLES, CONFIG, seed=0, devices=[CPU], references=REFERENCES, sinks=TrainingSinks(log=log))
    with torch.inference_mode():
        logits = model(normalise_images(torch.from_numpy(VALIDATION.storage_M3SS)))[1].double().numpy()
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    hits, losses = [], []
    for row in range(21):
        tags = VALIDATION.label_indices_L[VALIDATION.label_offsets[row] : VALIDATION.label_offsets[row + 1]]
        hits.append(logits[row].argmax() in tags)
        losses.append(-log_probabilities[row, tags].mean())
    assert log.rows[-1]["validation_precision@1"] == np.mean(hits)
    assert log.rows[-1]["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_validation_loss_of_sigmoid_is_the_binary_cross_entropy() -> None:
    model, log = make_model(), MetricsLog()
    config = CONFIG.model_copy(update={"loss": "sigmoid", "learning_rate": 0.1, "label_smoothing": 0.1})
    train(model, EXAMPLES, config, seed=0, devices=[CPU], references=REFERENCES, sinks=TrainingSinks(log=log))
    with torch.inference_mode():
        logits = model(normalise_images(torch.from_numpy(VALIDATION.storage_M3SS)))[1].double().numpy()
    present = np.zeros((21, NUM_TAGS), bool)
    for row in range(21):
        present[row, VALIDATION.label_indices_L[VALIDATION.label_offsets[row] : VALIDATION.label_offsets[row + 1]]] = True
    expected = np.log1p(np.exp(np.where(present, -logits, logits))).sum(axis=1).mean()
    assert log.rows[-1]["validation_loss"] == pytest.approx(expected, rel=1e-5)


def test_examples_without_labels_are_left_out(tmp_path: Path) -> None:
    counts = np.diff(EXAMPLES.label_offsets).copy()
    counts[::2] = 0
    kept = np.repeat(counts > 0, np.diff(EXAMPLES.label_offsets))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    half = ExampleSet(EXAMPLES.ids_N16, EXAMPLES.storage_M3SS, EXAMPLES.storage_rows_N, EXAMPLES.label_indices_L[kept], offsets)
    first, second = make_model(), make_model()
    assert train(first, half, CONFIG, seed=0, devices=[CPU]).examples_seen == 90
    train(second, EXAMPLES.take(np.arange(1, 61, 2)), CONFIG, seed=0, devices=[CPU])
    assert_same_bits(first.state_dict(), second.state_dict())


def test_no_labelled_example_leaves_the_weights_alone_and_writes_an_empty_log(tmp_path: Path) -> None:
    storage, model = LocalStorage(tmp_path), make_model()
    sinks = TrainingSinks(Checkpoints(storage, "checkpoints"), MetricsLog())
    result = train(model, EXAMPLES.take(np.arange(0)), CONFIG, seed=0, devices=[CPU], references=REFERENCES, sinks=sinks)
    assert result == TrainingResult(0, 0, None, None, (0, 0, 0))
    assert_same_bits(model.state_dict(), make_model().state_dict())
    assert sinks.log is not None
    assert sinks.log.to_bytes() == b""
    assert storage.list("") == []


@pytest.mark.parametrize(("num", "batch_size"), [(1, 8), (3, 2), (3, 1)])
def test_a_batch_of_one_image_trains_although_batch_normalisation_has_one_value(num: int, batch_size: int) -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = train(model, make_examples(num), CONFIG.model_copy(update={"batch_size": batch_size}), seed=0, devices=[CPU])
    assert result.examples_seen == 3 * num
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert not torch.equal(model.decoder.weight, before["decoder.weight"])


def test_single_values_use_running_statistics_and_larger_maps_their_own() -> None:
    layer = nn.BatchNorm2d(2)
    layer.running_mean.fill_(3.0)
    with running_statistics_for_single_values(layer):
        single = layer(torch.full((1, 2, 1, 1), 5.0))
        large = layer(torch.tensor([1.0, 3.0]).reshape(1, 1, 1, 2).repeat(1, 2, 1, 1))
    assert single.detach().flatten().tolist() == pytest.approx([2.0, 2.0], rel=1e-4)
    assert large.detach()[0, 0, 0].tolist() == pytest.approx([-1.0, 1.0], rel=1e-4)
    assert layer.training
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(torch.zeros(1, 2, 1, 1))


def test_frozen_parameters_keep_their_bits(tmp_path: Path) -> None:
    model = make_model()
    model.decoder.requires_grad_(False)
    train(model, EXAMPLES, CONFIG, seed=0, devices=[CPU], sinks=TrainingSinks(Checkpoints(LocalStorage(tmp_path), "checkpoints")))
    fresh = make_model()
    assert torch.equal(model.decoder.weight, fresh.decoder.weight)
    assert not torch.equal(model.backbone.network.stem[0].weight, fresh.backbone.network.stem[0].weight)


def test_a_loss_that_is_no_number_stops_the_training_and_names_step_and_remedy(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.decoder.weight.fill_(float("nan"))
    storage = LocalStorage(tmp_path)
    config = CONFIG.model_copy(update={"checkpoint_every_steps": 1})
    with pytest.raises(HardmoeError, match=r"nan at step 1 of 24.*lower learning_rate \(now 1\)"):
        train(model, EXAMPLES, config, seed=0, devices=[CPU], sinks=TrainingSinks(Checkpoints(storage, "checkpoints")))
    assert storage.list("") == []


def test_a_tag_that_the_decoder_lacks_is_refused_before_training() -> None:
    model = TagClassifier(build_backbone("quicknet_w4", image_size=8, seed=0), 3, seed=0)
    with pytest.raises(ValueError, match="decoder of 3 tags"):
        train(model, EXAMPLES, CONFIG, seed=0, devices=[CPU])


def test_progress_counts_steps_examples_and_a_rate(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path)
    attempt.run()
    assert [progress.step for progress in attempt.progress] == list(range(1, 25))
    assert [progress.examples_seen for progress in attempt.progress[6:9]] == [53, 61, 68]
    assert all(progress.total_steps == 24 and progress.examples_per_second > 0 for progress in attempt.progress)
