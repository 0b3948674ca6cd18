"""One unit on a worker: attempt-scoped files, a completion as the last act, a log that tells the whole story."""

import contextlib
import logging
from pathlib import Path

import counting as module
import pytest
from counting import Control, counting
from mounts import bind_read_only, small_disk

from hardmoe.artifacts.provenance import machine
from hardmoe.errors import CorruptFileError, StoreAwayError
from hardmoe.execution.task import UnitTask, load_completion, parse_completion
from hardmoe.execution.worker import execute_unit
from hardmoe.stage import Unit
from hardmoe.storage import LocalStorage


def task(root: Path, control: Control | None = None, number: int = 3) -> UnitTask:
    LocalStorage(root).write_bytes("count/shared", b"0")
    stage = counting(control=None if control is None else control.directory)
    return UnitTask(str(root), stage, "build", "square", Unit(str(number), {"number": number, "shared": "count/shared"}))


def test_completion_names_every_file_with_its_digest_and_where_it_waits(root: Path) -> None:
    outcome = execute_unit(task(root))
    assert outcome.error is None
    assert outcome.completion is not None
    storage = LocalStorage(root)
    stored = load_completion(storage, "count/_progress/build/done/square/3.json")
    assert stored.completion == outcome.completion
    (entry,) = stored.completion.files
    assert (entry.path, entry.size) == ("squares/3.txt", 2)
    assert storage.read_bytes(stored.staged["squares/3.txt"]) == b"9\n"
    assert storage.read_bytes(stored.completion.scratch["value"]) == b"9"
    assert not (root / "count" / "squares").exists(), "nothing is published before the commit"


def test_completion_tells_what_the_unit_noted_last_and_on_what_machine(root: Path, control: Control) -> None:
    control.order("checkpoint", "square-3", "step-7")
    execute_unit(task(root, control))
    stored = load_completion(LocalStorage(root), "count/_progress/build/done/square/3.json")
    assert (stored.said, stored.machine) == ({"checkpoint": "step-7"}, machine())


def test_attempts_write_apart_and_the_first_completion_is_the_one(root: Path) -> None:
    first, second = execute_unit(task(root)), execute_unit(task(root))
    assert first.completion == second.completion
    assert len(list(root.glob("count/_progress/build/staged/square/3/*"))) == 2


@pytest.mark.parametrize("method", ["exists", "create"], ids=["before", "at its end"])
def test_unit_whose_store_is_away_is_lost_and_has_not_failed(root: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    asked = task(root)

    def away(*arguments: object) -> None:
        raise StoreAwayError("http://store keeps answering 503")

    monkeypatch.setattr(LocalStorage, method, away)
    outcome = execute_unit(asked)
    assert (outcome.error, outcome.completion, outcome.store_away) == (None, None, True)
    assert outcome.infrastructure == "http://store keeps answering 503"


def test_unit_that_fails_leaves_no_completion_and_its_log_keeps_the_earlier_attempts(root: Path, control: Control) -> None:
    for text in ("first try", "second try"):
        control.order("fail", "late-square-3", text)
        outcome = execute_unit(task(root, control))
        assert outcome.error == text
        assert outcome.completion is None
    assert not list(root.glob("count/_progress/build/done/**/*.json"))
    log = (root / "count" / "_progress" / "logs" / "square.3.log").read_text().splitlines()
    assert [line.split(" ERROR ")[1] for line in log] == ["first try", "second try"]


def test_log_of_a_unit_holds_its_own_lines_only_and_leaves_the_logger_as_it_was(root: Path, control: Control) -> None:
    logger = logging.getLogger("hardmoe")
    before = (logger.level, list(logger.handlers))
    control.order("fail", "square-3")
    execute_unit(task(root, control))
    logger.warning("of nobody's interest")
    execute_unit(task(root, number=4))
    assert (logger.level, list(logger.handlers)) == before
    assert "interest" not in "".join(path.read_text() for path in root.glob("count/_progress/logs/*"))


def test_file_written_twice_by_a_unit_fails_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: object, context: module.UnitContext) -> None:
        for _ in range(2):
            with context.output("same.txt") as out:
                out.write(b"")

    monkeypatch.setattr(module.CountingWork, "run", run)
    error = execute_unit(task(root)).error
    assert error == "ValueError: the unit 3 wrote 'same.txt' twice (traceback: hardmoe logs count/3)"


def test_file_outside_the_artifact_fails_the_unit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: object, context: module.UnitContext) -> None:
        with context.output("../other-artifact/artifact.json") as out:
            out.write(b"")

    monkeypatch.setattr(module.CountingWork, "run", run)
    assert "would leave the root" in (execute_unit(task(root)).error or "")


def test_worker_that_cannot_write_says_so_and_raises_nothing(root: Path, tmp_path: Path) -> None:
    ready = task(root)
    (place := tmp_path / "read-only").mkdir()
    with bind_read_only(root, place):
        blocked = UnitTask(str(place), ready.stage, ready.build, ready.phase, ready.unit)
        assert "choose a root that is writable" in (execute_unit(blocked).error or "")


def test_worker_on_a_full_disk_says_so_and_raises_nothing(tmp_path: Path) -> None:
    (place := tmp_path / "disk").mkdir()
    with small_disk(place, "64k"):
        ready = task(place)
        with contextlib.suppress(OSError):
            (place / "filler").write_bytes(b"x" * 65536)
        outcome = execute_unit(ready)
    assert "the disk is full; free some space and run again" in (outcome.error or "")


def test_progress_calls_back_where_the_driver_itself_runs_the_unit(root: Path) -> None:
    """Inline, nothing was shown and no summary written for as long as a unit took."""
    calls: list[bool] = []
    execute_unit(task(root), lambda: calls.append((root / "count/_progress/build/live/square/3.json").exists()))
    assert calls == [True]


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"completion": {}}', b"\xff"])
def test_file_that_is_no_completion_is_named(data: bytes) -> None:
    with pytest.raises(CorruptFileError, match=r"^/elsewhere/done.json is not a unit's completion; delete it"):
        parse_completion(data, "/elsewhere/done.json")


def test_labels_are_what_people_call_a_unit() -> None:
    single = UnitTask("r", counting("experts/expert-0007"), "b", "train", Unit("expert-0007"))
    assert single.label == "experts/expert-0007"
    assert UnitTask("r", counting("features"), "b", "extract", Unit("00003")).label == "features/00003"
