"""Asked to end: requests in the root old and new, SIGTERM to a unit that makes checkpoints, and what the runner makes of it."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from counting import Control, Run, ScriptedBackend, counting, eventually, in_thread, total
from support import records

from hardmoe.errors import StoppedError, UnitsFailedError
from hardmoe.execution import stopping
from hardmoe.execution.runner import RunnerOptions
from hardmoe.execution.stopping import StopRequests, UnitStop, present_request, request_stop
from hardmoe.execution.task import UnitOutcome, UnitTask
from hardmoe.storage import LocalStorage


def requests(storage: LocalStorage) -> StopRequests:
    """As a driver begins."""
    return StopRequests(storage, present_request(storage))


def test_request_holds_for_who_was_there_and_not_for_who_comes_later(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    first = requests(storage)
    assert not first.arrived(look_now=True)
    request_stop(storage)
    second = requests(storage)
    assert first.arrived(look_now=True)
    assert not second.arrived(look_now=True)
    request_stop(storage)
    assert second.arrived(look_now=True)


def test_request_that_somebody_deletes_is_none(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    request_stop(storage)
    later = requests(storage)
    storage.delete_tree(stopping.REQUEST_NAME)
    assert not later.arrived(look_now=True)


@pytest.fixture
def _handler() -> Iterator[None]:
    """SIGTERM as on the command line."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("_handler")
def test_sigterm_waits_for_a_unit_that_heeds_it_and_is_raised_after_it(tmp_path: Path) -> None:
    stop = UnitStop(requests(LocalStorage(tmp_path)))
    reached = []
    with pytest.raises(KeyboardInterrupt), stop.heeding():
        assert stop.reason() is None
        terminate()
        reached.append(stop.reason())
    assert reached == ["pre-empted by SIGTERM"]
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler


@pytest.mark.usefixtures("_handler")
@pytest.mark.parametrize("heeds", [False, True], ids=["a unit that never asks", "the second signal"])
def test_sigterm_breaks_through_at_once(tmp_path: Path, heeds: bool) -> None:
    stop = UnitStop(requests(LocalStorage(tmp_path)))
    reached = False
    with pytest.raises(KeyboardInterrupt), stop.heeding():
        if heeds:
            stop.reason()
            terminate()
        terminate()
        reached = True
    assert not reached


def test_unit_learns_of_a_request_and_of_a_machine_that_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "POLL_SECONDS", 0.01)
    storage = LocalStorage(tmp_path)
    leaving: list[str] = []
    stops = [UnitStop(requests(storage), lambda: leaving[0] if leaving else None), UnitStop(requests(storage))]
    with stops[0].heeding(), stops[1].heeding():
        assert [stop.reason() for stop in stops] == [None, None]
        leaving.append("the machine goes")
        eventually(lambda: stops[0].reason() == "the machine goes")
        assert stops[1].reason() is None
        request_stop(storage)
        eventually(lambda: stops[1].reason() == "stopped by 'hardmoe stop'")


def made_room(task: UnitTask) -> UnitOutcome:
    return UnitOutcome(task, infrastructure="pre-empted at step 4", preempted=True)


@dataclass
class Fate:
    """What befalls the first units, one after another."""

    outcomes: list[Callable[[UnitTask], UnitOutcome]] = field(default_factory=list)

    def __call__(self, task: UnitTask) -> UnitOutcome | None:
        return self.outcomes.pop(0)(task) if self.outcomes else None


def test_unit_that_made_room_goes_on_and_no_try_is_used_up(root: Path) -> None:
    backend = ScriptedBackend(fate=Fate([made_room] * 5))
    run = Run(root, [counting(numbers=(2,))], RunnerOptions(attempts=1), backend)
    assert run.run().artifacts["count"].payload == {"total": 4}
    assert backend.labels == ["count:square-2"] * 6 + ["count:sum-all"]
    assert sum(line == "count/2: pre-empted at step 4; going on from there" for line in run.display.lines) == 5


def test_word_left_by_a_worker_that_died_right_after_counts_and_an_old_word_does_not(root: Path) -> None:
    """A worker that got SIGTERM is gone before Ray can bring its outcome; but one that dies later has said nothing."""

    def leaves_word_and_dies(task: UnitTask) -> UnitOutcome:
        path = task.paths.live(task.phase, task.unit.name)
        said = b'{"done": 1, "total": 2, "values": {"checkpoint": 4}, "updated": "%d", "preempted": "pre-empted at step 4"}'
        LocalStorage(root).write_bytes(path, said % len(backend.submitted))
        return UnitOutcome(task, infrastructure="the worker died")

    def dies(task: UnitTask) -> UnitOutcome:
        return UnitOutcome(task, infrastructure="the worker died")

    backend = ScriptedBackend(fate=Fate([leaves_word_and_dies, leaves_word_and_dies, dies, dies]))
    run = Run(root, [counting(numbers=(2,))], RunnerOptions(attempts=2), backend)
    with pytest.raises(UnitsFailedError, match="its worker died 2 times without a new checkpoint in between"):
        run.run()
    assert sum("going on from there" in line for line in run.display.lines) == 2


def test_request_ends_drivers_at_work_and_the_next_ones_go_on(root: Path, control: Control, tmp_path: Path) -> None:
    """One driver is at a unit, which comes to its end; another waits for its artifact; a third begins after the request."""
    control.order("block", "square-2")
    stages = [counting("a", control=control.directory), counting("b", inputs=["a"])]
    at_work, waits = Run(root, stages), Run(root, stages)
    one, failed_one = in_thread(at_work)
    eventually(lambda: "square-2" in control.runs())
    two, failed_two = in_thread(waits)
    eventually(lambda: any("being built by" in line for line in waits.display.lines))
    request_stop(LocalStorage(root))
    two.join(60)
    third = Run(root, stages)
    three, failed_three = in_thread(third)
    eventually(lambda: any("being built by" in line for line in third.display.lines))
    control.cancel("block", "square-2")
    for thread in (one, three):
        thread.join(60)
    for (error,) in (failed_one, failed_two):
        assert isinstance(error, StoppedError)
        assert str(error) == "stopped by 'hardmoe stop'; the same command resumes"
        assert error.exit_code == 130
    assert failed_three == []
    assert list(root.rglob("lease.json")) == []
    runs = [name for name in control.runs() if name != "driver"]
    assert sorted(runs) == ["square-1", "square-2", "square-3", "sum-all"], "nothing is done twice"
    Run(tmp_path / "whole", [counting("a"), counting("b", inputs=["a"])]).run()
    assert records(root) == records(tmp_path / "whole")
    assert third.plan().artifacts["b"].payload == {"total": 2 * total((1, 2, 3))}


def test_unit_that_found_the_request_before_its_driver_is_not_begun_again(root: Path) -> None:
    def finds_it(task: UnitTask) -> UnitOutcome:
        request_stop(LocalStorage(root))
        return made_room(task)

    backend = ScriptedBackend(fate=Fate([finds_it]))
    run = Run(root, [counting(numbers=(2,))], backend=backend)
    with pytest.raises(StoppedError):
        run.run()
    assert backend.labels == ["count:square-2"]
    assert run.display.lines[-1] == "count/2: pre-empted at step 4"
    assert all(task.stop_request == "" for task in backend.submitted)
    backend = ScriptedBackend()
    assert Run(root, [counting(numbers=(2,))], backend=backend).run().artifacts["count"].payload == {"total": 4}
    assert {task.stop_request for task in backend.submitted} == {present_request(LocalStorage(root))}
