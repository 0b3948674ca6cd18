"""Progress: what is counted, what is shown on a terminal and in a log, and how often the disk hears of it."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from counting import Control, NotedDisplay, Run, ScriptedBackend, counting
from rich.console import Console

from hardmoe.errors import StorageError
from hardmoe.execution import display as display_module
from hardmoe.execution import progress as progress_module
from hardmoe.execution import tracked as tracked_module
from hardmoe.execution.display import BarDisplay, LogDisplay, make_display
from hardmoe.execution.progress import Reporter
from hardmoe.execution.task import UnitTask
from hardmoe.execution.tracked import Tracked, format_seconds
from hardmoe.storage import LocalStorage


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set by the test."""
    now = [100.0]
    for module in (tracked_module, progress_module, display_module):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def said(done: float, total: float, **values: Any) -> dict[str, Any]:
    return {"done": done, "total": total, "values": values, "updated": "2026-11-30T12:00:00+00:00"}


def test_rate_and_remaining_time_count_what_this_driver_did(clock: list[float]) -> None:
    """20 of 60 units were done by an earlier driver: they are no measure of the speed of this one."""
    tracked = Tracked()
    tracked.follow("embed", 20, 60)
    clock[0] += 10
    tracked.follow("embed", 30, 60)
    assert tracked.rate == pytest.approx(1.0)
    assert tracked.eta_seconds == pytest.approx(30)
    assert tracked.describe() == "embed 30/60, 0:30 left"
    assert tracked.summary()["fraction"] == pytest.approx(0.5)


def test_unit_that_resumed_from_a_checkpoint_does_not_look_fast(clock: list[float]) -> None:
    """Resumed at 60 %, an expert seemed to have done that in two seconds, and to be through in one more."""
    tracked = Tracked()
    tracked.follow("train", 0, 1)
    clock[0] += 2
    tracked.hear("expert-0001", said(60, 100))
    clock[0] += 100
    tracked.hear("expert-0001", said(70, 100))
    assert tracked.fraction == pytest.approx(0.7)
    assert tracked.eta_seconds == pytest.approx(300)


def test_waiting_for_a_slot_is_no_measure_of_the_speed(clock: list[float]) -> None:
    """Seen: a trunk that would take six minutes was said to take 71, as it had been begun a minute before its first step."""
    tracked = Tracked()
    tracked.follow("train", 0, 1)
    clock[0] += 60
    tracked.hear("trunk", said(1, 100))
    assert tracked.eta_seconds is None
    clock[0] += 3
    tracked.hear("trunk", said(2, 100))
    assert tracked.eta_seconds == pytest.approx(3 * 98)


def test_phase_that_others_go_before_says_so_and_is_not_slow_for_it(clock: list[float]) -> None:
    """Seen: "route 2/96, 6:57:44 left" of what took ten seconds once the experts were through."""
    tracked = Tracked()
    tracked.follow("route", 0, 10)
    tracked.look(True)
    clock[0] += 4
    tracked.follow("route", 2, 10)
    tracked.look(False)
    assert tracked.describe() == "route 2/10, waiting for a slot"
    clock[0] += 500
    tracked.look(True)
    assert tracked.eta_seconds == pytest.approx(16)
    clock[0] += 2
    tracked.follow("route", 3, 10)
    assert tracked.describe() == "route 3/10, 0:14 left"
    tracked.look(False)
    tracked.follow("route", 10, 10)
    assert tracked.describe() == "route 10/10"


def test_running_units_count_by_their_share_and_their_values_are_put_together(clock: list[float]) -> None:
    tracked = Tracked()
    tracked.follow("train", 1, 4)
    tracked.hear("a", said(1, 2, **{"examples/s": 1000.4, "loss": 2.0}))
    tracked.hear("b", said(1, 4, **{"examples/s": 234.0, "loss": 3.0}))
    tracked.hear("c", said(5, 0))
    assert tracked.units == pytest.approx(1.75)
    assert tracked.describe() == "train 1/4, 1,234 examples/s, loss 2.500"
    tracked.follow("train", 4, 4)
    assert tracked.fraction == 1.0
    assert tracked.describe() == "train 4/4"
    tracked.follow("next", 0, 2)
    assert tracked.describe() == "next 0/2"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (7, "0:07"), (59.6, "1:00"), (750, "12:30"), (11100, "3:05:00"), (360000, "100:00:00")]
)
def test_durations_read_as_on_a_clock(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_every_unit_that_is_done_is_visible_at_once_and_never_more_than_there_are(root: Path) -> None:
    """Counting on across phases once showed 24 of 4 units."""
    run = Run(root, [counting(numbers=(1, 2, 3))])
    run.run()
    states = [state["count"] for state in run.display.seen if "count" in state]
    assert all(done <= total for _, done, total in states)
    for expected in [("square", 0, 3), ("square", 1, 3), ("square", 2, 3), ("sum", 0, 1), ("sum", 1, 1)]:
        assert expected in states
    assert run.display.lines == ["count: done in 0:00 (1 of 1)"]


def test_summary_is_written_every_two_seconds_at_most_and_gone_at_the_end(root: Path, clock: list[float]) -> None:
    """On an object store every write costs; ten thousand units must not mean ten thousand summaries."""
    storage = LocalStorage(root)
    written: list[str] = []
    real = storage.write_bytes

    def noting(path: str, data: bytes) -> None:
        written.append(path)
        real(path, data)

    storage.write_bytes = noting  # type: ignore[method-assign]

    def later(task: UnitTask) -> None:
        clock[0] += 0.5

    Run(root, [counting(numbers=range(40))], backend=ScriptedBackend(1, later), storage=storage).run()
    summaries = [path for path in written if path.endswith("status.json")]
    assert 5 <= len(summaries) <= 41 * 0.5 / 2 + 1
    assert not storage.exists("count/_progress/status.json")


def test_store_that_cannot_say_how_far_units_are_does_not_end_the_run(root: Path, clock: list[float]) -> None:
    """One look at a running unit's progress, while the store answered 503, ended a whole run."""
    storage = LocalStorage(root)
    real_exists, real_read, refused = storage.exists, storage.read_bytes, []

    def unless_live(path: str) -> None:
        if "/live/" in path:
            refused.append(path)
            raise StorageError(f"cannot read {path}: the store keeps answering 503")

    def exists(path: str) -> bool:
        unless_live(path)
        return real_exists(path)

    def read_bytes(path: str) -> bytes:
        unless_live(path)
        return real_read(path)

    storage.exists, storage.read_bytes = exists, read_bytes  # type: ignore[method-assign]

    def later(task: UnitTask) -> None:
        clock[0] += 3

    run = Run(root, [counting(numbers=(1, 2, 3))], backend=ScriptedBackend(1, later), storage=storage)
    assert run.run().artifacts["count"].payload == {"total": 14}
    assert refused


def test_summary_tells_what_runs_and_what_failed(root: Path, control: Control, clock: list[float]) -> None:
    seen: list[dict[str, Any]] = []
    path = root / "count" / "_progress" / "status.json"

    def look(task: UnitTask) -> None:
        if path.exists():
            seen.append(json.loads(path.read_text()))
        clock[0] += 3

    control.order("fail", "square-1", "no luck")
    run = Run(root, [counting(numbers=(1, 2, 3), control=control.directory)], backend=ScriptedBackend(1, look))
    with pytest.raises(Exception, match="no luck"):
        run.run()
    assert [(body["state"], body["units_done"], body["units_total"]) for body in seen] == [("running", 0, 3), ("running", 1, 3)]
    last = json.loads(path.read_text())
    assert last["state"] == "failed"
    assert last["failures"] == [{"unit": "count/1", "error": "no luck"}]
    assert last["running"] == {}


def test_progress_of_an_earlier_attempt_is_not_shown_as_running(root: Path, clock: list[float]) -> None:
    """A queued unit whose last attempt was killed was shown at that attempt's speed until it began."""
    storage = LocalStorage(root)
    reporter = Reporter(storage, NotedDisplay())
    task = UnitTask(str(root), counting(), "build", "square", counting_unit())

    class Build:
        stage, units_done = task.stage, 0

        class phase:
            name, units = "square", (1,)

    reporter.started(Build)  # type: ignore[arg-type]
    storage.write_bytes(task.paths.live("square", "1"), json.dumps(said(5, 10)).encode())
    reporter.submitted(task)

    def running() -> dict[str, Any]:
        clock[0] += 3
        reporter.tick({"count": Build}, [task])  # type: ignore[dict-item]
        return json.loads((root / "count" / "_progress" / "status.json").read_text())["running"]  # type: ignore[no-any-return]

    assert running() == {}
    storage.write_bytes(task.paths.live("square", "1"), json.dumps(said(6, 10)).encode())
    assert running() == {"1": said(6, 10)}
    storage.write_bytes(task.paths.live("square", "1"), b"{damaged")
    assert running() == {"1": said(6, 10)}


def counting_unit() -> Any:
    from hardmoe.stage import Unit

    return Unit("1")


def test_log_has_a_line_now_and_then_and_events_as_they_come(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    log = LogDisplay()
    running, failed = Tracked(), Tracked(state="failed")
    running.follow("embed", 0, 4)
    for _ in range(100):
        clock[0] += 0.5
        log.update({"features": running, "other": failed})
    log.say("features: done in 0:50 (3 of 9)")
    log.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line[9:] for line in lines] == ["features: embed 0/4"] * 3 + ["features: done in 0:50 (3 of 9)"]
    assert all(line[2] == line[5] == ":" for line in lines)
    running.follow("embed", 3, 4)
    clock[0] += 15
    log.update({"features": running})
    assert capsys.readouterr().err[9:] == "features: 75 % of embed 3/4, 0:22 left\n"


def test_bars_show_a_line_per_artifact_being_built_and_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(
        display_module, "Console", lambda stderr: Console(file=terminal, force_terminal=True, width=110, legacy_windows=False)
    )
    bars = BarDisplay()
    one, other = Tracked(), Tracked()
    one.follow("train", 3, 4)
    other.follow("embed", 0, 7)
    bars.update({"experts/expert-0001": one, "[odd] name": other})
    bars._progress.refresh()
    shown = terminal.getvalue()
    assert "experts/expert-0001" in shown
    assert "75%" in shown
    assert "train 3/4" in shown
    bars.update({})
    bars.say("[experts] are done: a line that is longer than the terminal is wide must not be cut or coloured " + "x" * 40)
    bars.close()
    assert "a line that is longer than the terminal is wide must not be cut or coloured " + "x" * 40 in terminal.getvalue()
    assert "[experts]" in terminal.getvalue()


def test_display_is_bars_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_display(), LogDisplay)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bars = make_display()
    bars.close()
    assert isinstance(bars, BarDisplay)
