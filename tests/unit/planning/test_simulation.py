"""The simulated scheduler against what can be said of schedules by hand."""

import pytest

from hardmoe.planning.simulation import PhaseWork, Simulation
from hardmoe.stage import Resources, Stage

ONE_CPU, GPU_IF_ANY = Resources(1, 0.0), Resources(1, None)


def stage(name: str, *inputs: str, resources: Resources = ONE_CPU) -> Stage:
    return Stage(name, "pretended", 1, {}, "nowhere:Nothing", {each: each for each in inputs}, resources=resources)


def cpus(*counts: float) -> list[dict[str, float]]:
    return [{"CPU": count, "GPU": 0.0} for count in counts]


def test_units_of_a_phase_share_the_slots_and_phases_follow_each_other() -> None:
    work = {"a": [PhaseWork("map", 10, 2.0), PhaseWork("reduce", 1, 3.0)]}
    simulation = Simulation([stage("a")], work, cpus(2, 2))
    assert simulation.run() == pytest.approx(3 * 2.0 + 3.0)
    assert simulation.spans["a"].busy == pytest.approx(23.0)


def test_stage_waits_for_its_inputs_and_for_nothing_else() -> None:
    stages = [stage("a"), stage("b"), stage("c", "a")]
    work = {"a": [PhaseWork("do", 1, 5.0)], "b": [PhaseWork("do", 1, 1.0)], "c": [PhaseWork("do", 1, 2.0)]}
    simulation = Simulation(stages, work, cpus(2))
    assert simulation.run() == pytest.approx(7.0)
    assert (simulation.spans["b"].begin, simulation.spans["c"].begin) == (0.0, 5.0)


def test_longest_of_independent_stages_begins_first() -> None:
    lengths = [1.0, 1.0, 1.0, 4.0, 1.0]
    stages = [stage(f"experts/expert-{index:04d}") for index in range(5)]
    work = {each.name: [PhaseWork("train", 1, length)] for each, length in zip(stages, lengths, strict=True)}
    simulation = Simulation(stages, work, cpus(2))
    assert simulation.run() == pytest.approx(4.0)
    assert simulation.spans["experts/expert-0003"].begin == 0.0


def test_experts_take_gpus_where_there_are_any_and_leave_cpus_to_others() -> None:
    stages = [*(stage(f"e{index}", resources=GPU_IF_ANY) for index in range(4)), stage("tables")]
    work = {each.name: [PhaseWork("do", 1, 10.0)] for each in stages}
    nodes = [{"CPU": 8.0, "GPU": 2.0}]
    simulation = Simulation(stages, work, nodes)
    assert simulation.run() == pytest.approx(20.0)
    assert simulation.spans["tables"].end == pytest.approx(10.0)
    assert Simulation(stages, work, cpus(8)).run() == pytest.approx(10.0), "without any GPU they take CPUs"


def test_parallel_bounds_units_whatever_the_slots() -> None:
    work = {"a": [PhaseWork("map", 6, 1.0)]}
    assert Simulation([stage("a")], work, cpus(8), parallel=2).run() == pytest.approx(3.0)


def test_very_many_units_take_as_long_merged_as_they_would_apart() -> None:
    work = {"a": [PhaseWork("map", 1_200_000, 1.0)]}
    simulation = Simulation([stage("a")], work, cpus(48, 48))
    assert simulation.run() == pytest.approx(12_500.0)
    assert simulation.spans["a"].busy == pytest.approx(1_200_000.0)
