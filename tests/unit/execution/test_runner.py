"""The workflow on one root with one driver: what runs, what runs again, what fails, and what everybody else does meanwhile."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from counting import Control, Run, ScriptedBackend, counting, total

from hardmoe.artifacts.record import RECORD_NAME
from hardmoe.errors import CorruptFileError, DataError, DriftError, RebuiltInputError, UnitsFailedError
from hardmoe.execution.plan import Plan
from hardmoe.execution.queue import WorkQueue
from hardmoe.execution.runner import RunnerOptions
from hardmoe.execution.task import UnitOutcome, UnitTask
from hardmoe.stage import Resources, Unit


def stages_failing(run: Run) -> str:
    with pytest.raises(UnitsFailedError) as caught:
        run.run()
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_a_chain_of_stages_is_built_once_and_then_nothing_runs(root: Path, control: Control) -> None:
    stages = [counting("a", control=control.directory), counting("b", control=control.directory, inputs=["a"])]
    run = Run(root, stages)
    plan = run.run()
    assert plan.artifacts["b"].payload == {"total": 2 * total((1, 2, 3))}
    assert (root / "a" / "sum.txt").read_text() == "14"
    assert json.loads((root / "a" / "finish.json").read_text()) == {"total": 14}
    assert [artifact.verify() for artifact in plan.artifacts.values()] == [5, 5]
    before = control.runs()
    assert not Run(root, stages).plan().missing
    Run(root, stages).run()
    assert control.runs() == before


def test_units_of_a_failed_stage_are_kept_and_only_the_failed_one_runs_again(root: Path, control: Control) -> None:
    """Four units, the second raises: the next run does that one and what comes after, and its record is as if it never had."""
    whole = Run(root.parent / "whole", [counting(numbers=(1, 2, 3, 4))])
    whole.run()
    stage = counting(numbers=(1, 2, 3, 4), control=control.directory)
    control.order("fail", "square-2", "number 2 is not to my taste")
    told = stages_failing(Run(root, [stage]))
    assert "count/2: number 2 is not to my taste" in told
    assert sorted(run for run in control.runs() if run != "driver") == ["square-1", "square-2", "square-3", "square-4"]
    control.cancel("fail", "square-2")
    done = len(control.runs())
    Run(root, [stage]).run()
    assert [run for run in control.runs()[done:] if run != "driver"] == ["square-2", "sum-all"]
    assert (root / "count" / RECORD_NAME).read_bytes() == (root.parent / "whole" / "count" / RECORD_NAME).read_bytes()


def test_all_failures_are_told_together_and_other_stages_are_finished(root: Path, control: Control) -> None:
    directory = control.directory
    assert directory is not None
    (other := directory / "other").mkdir()
    stages = [
        counting("bad", control=directory),
        counting("worse", control=other),
        counting("good"),
        counting("on-bad", control=directory, inputs=["bad"]),
        counting("on-good", inputs=["good"]),
    ]
    control.order("fail", "square-1", "one")
    control.order("fail", "square-3", "three")
    Control(other).order("bug", "sum-all")
    told = stages_failing(Run(root, stages))
    assert told.startswith("3 failed, everything else is kept; running again does only these:")
    for line in ("bad/1: one", "bad/3: three", "worse/all: KeyError: 'bug-sum-all' (traceback: hardmoe logs worse/all)"):
        assert line in told
    assert sorted(Run(root, stages).plan().artifacts) == ["good", "on-good"]
    assert control.runs().count("driver") == 2, "what stands on a failed stage must not be begun"


@pytest.mark.parametrize(
    ("order", "sentence"),
    [
        ("bug", "KeyError: 'bug-square-1'"),
        ("silent", "ValueError: no message"),
        ("strange", "StrangeError: no message"),
    ],
)
def test_unforeseen_exception_of_a_unit_is_one_sentence_and_its_traceback_is_in_the_log(
    root: Path, control: Control, order: str, sentence: str
) -> None:
    """`ValueError()` was once told as `ValueError: ` and an exception without a text killed the driver."""
    control.order(order, "square-1")
    told = stages_failing(Run(root, [counting(control=control.directory)]))
    assert f"count/1: {sentence} (traceback: hardmoe logs count/1)" in told
    log = (root / "count" / "_progress" / "logs" / "square.1.log").read_text()
    assert "Traceback" in log
    assert "in act" in log


@pytest.mark.parametrize("moment", ["driver", "between", "finish"])
def test_error_of_the_drivers_part_alone_is_raised_as_it_is(root: Path, control: Control, moment: str) -> None:
    control.order("fail", moment, "the data are of no use; bring others")
    stage = counting(control=control.directory)
    with pytest.raises(DataError, match=r"^the data are of no use; bring others$"):
        Run(root, [stage]).run()
    control.cancel("fail", moment)
    assert Run(root, [stage]).run().artifacts["count"].payload == {"total": 14}


def test_bug_in_the_drivers_part_of_one_stage_does_not_stop_the_others(root: Path, control: Control) -> None:
    """It once ended the run with a traceback, and with it the units of all other stages."""
    control.order("bug", "between")
    stages = [counting("bad", control=control.directory), counting("good", numbers=range(5))]
    told = stages_failing(Run(root, stages))
    assert "bad: KeyError: 'bug-between' (traceback: hardmoe logs bad)" in told
    assert "Traceback" in (root / "bad" / "_progress" / "logs" / "driver.log").read_text()
    assert list(Run(root, stages).plan().artifacts) == ["good"]


def test_two_units_that_write_the_same_file_are_told_before_anything_is_published(root: Path) -> None:
    told = stages_failing(Run(root, [counting(same_name="both")]))
    assert "count: 'squares/both.txt' was written by 1 and by 2" in told
    assert not (root / "count" / "squares").exists()


def test_payload_that_is_no_json_fails_its_unit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN passed into the completion and was refused by the record only, when every unit was done."""
    import counting as module

    monkeypatch.setattr(module.CountingWork, "run", lambda self, context: {"loss": float("nan")})
    assert "count/1: ValueError: Out of range float values are not JSON compliant" in stages_failing(Run(root, [counting()]))


def test_driver_sees_the_same_values_in_the_first_run_as_after_a_replay(root: Path, control: Control) -> None:
    """Payloads went to the driver as the unit returned them: tuples, whole keys. After a kill they were lists and strings."""
    import counting as module

    seen: list[object] = []
    phases = module.CountingWork.phases

    def noting(self, context):  # type: ignore[no-untyped-def]
        generator = phases(self, context)
        phase = next(generator)
        try:
            while True:
                done = yield phase
                seen.append([each.payload for each in done])
                phase = generator.send(done)
        except StopIteration as stop:
            return stop.value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.CountingWork, "phases", noting)
        control.order("fail", "finish")
        stage = counting(control=control.directory)
        with pytest.raises(DataError):
            Run(root, [stage]).run()
        first = list(seen)
        seen.clear()
        control.cancel("fail", "finish")
        Run(root, [stage]).run()
    assert seen == first
    assert first[0] == [{"value": n * n, "text": ["a", "tuple"]} for n in (1, 2, 3)]


def test_longest_unit_of_all_stages_is_started_first(root: Path) -> None:
    backend = ScriptedBackend()
    stages = [counting("a", (2, 9)), counting("b", (5, 30)), counting("c", (7,))]
    Run(root, stages, backend=backend).run()
    squares = [label for label in backend.labels if "square" in label]
    assert squares == ["b:square-30", "a:square-9", "c:square-7", "b:square-5", "a:square-2"]


@pytest.mark.parametrize(("workers", "parallel", "most"), [(4, None, 4), (4, 2, 2), (2, 8, 2), (1, None, 1)])
def test_no_more_units_are_handed_over_than_there_are_workers_or_allowed(
    root: Path, workers: int, parallel: int | None, most: int
) -> None:
    backend = ScriptedBackend(workers)
    Run(root, [counting(numbers=range(12))], RunnerOptions(parallel=parallel), backend).run()
    assert backend.most == most
    assert backend.closed


def test_unit_that_waits_for_a_gpu_holds_up_no_unit_without(root: Path) -> None:
    """The queue once had one head: a long GPU unit with no GPU free kept all CPU slots empty behind it."""

    class OneGpu(ScriptedBackend):
        def has_room(self, demand: Resources, handed_over: Mapping[Resources, int]) -> bool:
            return handed_over.get(demand, 0) < (1 if demand.num_gpus else 3)

    backend = OneGpu()
    gpu, cpu = Resources(1, 1.0), Resources(1, 0.0)
    Run(root, [counting("gpu", (50, 60), resources=gpu), counting("cpu", range(6), resources=cpu)], backend=backend).run()
    assert backend.labels[:4] == ["gpu:square-60", "cpu:square-5", "cpu:square-4", "cpu:square-3"]
    assert backend.most == 4


def lose(times: int, label: str = "square-1") -> ScriptedBackend:
    """A backend that loses the worker of a unit so many times."""
    left = [times]

    def fate(task: UnitTask) -> UnitOutcome | None:
        if f"{task.phase}-{task.unit.name}" == label and left[0]:
            left[0] -= 1
            return UnitOutcome(task, infrastructure="WorkerCrashedError: the machine is gone")
        return None

    return ScriptedBackend(2, fate)


def test_lost_worker_is_replaced_up_to_the_limit_and_then_the_unit_fails(root: Path) -> None:
    run = Run(root, [counting()], RunnerOptions(attempts=3), lose(2))
    assert run.run().artifacts["count"].payload == {"total": 14}
    assert "count/1: lost its worker (WorkerCrashedError: the machine is gone); trying again (2 of 3)" in run.display.lines
    told = stages_failing(Run(root.parent / "other", [counting()], RunnerOptions(attempts=3), lose(3)))
    assert "count/1: its worker died 3 times without a new checkpoint in between, the last time so: WorkerCrashedError" in told


def test_unit_that_the_store_did_not_answer_is_tried_again_and_never_isolated(root: Path) -> None:
    """A machine that the network cut off failed its unit for good, which any other would have done."""

    def away(times: int) -> ScriptedBackend:
        left = [times]

        def fate(task: UnitTask) -> UnitOutcome | None:
            if task.unit.name != "1" or not left[0]:
                return None
            left[0] -= 1
            return UnitOutcome(task, infrastructure="http://store does not answer", store_away=True)

        return ScriptedBackend(2, fate)

    run = Run(root, [counting(can_isolate=True)], RunnerOptions(attempts=2), away(1))
    assert run.run().artifacts["count"].payload == {"total": 14}
    told = "count/1: the store was away for it (http://store does not answer); trying again (1 of 2)"
    assert told in run.display.lines
    backend = away(5)
    sentence = stages_failing(Run(root.parent / "b", [counting(can_isolate=True)], RunnerOptions(attempts=2), backend))
    assert "count/1: the store was away for it 2 times without a new checkpoint in between, the last time so: http" in sentence
    assert not any(task.is_isolated for task in backend.submitted)


def test_unit_that_can_isolate_what_kills_it_is_given_one_more_try_in_which_it_does(root: Path) -> None:
    """After three losses, and only then; what is lost even so, is lost for good."""
    found = []
    for times in (3, 4):
        backend = lose(times)
        run = Run(root / str(times), [counting(can_isolate=True)], RunnerOptions(attempts=3), backend)
        if times == 3:
            assert run.run().artifacts["count"].payload == {"total": 14}
        else:
            assert "count/1: its worker died 4 times without a new checkpoint in between" in stages_failing(run)
        assert any(
            "count/1: lost its worker (WorkerCrashedError: the machine is gone); trying once" in line
            for line in run.display.lines
        )
        found.append([task.is_isolated for task in backend.submitted if task.phase == "square" and task.unit.name == "1"])
        assert not any(task.is_isolated for task in backend.submitted if task.unit.name != "1")
    assert found == [[False, False, False, True]] * 2


def test_a_single_attempt_means_no_second_one(root: Path) -> None:
    told = stages_failing(Run(root, [counting()], RunnerOptions(attempts=1), lose(1)))
    assert "count/1: its worker died so: WorkerCrashedError" in told


def test_a_new_checkpoint_before_each_loss_gives_another_chance(root: Path, control: Control) -> None:
    """Five losses with three attempts: a unit that gets further each time is not given up; one that does not, is."""
    stage = counting(control=control.directory)
    losses = [0]

    def fate(task: UnitTask) -> UnitOutcome | None:
        if task.unit.name != "1" or losses[0] == 5:
            return None
        losses[0] += 1
        live = {"done": losses[0], "total": 9, "values": {"checkpoint": losses[0] if task.stage.name == "on" else 0}}
        Run(root, [stage]).store.storage.write_bytes(task.paths.live(task.phase, task.unit.name), json.dumps(live).encode())
        return UnitOutcome(task, infrastructure="lost")

    getting_on = Run(root, [replace(stage, name="on")], RunnerOptions(attempts=3), ScriptedBackend(1, fate))
    assert getting_on.run().artifacts["on"].payload == {"total": 14}
    losses[0] = 0
    assert "its worker died 3 times" in stages_failing(
        Run(root, [replace(stage, name="stuck")], RunnerOptions(attempts=3), ScriptedBackend(1, fate))
    )


def test_drift_is_refused_with_the_fields_and_both_remedies_and_nothing_is_touched(root: Path) -> None:
    Run(root, [counting(numbers=(1, 2)), counting("next", inputs=["count"])]).run()
    before = (root / "count" / RECORD_NAME).read_bytes()
    with pytest.raises(DriftError) as caught:
        Run(root, [counting(numbers=(1, 5), extra=1), counting("next", inputs=["count"])]).plan()
    told = str(caught.value)
    assert f"{root}/count was built from another recipe (extra: (absent) -> 1; numbers: [1, 2] -> [1, 5])" in told
    assert "either put the recipe back, or give a new 'root'" in told
    assert f"reuse: [{root}]" in told
    assert (root / "count" / RECORD_NAME).read_bytes() == before
    with pytest.raises(DriftError, match="stage version: 1 -> 2"):
        Run(root, [replace(counting(numbers=(1, 2)), version=2)]).plan()


def test_artifact_whose_input_is_of_another_recipe_is_refused_though_its_own_fields_are_the_same(root: Path) -> None:
    Run(root, [counting("a"), counting("b", inputs=["a"])]).run()
    (root / "a" / RECORD_NAME).unlink()
    with pytest.raises(DriftError, match="its input 'a' was built from another recipe"):
        Run(root, [counting("a", numbers=(9,)), counting("b", inputs=["a"])]).plan()


def test_input_built_anew_with_other_bytes_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import counting as module

    stages = [counting("a"), counting("b", inputs=["a"])]
    Run(root, stages).run()
    (root / "a" / RECORD_NAME).unlink()
    real = module.CountingWork.run
    monkeypatch.setattr(module.CountingWork, "run", lambda self, context: real(self, context) | {"total": 15})
    with pytest.raises(
        RebuiltInputError, match=r"/b stands on an earlier 'a' .*; delete .*/b and what stands on it, then run again"
    ):
        Run(root, stages).run()
    with pytest.raises(RebuiltInputError):
        Run(root, stages).plan()


def test_completion_that_is_damaged_is_named_with_the_remedy(root: Path, control: Control) -> None:
    control.order("fail", "sum-all")
    stage = counting(control=control.directory)
    stages_failing(Run(root, [stage]))
    (path,) = root.glob("count/_progress/*/done/square/2.json")
    path.write_text("{")
    with pytest.raises(CorruptFileError, match=rf"{path} is not a unit's completion; delete it and run again"):
        Run(root, [stage]).run()
    path.unlink()
    control.cancel("fail", "sum-all")
    Run(root, [stage]).run()


def test_file_that_vanished_before_the_commit_is_named_and_nothing_is_vouched_for(root: Path, control: Control) -> None:
    control.order("fail", "sum-all")
    stage = counting(control=control.directory)
    stages_failing(Run(root, [stage]))
    (staged,) = root.glob("count/_progress/*/staged/square/2/*/squares/2.txt")
    staged.unlink()
    control.cancel("fail", "sum-all")
    with pytest.raises(CorruptFileError, match=r"squares/2.txt is missing .*; delete .*/count/_progress/[0-9a-f]+ and run again"):
        Run(root, [stage]).run()
    assert not (root / "count" / RECORD_NAME).exists()


def test_file_of_another_builds_crash_is_never_taken_for_the_one_that_vanished(root: Path, control: Control) -> None:
    """Same name, same size, other content: only the digest tells, and only the size was once compared."""
    control.order("fail", "sum-all")
    stage = counting(control=control.directory)
    stages_failing(Run(root, [stage]))
    (staged,) = root.glob("count/_progress/*/staged/square/2/*/squares/2.txt")
    staged.unlink()
    (root / "count" / "squares").mkdir()
    (root / "count" / "squares" / "2.txt").write_text("5\n")
    control.cancel("fail", "sum-all")
    with pytest.raises(CorruptFileError, match=r"squares/2\.txt has other content"):
        Run(root, [stage]).run()


def test_unit_finished_by_two_attempts_counts_once_and_the_first_stands(root: Path) -> None:
    """A worker cut off from its driver finishes beside its replacement: both complete, one is vouched for."""
    from hardmoe.execution.worker import execute_unit

    def twice(task: UnitTask) -> UnitOutcome | None:
        first, second = execute_unit(task), execute_unit(task)
        assert first.completion == second.completion
        return second

    plan = Run(root, [counting()], backend=ScriptedBackend(1, twice)).run()
    assert plan.artifacts["count"].verify() == 5
    assert sorted(path.name for path in (root / "count").rglob("*.txt")) == ["1.txt", "2.txt", "3.txt", "sum.txt"]


def test_reused_artifact_is_taken_over_and_only_what_differs_is_built(root: Path, control: Control) -> None:
    first = [counting("a", control=control.directory), counting("b", inputs=["a"])]
    Run(root, first).run()
    runs = control.runs()
    second = [first[0], counting("b", numbers=(4,), inputs=["a"])]
    options = RunnerOptions(reuse=[str(root)])
    run = Run(root.parent / "second", second, options)
    plan = run.run()
    assert plan.artifacts["a"].record.reused_from == f"{root}/a"
    assert plan.artifacts["b"].record.reused_from is None
    assert plan.artifacts["b"].payload == {"total": 14 + 16}
    assert control.runs() == runs
    assert f"a: taken over from {root}/a" in run.display.lines
    third = Run(root.parent / "third", second, RunnerOptions(reuse=[str(root.parent / "second")])).run()
    assert third.artifacts["a"].record.reused_from == f"{root}/a"
    assert [artifact.verify() for artifact in third.artifacts.values()] == [5, 3]


def test_stage_without_units_is_committed_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import counting as module

    from hardmoe.stage import Finished, Phase

    def nothing(self, context):  # type: ignore[no-untyped-def]
        assert (yield Phase("none", [])) == []
        return Finished({}, {"only.txt": b"!"})

    monkeypatch.setattr(module.CountingWork, "phases", nothing)
    backend = ScriptedBackend()
    plan = Run(root, [counting("a"), counting("b")], backend=backend).run()
    assert backend.labels == []
    assert [artifact.verify() for artifact in plan.artifacts.values()] == [1, 1]


def test_two_phases_or_units_of_one_name_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second would have been answered from the first one's completions."""
    import counting as module

    from hardmoe.stage import Finished, Phase

    def phases(self, context):  # type: ignore[no-untyped-def]
        yield Phase("empty", [])
        yield Phase("empty" if context.stage.name == "phases" else "x", [Unit("a"), Unit("a")])
        return Finished({})

    monkeypatch.setattr(module.CountingWork, "phases", phases)
    told = stages_failing(Run(root, [counting("phases"), counting("units")]))
    assert "phases: two phases are called 'empty'" in told
    assert "units: phase x has two units of the same name" in told


def test_work_that_cannot_be_imported_is_told_and_holds_no_lease(root: Path) -> None:
    told = stages_failing(Run(root, [replace(counting(), work="no.such.module:Work"), counting("good")]))
    assert "count: ModuleNotFoundError: No module named 'no'" in told
    assert not (root / "count" / "_progress" / "lease.json").exists()


def test_thousand_stages_and_ten_thousand_units_cost_no_more_each_than_a_few(root: Path) -> None:
    """The frontier once went through all stages after every unit. Counted in looks at the storage, not in seconds."""
    from hardmoe.execution.frontier import Frontier

    looks = [0]

    class Counted(dict):  # type: ignore[type-arg]
        def values(self):  # type: ignore[no-untyped-def]
            looks[0] += 1
            return super().values()

    first = counting("first")
    experts = [replace(counting(f"expert-{n}"), inputs=Counted({"a": "first"})) for n in range(1000)]
    last = replace(counting("last"), inputs={str(n): f"expert-{n}" for n in range(1000)})
    frontier = Frontier([first, *experts, last], ())
    assert [stage.name for stage in frontier.ready] == ["first"]
    made = looks[0]
    assert made <= 2000
    frontier.finish(first)
    assert len(frontier.ready) == 1000
    for expert in experts:
        assert frontier.open
        frontier.begin(expert)
        frontier.finish(expert)
    assert [stage.name for stage in frontier.ready] == ["last"]
    assert looks[0] == made, "events must not go through the stages' inputs again"
    queue = WorkQueue()
    for number in range(10_000):
        queue.push(first, number)
    assert len(queue) == 10_000
    assert queue.pop(lambda demand: False) is None
    assert queue.pop(lambda demand: True) is first


def test_queue_gives_the_longest_chain_first_and_of_equal_ones_the_most_costly() -> None:
    queue = WorkQueue({"router": 3, "expert": 2})
    router, expert = counting("router"), counting("expert")
    for stage, cost in ((expert, 900.0), (router, 1.0), (expert, 1000.0)):
        queue.push(UnitTask("", stage, "", "phase", Unit(f"{stage.name}-{cost:.0f}")), cost)
    popped = [queue.pop(lambda demand: True) for _ in range(3)]
    assert [task.unit.name for task in popped if isinstance(task, UnitTask)] == ["router-1", "expert-1000", "expert-900"]


def test_plan_heights_count_the_stages_of_the_longest_chain() -> None:
    first = counting("first")
    second = replace(counting("second"), inputs={"a": "first"})
    last = replace(counting("last"), inputs={"a": "first", "b": "second"})
    assert Plan([first, second, last], {}, {}).heights() == {"first": 3, "second": 2, "last": 1}


def test_frontier_blocks_everything_that_stands_on_a_failure_and_nothing_else() -> None:
    from hardmoe.execution.frontier import Frontier

    a, b, c, d, e = (
        counting("a"),
        counting("b", inputs=["a"]),
        counting("c", inputs=["b"]),
        counting("d"),
        counting("e", inputs=["c", "d"]),
    )
    frontier = Frontier([a, b, c, d, e], ["a"])
    assert [stage.name for stage in frontier.ready] == ["b", "d"]
    frontier.begin(b)
    frontier.fail("b")
    frontier.fail("b")
    assert frontier.failed("b")
    assert not frontier.failed("c")
    assert [stage.name for stage in frontier.ready] == ["d"]
    assert frontier.open
    frontier.begin(d)
    frontier.put_back(d)
    frontier.finish(d)
    assert not frontier.open
    assert not frontier.ready
