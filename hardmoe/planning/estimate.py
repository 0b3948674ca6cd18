"""The plan: rows of every stage, through the rates, into the simulation; and the table that comes out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hardmoe.artifacts.names import expert_name
from hardmoe.pipeline import ExternalInputs, build_stages
from hardmoe.planning.rates import Rates
from hardmoe.planning.simulation import PhaseWork, Simulation
from hardmoe.planning.work import Network, Shape, Volume, phases_of, rows_of, volume_of
from hardmoe.recipe import Recipe
from hardmoe.stage import Stage

_BACKWARD = 3.0
"""A training step costs three forward passes."""


@dataclass(frozen=True)
class StagePlan:
    """One line: a stage, or all experts of one place together."""

    stage: str
    units: int
    begin_hours: float
    end_hours: float
    cpu_hours: float
    gpu_hours: float
    read_bytes: float
    stored_bytes: float
    memory_bytes: float
    """Of one unit at its peak."""
    cost: float


@dataclass(frozen=True)
class RunPlan:
    """All lines, and the whole."""

    hours: float
    stages: Sequence[StagePlan]

    def total(self, name: str) -> float:
        """The sum of a column."""
        values: list[float] = [getattr(stage, name) for stage in self.stages]
        return sum(values)


@dataclass(frozen=True)
class Machines:
    """What there is to run on."""

    nodes: Sequence[Mapping[str, float]]
    parallel: int | None = None

    @property
    def has_gpus(self) -> bool:
        """Whether networks run on GPUs."""
        return any(node.get("GPU", 0.0) >= 1 for node in self.nodes)


def plan_run(recipe: Recipe, images: int, image_bytes: float, machines: Machines, rates: Rates, network: Network) -> RunPlan:
    """Simulate a run from nothing to the report, without the second dataset of `evaluation.transfer`.

    Args:
        recipe: what is built.
        images: in the collection.
        image_bytes: of one encoded image, on average.
        machines: where.
        rates: how fast.
        network: of the trunk; experts are taken to be as large.
    """
    shape = Shape.of_recipe(recipe, images)
    # Nothing is known of the size of a second dataset, which is left out.
    own = recipe.evaluation.model_copy(update={"transfer": None})
    recipe = recipe.model_copy(update={"evaluation": own})
    stages = build_stages(recipe, ExternalInputs(""))
    work = {stage.name: _phases(stage, recipe, shape, rates, (network, machines.has_gpus)) for stage in stages}
    simulation = Simulation(stages, work, machines.nodes, machines.parallel)
    seconds = simulation.run() + rates.start_seconds
    lines: dict[str, StagePlan] = {}
    for stage in stages:
        span, units = simulation.spans[stage.name], sum(phase.units for phase in work[stage.name])
        on_gpu = machines.has_gpus and stage.resources.num_gpus != 0
        gpus = (stage.resources.num_gpus or 1.0) if on_gpu else 0.0
        cpu_hours, gpu_hours = stage.resources.num_cpus * span.busy / 3600, gpus * span.busy / 3600
        cost = gpu_hours * rates.gpu_price if on_gpu else cpu_hours * rates.cpu_price
        size: Volume = volume_of(stage, recipe, shape, network, image_bytes)
        name = stage.name.rpartition("/expert-")[0] or stage.name
        begin, end = ((moment + rates.start_seconds) / 3600 for moment in (span.begin, span.end))
        line = StagePlan(name, units, begin, end, cpu_hours, gpu_hours, size.read, size.stored, size.memory, cost)
        lines[name] = line if name not in lines else _together(lines[name], line)
    return RunPlan(seconds / 3600, list(lines.values()))


def _together(one: StagePlan, other: StagePlan) -> StagePlan:
    return StagePlan(
        one.stage,
        one.units + other.units,
        min(one.begin_hours, other.begin_hours),
        max(one.end_hours, other.end_hours),
        one.cpu_hours + other.cpu_hours,
        one.gpu_hours + other.gpu_hours,
        one.read_bytes + other.read_bytes,
        one.stored_bytes + other.stored_bytes,
        max(one.memory_bytes, other.memory_bytes),
        one.cost + other.cost,
    )


def _phases(stage: Stage, recipe: Recipe, shape: Shape, rates: Rates, on: tuple[Network, bool]) -> list[PhaseWork]:
    rows = rows_of(stage, recipe, shape)
    measured = rates.row_seconds(stage)
    each = measured if measured is not None else _seconds_per_row(stage, rates, *on)
    beside = rates.seconds_beside_rows(stage)
    return [PhaseWork(name, units, beside + rows * each * share / units) for name, units, share in phases_of(stage, shape)]


def _seconds_per_row(stage: Stage, rates: Rates, network: Network, has_gpus: bool) -> float:
    """Without a measurement: the slower of decoding and the network, or what tables take."""
    kind, cores = stage.kind, stage.resources.num_cpus
    if kind in ("trunk", "expert", "distilled", "features", "embeddings", "nearest-embeddings"):
        speed = rates.gpu_tflops * 1e12 if has_gpus else rates.cpu_gflops * 1e9 * cores
        passes = _BACKWARD if kind in ("trunk", "expert", "distilled") else 1.0
        if kind == "distilled" and expert_name(0) in stage.inputs:
            passes += 1.0  # of the expert that it learns from
        decoding = 1.0 / (rates.decode * cores)
        # Beside a GPU images are decoded while it computes; on a CPU the same cores do both.
        return max(decoding, passes * network.flops / speed) if has_gpus else decoding + passes * network.flops / speed
    if kind == "dataset":
        return 1.0 / rates.ingest
    if kind == "partition":
        return 1.0 / rates.copy
    if kind == "router":
        return 3.0 * network.features / (rates.distances * cores)
    if kind == "decoder":
        return 1.0 / rates.fit
    return 1.0 / rates.rows
