"""Checkpoints written by a thread: in order, one at a time, none that counts is lost, no error is swallowed."""

import logging
import threading
from pathlib import Path

import pytest
import torch

from hardmoe.errors import StorageError
from hardmoe.storage import LocalStorage
from hardmoe.training.background import BackgroundWriter
from hardmoe.training.checkpoint import Checkpoints


class Gated(LocalStorage):
    """Every write of tensors waits until the test lets it through, or fails."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.written: list[int] = []
        self.broken = False

    def write_bytes(self, path: str, data: bytes) -> None:
        if path.endswith("state.safetensors"):
            self.begun.release()
            assert self.go.acquire(timeout=60)
            if self.broken:
                raise StorageError("the disk is full; free some space")
            self.written.append(int(path.split("/")[-2].removeprefix("step-")))
        super().write_bytes(path, data)


@pytest.fixture
def storage(tmp_path: Path) -> Gated:
    return Gated(tmp_path)


def submit(writer: BackgroundWriter, step: int, *keep: int) -> None:
    writer.submit(step, {"weight": torch.full((2,), float(step))}, {"step": step}, keep)


def test_training_goes_on_while_a_checkpoint_is_written_and_the_last_one_is_awaited(storage: Gated) -> None:
    checkpoints = Checkpoints(storage, "c")
    with BackgroundWriter(checkpoints) as writer:
        submit(writer, 1)
        assert storage.begun.acquire(timeout=60)
        submit(writer, 2)
        assert (writer.submitted, writer.written, storage.written) == (2, None, [])
        storage.go.release(2)
    assert (writer.written, storage.written) == (2, [1, 2])
    found = checkpoints.latest()
    assert found is not None
    assert (found.step, found.state) == (2, {"step": 2})
    assert torch.equal(found.tensors["weight"], torch.full((2,), 2.0))


def test_newer_checkpoint_takes_the_place_of_a_waiting_one_unless_that_is_to_be_kept(storage: Gated) -> None:
    with BackgroundWriter(Checkpoints(storage, "c")) as writer:
        submit(writer, 1)
        assert storage.begun.acquire(timeout=60)
        for step, keep in ((2, ()), (3, (3,)), (4, (3,)), (5, (3,))):
            submit(writer, step, *keep)
        storage.go.release(3)
    assert storage.written == [1, 3, 5]
    # The newest two, of which one is kept in any case; a third only for as long as it is asked for.
    assert {path.split("/")[0] for path in storage.list("c")} == {"step-00000003", "step-00000005"}


def test_best_checkpoint_stays_beside_the_newest_two(storage: Gated) -> None:
    storage.go.release(9)
    with BackgroundWriter(Checkpoints(storage, "c")) as writer:
        for step in (1, 2, 3, 4, 5):
            submit(writer, step, 2)
            writer.wait()
    assert {path.split("/")[0] for path in storage.list("c")} == {f"step-0000000{step}" for step in (2, 4, 5)}


def test_error_of_a_write_is_raised_at_the_next_step(storage: Gated) -> None:
    storage.broken = True
    with pytest.raises(StorageError, match="disk is full"), BackgroundWriter(Checkpoints(storage, "c")) as writer:
        submit(writer, 1)
        submit(writer, 2)
        storage.go.release(2)
        with pytest.raises(StorageError, match="disk is full"):
            writer.wait()
        with pytest.raises(StorageError, match="disk is full"):
            submit(writer, 3)
    assert storage.list("c") == []


def test_error_of_the_last_write_is_not_lost(storage: Gated) -> None:
    storage.broken = True
    storage.go.release()
    with pytest.raises(StorageError, match="disk is full"), BackgroundWriter(Checkpoints(storage, "c")) as writer:
        submit(writer, 1)


def test_what_ends_the_training_is_told_before_a_write_that_failed(storage: Gated, caplog: pytest.LogCaptureFixture) -> None:
    storage.broken = True
    storage.go.release()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ZeroDivisionError),
        BackgroundWriter(Checkpoints(storage, "c")) as writer,
    ):
        submit(writer, 1)
        raise ZeroDivisionError
    assert "a checkpoint could not be written either: the disk is full" in caplog.text
