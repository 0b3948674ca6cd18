"""The metrics log: rows of the step only, cut back on resume."""

import json
from pathlib import Path

import pytest

from hardmoe.errors import CorruptFileError
from hardmoe.storage import LocalStorage
from hardmoe.training.metrics_log import MetricsLog

ROWS = [{"step": step, "loss": 1 / (step + 1)} for step in (20, 40, 40, 60)]


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


def filled(storage: LocalStorage) -> MetricsLog:
    log = MetricsLog(storage, "experts/metrics.jsonl")
    for row in ROWS:
        log.append(row)
    return log


def test_flush_writes_one_json_object_a_line(storage: LocalStorage) -> None:
    filled(storage).flush()
    lines = storage.read_bytes("experts/metrics.jsonl").decode().splitlines()
    assert [json.loads(line) for line in lines] == ROWS


def test_rows_wait_in_memory_until_the_flush(storage: LocalStorage) -> None:
    filled(storage)
    assert not storage.exists("experts/metrics.jsonl")


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (20, 1), (39, 1), (40, 3), (100, 4)])
def test_cut_back_drops_rows_beyond_the_step(storage: LocalStorage, step: int, kept: int) -> None:
    filled(storage).flush()
    log = MetricsLog(storage, "experts/metrics.jsonl")
    log.cut_back(step)
    assert log.rows == ROWS[:kept]


def test_a_log_cut_back_and_continued_has_the_bytes_of_one_that_was_not(storage: LocalStorage) -> None:
    filled(storage).flush()
    expected = storage.read_bytes("experts/metrics.jsonl")
    log = MetricsLog(storage, "experts/metrics.jsonl")
    log.cut_back(20)
    for row in ROWS[1:]:
        log.append(row)
    log.flush()
    assert storage.read_bytes("experts/metrics.jsonl") == expected


def test_cut_back_without_a_file_begins_an_empty_log(storage: LocalStorage) -> None:
    log = MetricsLog(storage, "metrics.jsonl")
    log.cut_back(5)
    log.flush()
    assert storage.read_bytes("metrics.jsonl") == b""


def test_cut_back_of_a_damaged_file_names_it(storage: LocalStorage) -> None:
    storage.write_bytes("metrics.jsonl", b'{"step": 1}\n{"st')
    with pytest.raises(CorruptFileError, match=r"metrics\.jsonl"):
        MetricsLog(storage, "metrics.jsonl").cut_back(5)


def test_append_refuses_a_step_that_falls(storage: LocalStorage) -> None:
    with pytest.raises(ValueError, match="step 59 after step 60"):
        filled(storage).append({"step": 59})
