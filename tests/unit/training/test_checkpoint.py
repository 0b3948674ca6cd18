"""Checkpoints: what is committed comes back, what is not is passed over."""

import json
import logging
from pathlib import Path

import pytest
import torch

from hardmoe.errors import StorageError
from hardmoe.storage import LocalStorage
from hardmoe.training.checkpoint import Checkpoints

PREFIX = "experts/expert-0007/checkpoints"


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


@pytest.fixture
def checkpoints(storage: LocalStorage) -> Checkpoints:
    return Checkpoints(storage, PREFIX)


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((2, 3), float(step)), "model.count": torch.tensor(step)}


def test_latest_is_none_before_the_first_save(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest() is None


def test_latest_returns_the_bits_and_the_state_that_were_saved(checkpoints: Checkpoints) -> None:
    images = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    saved = {"a": images, "same memory": images, "half": images.bfloat16(), "count": torch.tensor(7)}
    state = {"loss_sum": 0.1 + 0.2, "note": None}
    checkpoints.save(40, saved, state)
    found = checkpoints.latest()
    assert found is not None
    assert (found.step, found.state) == (40, state)
    assert found.tensors.keys() == saved.keys()
    assert all(found.tensors[name].dtype == saved[name].dtype and torch.equal(found.tensors[name], saved[name]) for name in saved)


def test_save_keeps_the_newest_two_and_sweeps_what_was_never_finished(storage: LocalStorage, checkpoints: Checkpoints) -> None:
    storage.write_bytes(f"{PREFIX}/step-00000015/state.safetensors", b"half")
    for step in (10, 20, 30):
        checkpoints.save(step, tensors(step), {})
    expected = [f"step-000000{step}/state.{suffix}" for step in (20, 30) for suffix in ("json", "safetensors")]
    assert storage.list(PREFIX) == expected


def test_an_attempt_that_lags_behind_leaves_the_checkpoints_of_the_one_ahead(checkpoints: Checkpoints) -> None:
    """A worker cut off from its driver used to delete the newer checkpoints of the attempt that had taken over."""
    for step in (10, 20, 30, 15):
        checkpoints.save(step, tensors(step), {})
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 30


class Raced(LocalStorage):
    """Another attempt, further ahead, deletes a checkpoint at the moment it is touched here."""

    doomed = "step-00000020"

    def read_bytes(self, path: str) -> bytes:
        if self.doomed in path:
            self.delete_tree(f"{PREFIX}/{self.doomed}")
        return super().read_bytes(path)

    def write_bytes(self, path: str, data: bytes) -> None:
        if self.doomed in path and path.endswith("state.json") and json.loads(data)["state"] == "late":
            raise StorageError(f"cannot write {path}: there is no such file")
        super().write_bytes(path, data)


def test_a_checkpoint_deleted_while_it_is_read_is_passed_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Raced(tmp_path), PREFIX)
    for step in (10, 20):
        checkpoints.save(step, tensors(step), "early")
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 10


def test_a_checkpoint_deleted_while_it_is_written_does_not_stop_the_training(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Raced(tmp_path), PREFIX)
    checkpoints.save(40, tensors(40), "early")
    checkpoints.save(20, tensors(20), "late")
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 40


def test_steps_are_ordered_as_numbers(checkpoints: Checkpoints) -> None:
    for step in (99_999_999, 100_000_000):
        checkpoints.save(step, tensors(1), {})
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 100_000_000


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.safetensors", lambda data: data[:-1]),
        ("state.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("state.safetensors", None),
        ("state.json", lambda data: data[:-1]),
        ("state.json", lambda data: b"[]"),
        ("state.json", None),
    ],
    ids=[
        "tensors truncated",
        "tensors altered",
        "tensors missing",
        "marker truncated",
        "marker of another kind",
        "marker missing",
    ],
)
def test_latest_goes_back_past_a_damaged_checkpoint_and_says_so(
    storage: LocalStorage, checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture, name: str, damage: object
) -> None:
    for step in (10, 20):
        checkpoints.save(step, tensors(step), {"step": step})
    path = f"{PREFIX}/step-00000020/{name}"
    if callable(damage):
        storage.write_bytes(path, damage(storage.read_bytes(path)))
    else:
        storage.delete_tree(path)
    with caplog.at_level(logging.WARNING):
        found = checkpoints.latest()
    assert found is not None
    assert (found.step, found.state) == (10, {"step": 10})
    assert "step-00000020" in caplog.text


def test_a_checkpoint_saved_again_after_going_back_replaces_the_damaged_one(
    storage: LocalStorage, checkpoints: Checkpoints
) -> None:
    for step in (10, 20):
        checkpoints.save(step, tensors(step), {})
    storage.write_bytes(f"{PREFIX}/step-00000020/state.safetensors", b"")
    checkpoints.save(20, tensors(20), {})
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 20
    assert torch.equal(found.tensors["model.weight"], tensors(20)["model.weight"])


def test_the_marker_is_written_last(tmp_path: Path) -> None:
    class Dying(LocalStorage):
        def write_bytes(self, path: str, data: bytes) -> None:
            if path.endswith("state.json") and json.loads(data)["step"] == 20:
                raise StorageError("killed")
            super().write_bytes(path, data)

    checkpoints = Checkpoints(Dying(tmp_path), PREFIX)
    checkpoints.save(10, tensors(10), {})
    with pytest.raises(StorageError, match="killed"):
        checkpoints.save(20, tensors(20), {})
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 10


def test_clear_deletes_everything(storage: LocalStorage, checkpoints: Checkpoints) -> None:
    checkpoints.save(10, tensors(10), {})
    checkpoints.clear()
    assert checkpoints.latest() is None
    assert storage.list("") == []
