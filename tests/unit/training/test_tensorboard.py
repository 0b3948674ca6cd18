"""Curves for TensorBoard, read back record by record as its own readers do, checksums included."""

import struct
import tempfile
import time
from pathlib import Path

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event

from hardmoe.errors import StorageError
from hardmoe.storage import LocalStorage
from hardmoe.training.tensorboard import EventFiles


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def events(path: Path) -> list[Event]:
    """The records of a file: length, its checksum, data, their checksum."""
    data, found = path.read_bytes(), []
    while data:
        (length, length_crc) = struct.unpack("<QI", data[:12])
        body, (body_crc,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])
        assert (masked(data[:8]), masked(body)) == (length_crc, body_crc)
        found.append(Event.FromString(body))
        data = data[16 + length :]
    return found


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    at = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: at[0])
    return at


def test_rows_become_curves_in_files_whose_names_sort_by_time(tmp_path: Path, now: list[float]) -> None:
    curves = EventFiles(LocalStorage(tmp_path), "curves")
    for step in range(20, 2020, 20):
        now[0] += 1
        curves.note({"step": step, "epoch": 1, "loss": 1 / step, "learning_rate": 0.5, "keep": "best"})
    curves.write()
    paths = sorted((tmp_path / "curves").iterdir())
    assert len(paths) == 7, "every fifteen seconds, and at the end"
    read = [events(path) for path in paths]
    assert all(each[0].file_version == "brain.Event:2" for each in read)
    told = [event for each in read for event in each[1:]]
    assert [event.step for event in told] == list(range(20, 2020, 20))
    for event in told:
        assert {value.tag: value.simple_value for value in event.summary.value} == pytest.approx(
            {"loss": 1 / event.step, "learning_rate": 0.5}, rel=1e-6
        )


def test_a_long_training_writes_ever_more_rarely(tmp_path: Path, now: list[float]) -> None:
    curves = EventFiles(LocalStorage(tmp_path), "curves")
    for step in range(0, 86_400, 5):
        now[0] = float(step)
        curves.note({"step": step, "loss": 1.0})
    assert len(list((tmp_path / "curves").iterdir())) < 500


def test_curves_that_cannot_be_written_end_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = LocalStorage(tmp_path)

    def full(path: str, data: bytes) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(storage, "write_bytes", full)
    curves = EventFiles(storage, "curves")
    curves.note({"step": 1, "loss": 1.0})
    curves.write()
    assert "the curves for TensorBoard are not written: no space left" in caplog.text


def test_full_temporary_folder_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker whose own disk is full would otherwise fail an expert for its curves, while the root has room."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    curves = EventFiles(LocalStorage(tmp_path), "curves")
    curves.note({"step": 1, "loss": 1.0})
    curves.write()
    assert "the curves for TensorBoard are not written: [Errno 2] No such file or directory" in caplog.text
