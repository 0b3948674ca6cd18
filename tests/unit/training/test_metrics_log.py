"""The metrics log: rows of the step only, one JSON object a line."""

import json

import pytest

from hardmoe.training.metrics_log import MetricsLog

ROWS = [{"step": step, "loss": 1 / (step + 1)} for step in (20, 40, 40, 60)]


def filled() -> MetricsLog:
    log = MetricsLog()
    for row in ROWS:
        log.append(row)
    return log


def test_the_file_holds_one_json_object_a_line() -> None:
    assert [json.loads(line) for line in filled().to_bytes().decode().splitlines()] == ROWS


def test_a_log_without_rows_is_an_empty_file() -> None:
    assert MetricsLog().to_bytes() == b""


def test_a_log_restored_and_continued_has_the_bytes_of_one_that_was_not() -> None:
    log = MetricsLog()
    log.restore(json.loads(json.dumps(ROWS[:3])))
    log.append(ROWS[3])
    assert log.to_bytes() == filled().to_bytes()


def test_append_refuses_a_step_that_falls() -> None:
    with pytest.raises(ValueError, match="step 59 after step 60"):
        filled().append({"step": 59})


def test_a_number_that_is_not_finite_is_refused() -> None:
    log = MetricsLog()
    log.append({"step": 1, "loss": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        log.to_bytes()
