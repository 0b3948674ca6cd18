"""`hardmoe plan`: time, GPU-hours, bytes, memory and cost of every stage, before anything is begun."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.cli.common import RECIPE_FILE, described_in, format_table, recipe_of
from hardmoe.errors import RecipeError
from hardmoe.execution.checkup.findings import judge_demands
from hardmoe.execution.tracked import format_bytes, format_seconds
from hardmoe.pipeline import ExternalInputs, build_stages
from hardmoe.planning.estimate import Machines, RunPlan, plan_run
from hardmoe.planning.rates import Rates
from hardmoe.planning.work import Network
from hardmoe.recipe import Recipe, parse_recipe
from hardmoe.storage import open_storage

_IMAGE_BYTES = 50_000.0
"""Where neither --image-bytes nor a finished run says it: a photo of 500 pixels."""


@dataclass(frozen=True)
class Asked:
    """What `plan` is asked beside the recipe."""

    images: int | None
    image_bytes: float | None
    gpus: int
    nodes: int | None
    cpus: int
    calibrate: str | None
    rates: Mapping[str, str]


def show_plan(options: Mapping[str, Any], asked: Asked, as_json: bool) -> None:
    """Simulate the run and print the table.

    Raises:
        RecipeError: the number of images is not known or less than there are experts, the calibration's root has no finished run,
            or a unit fits on no node.
        CorruptFileError: the calibration's root is damaged.
    """
    recipe = recipe_of(options)
    rates, images, image_bytes = Rates.stated(asked.rates), asked.images, asked.image_bytes
    if asked.calibrate is not None:
        storage = open_storage(asked.calibrate)
        if not storage.exists(RECIPE_FILE):
            raise RecipeError(f"--calibrate: no run was begun in {storage.where()}; name the root of a finished run")
        earlier = parse_recipe(described_in(storage, RECIPE_FILE), storage.where(RECIPE_FILE))
        rates = rates.measured(storage, earlier, build_stages(earlier, ExternalInputs("")))
    found = ArtifactStore(open_storage(asked.calibrate or recipe.root)).find("dataset")
    if found is not None:
        known = sum(found.payload["sizes"].values())
        images = images or known
        image_bytes = image_bytes or sum(entry.size for entry in found.record.files if entry.path.startswith("split=")) / max(
            1, known
        )
    if images is None:
        raise RecipeError("how many images there are is not known yet; say it with --images, such as --images 1e9")
    if images < recipe.partition.experts:
        raise RecipeError(f"{images:,} images do not make {recipe.partition.experts:,} parts; raise --images, or lower --experts")
    machines = _machines(asked, recipe)
    demands = [stage.resources for stage in build_stages(recipe, ExternalInputs(""))]
    for finding in judge_demands(demands, machines.nodes[:1]):
        if finding.state == "bad":
            raise RecipeError(
                f"{finding.text} ({_described(machines)}); lower num_threads or gpus in the recipe, or say more --cpus or --gpus"
            )
    plan = plan_run(recipe, images, image_bytes or _IMAGE_BYTES, machines, rates, _network(recipe))
    if as_json:
        body = {"hours": plan.hours, "images": images, "experts": recipe.partition.experts, "rates": asdict(rates)}
        click.echo(json.dumps(body | {"stages": [asdict(stage) for stage in plan.stages]}, indent=1))
        return
    where = _described(machines)
    whence = (
        f"rates of the run in {asked.calibrate}"
        if asked.calibrate
        else "rates of usual machines (--calibrate ROOT, --rate NAME=VALUE)"
    )
    click.echo(f"{images:,} images, {recipe.partition.experts} experts, {where}; {whence}\n")
    click.echo(_table(plan))


def _machines(asked: Asked, recipe: Recipe) -> Machines:
    """Nodes of equal size; as few as hold the GPUs at eight each, unless their number is given."""
    nodes = asked.nodes or max(1, -(-asked.gpus // 8))
    if asked.gpus % nodes:
        raise RecipeError(f"{asked.gpus} GPUs do not divide among {nodes} nodes; change --gpus or --nodes")
    return Machines([{"CPU": float(asked.cpus), "GPU": asked.gpus / nodes}] * nodes, recipe.execution.parallel)


def _described(machines: Machines) -> str:
    return f"{len(machines.nodes)} nodes of {machines.nodes[0]['CPU']:g} CPUs and {machines.nodes[0]['GPU']:g} GPUs"


def _network(recipe: Recipe) -> Network:
    from hardmoe.models.flops import measure_backbone
    from hardmoe.models.probe import probe_backbone

    trunk = recipe.trunk
    size = measure_backbone(trunk.backbone, image_size=trunk.image_size, stem=trunk.stem)
    width = probe_backbone(trunk.backbone, image_size=trunk.image_size, stem=trunk.stem)
    return Network(size.flops, size.parameters, width or 512)


def _table(plan: RunPlan) -> str:
    rows: list[Sequence[str]] = [("stage", "units", "begins", "ends", "CPU h", "GPU h", "read", "stored", "memory/unit", "cost")]
    for stage in plan.stages:
        times = [format_seconds(3600 * stage.begin_hours), format_seconds(3600 * stage.end_hours)]
        hours = [f"{stage.cpu_hours:,.2f}", f"{stage.gpu_hours:,.2f}"]
        sizes = [format_bytes(stage.read_bytes), format_bytes(stage.stored_bytes), format_bytes(stage.memory_bytes)]
        rows.append((stage.stage, f"{stage.units:,}", *times, *hours, *sizes, f"{stage.cost:,.2f}"))
    totals = [f"{plan.total('cpu_hours'):,.2f}", f"{plan.total('gpu_hours'):,.2f}"]
    sizes = [format_bytes(plan.total("read_bytes")), format_bytes(plan.total("stored_bytes")), ""]
    rows.append(
        (
            "all",
            f"{plan.total('units'):,.0f}",
            "0:00",
            format_seconds(3600 * plan.hours),
            *totals,
            *sizes,
            f"{plan.total('cost'):,.2f}",
        )
    )
    return format_table(rows, right=range(1, len(rows[0])))
