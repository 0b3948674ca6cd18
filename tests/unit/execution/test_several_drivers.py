"""Several drivers on one root: they divide the work, wait for each other, and never build the same thing twice."""

from pathlib import Path

import pytest
from counting import Control, NotedDisplay, Run, ScriptedBackend, counting, eventually, in_thread, total
from support import records

from hardmoe.artifacts.lease import LEASE_NAME, Lease, LeaseObserver
from hardmoe.errors import DriftError, LeaseError, UnitsFailedError
from hardmoe.execution.runner import RunnerOptions
from hardmoe.storage import LocalStorage


def test_driver_waits_for_the_holder_by_name_and_then_uses_its_artifact(root: Path, control: Control) -> None:
    control.order("block", "square-2")
    stages = [counting("a", control=control.directory), counting("b", inputs=["a"])]
    first, second = Run(root, stages), Run(root, stages)
    one, failed_one = in_thread(first)
    eventually(lambda: "square-2" in control.runs())
    two, failed_two = in_thread(second)
    eventually(lambda: any("a: being built by process" in line for line in second.display.lines))
    assert two.is_alive()
    control.cancel("block", "square-2")
    one.join(60)
    two.join(60)
    assert failed_one + failed_two == []
    assert sorted(run for run in control.runs() if run != "driver") == ["square-1", "square-2", "square-3", "sum-all"]
    assert sum("being built by" in line for line in second.display.lines) == 1, "said once, not every second"


def test_two_drivers_divide_the_experts_between_them(root: Path, tmp_path: Path) -> None:
    """Every lease was once taken at the start: the first machine had all experts, and the second waited for all of them."""
    controls = []
    for number in range(6):
        (directory := tmp_path / f"control-{number}").mkdir()
        controls.append(Control(directory))
    stages = [counting(f"experts/{n}", (n,), control=control.directory) for n, control in enumerate(controls)]
    for control in controls:
        (label,) = (f"square-{n}" for n, each in enumerate(controls) if each is control)
        control.order("block", label)
    runs = [Run(root, stages, backend=ScriptedBackend()) for _ in range(2)]
    threads = [in_thread(run) for run in runs]
    # Each driver is at one expert, and all others are free to take: a third machine could begin at once.
    eventually(lambda: sum("square" in " ".join(control.runs()) for control in controls) == 2)
    eventually(lambda: len(list(root.glob(f"experts/*/{LEASE_NAME}"))) == 2)
    for number, control in enumerate(controls):
        control.cancel("block", f"square-{number}")
    for thread, _ in threads:
        thread.join(60)
    assert [error for _, errors in threads for error in errors] == []
    for number, control in enumerate(controls):
        assert sorted(run for run in control.runs() if run != "driver") == [f"square-{number}", "sum-all"]
    assert len(records(root)) == 6


def test_many_drivers_at_once_build_everything_exactly_once(root: Path, control: Control, tmp_path: Path) -> None:
    stages = [counting("a", control=control.directory)]
    stages += [counting(f"b/{n}", (n, n + 1), control=control.directory, inputs=["a"]) for n in range(3)]
    stages.append(counting("c", control=control.directory, inputs=[f"b/{n}" for n in range(3)]))
    Run(tmp_path / "alone", [counting(s.name, s.config["numbers"], None, list(s.inputs.values())) for s in stages]).run()
    threads = [in_thread(Run(root, stages, backend=ScriptedBackend(2))) for _ in range(4)]
    for thread, _ in threads:
        thread.join(120)
    assert [error for _, errors in threads for error in errors] == []
    assert records(root) == records(tmp_path / "alone")
    assert control.runs().count("square-1") == 4, "one each of a, b/0, b/1 and c"
    assert control.runs().count("sum-all") == 5


def test_artifact_that_another_driver_builds_meanwhile_from_another_recipe_is_refused(root: Path, control: Control) -> None:
    """The waiting driver once took it for its own: a stale artifact under the right name."""
    control.order("block", "square-1")
    first, second = Run(root, [counting(control=control.directory)]), Run(root, [counting(numbers=(4, 5))])
    one, failed_one = in_thread(first)
    eventually(lambda: "square-1" in control.runs())
    two, failed_two = in_thread(second)
    eventually(lambda: bool(second.display.lines))
    control.cancel("block", "square-1")
    one.join(60)
    two.join(60)
    assert failed_one == []
    (error,) = failed_two
    assert isinstance(error, DriftError)
    assert "numbers: [1, 2, 3] -> [4, 5]" in str(error)


def test_driver_that_lost_its_lease_commits_nothing(root: Path, control: Control) -> None:
    """It was suspended for longer than the time-to-live, and another driver took over."""
    control.order("block", "sum-all")
    run = Run(root, [counting(control=control.directory)])
    thread, failed = in_thread(run)
    eventually(lambda: "sum-all" in control.runs())
    lease = root / "count" / LEASE_NAME
    lease.write_text(lease.read_text().replace('"beat": 0', '"beat": 1'))
    control.cancel("block", "sum-all")
    thread.join(60)
    (error,) = failed
    assert isinstance(error, LeaseError)
    assert "was taken over by another process" in str(error)
    assert records(root) == {}
    assert lease.exists(), "it is not ours to give back"


def test_leases_are_given_back_whatever_becomes_of_the_run(root: Path, control: Control) -> None:
    control.order("fail", "square-1")
    stages = [counting("a", control=control.directory), counting("b"), counting("c", inputs=["a"])]
    with pytest.raises(UnitsFailedError):
        Run(root, stages).run()

    def interrupted(task: object) -> None:
        raise KeyboardInterrupt

    backend = ScriptedBackend(3, interrupted)
    with pytest.raises(KeyboardInterrupt):
        Run(root, [counting("d"), *stages], backend=backend).run()
    assert backend.closed
    assert list(root.rglob("lease.json")) == []


def test_lease_is_held_elsewhere_even_if_the_display_breaks(root: Path) -> None:
    """A closed terminal must not keep Ray running or leases held."""

    class Broken(NotedDisplay):
        def update(self, tracked: object) -> None:
            if self.seen is not None and len(tracked) and any(state.done for state in tracked.values()):  # type: ignore[arg-type, attr-defined]
                raise BrokenPipeError

    backend = ScriptedBackend()
    with pytest.raises(UnitsFailedError, match="BrokenPipeError"):
        Run(root, [counting()], RunnerOptions(), backend, Broken()).run()
    assert backend.closed
    assert list(root.rglob("lease.json")) == []


def test_lease_left_with_a_finished_artifact_is_swept_with_what_its_build_left(root: Path) -> None:
    """A driver was killed after its record and before the end: nobody would ever have looked there again."""
    Run(root, [counting("a")]).run()
    scratch = root / "a" / "_progress" / ("0" * 16) / "scratch" / "big"
    scratch.parent.mkdir(parents=True)
    scratch.write_bytes(b"x")
    (root / "a" / "_progress" / "inventory.json").write_text("{}")
    (root / "a" / LEASE_NAME).write_text('{"token": "t", "beat": 0, "holder": ' + _dead_holder() + "}")
    plan = Run(root, [counting("a"), counting("b")]).run()
    assert plan.artifacts["b"].payload == {"total": total((1, 2, 3))}
    assert not scratch.exists()
    assert not (root / "a" / LEASE_NAME).exists()
    assert (root / "a" / "_progress" / "inventory.json").exists()


def test_living_drivers_lease_on_a_finished_artifact_is_left_alone(root: Path) -> None:
    Run(root, [counting("a")]).run()
    lease = LeaseObserver(LocalStorage(root), heartbeat=3600).acquire("a")
    assert isinstance(lease, Lease)
    Run(root, [counting("a"), counting("b")]).run()
    lease.check()
    lease.release()


def _dead_holder() -> str:
    import json
    from dataclasses import asdict, replace

    from hardmoe.artifacts.lease import this_process

    return json.dumps(asdict(replace(this_process(), pid=2**22 + 1)))
