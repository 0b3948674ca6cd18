"""`hardmoe evaluate --sweep-k … --sweep-capacity …`: how networks with layers of experts do with other limits than they have.

Judged are the run's networks that have such layers: trunk, dense baseline and rivals on all test images, the experts each on its
own part, all with the decoders that they were trained with.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from hardmoe.artifacts.names import DENSE, expert_name
from hardmoe.artifacts.store import Artifact
from hardmoe.cli.build import build, format_interval
from hardmoe.cli.common import format_table, recipe_of
from hardmoe.data.stages import with_source
from hardmoe.errors import RecipeError
from hardmoe.evaluation.moe_sweep import Setting, Swept, moe_sweep_stage, settings_of
from hardmoe.models.moe.config import has_experts
from hardmoe.pipeline import rival_network
from hardmoe.recipe import Recipe
from hardmoe.stage import Stage

LEGEND = """\
CV          standard deviation by mean of how often each expert is run; 0 where all are run equally often
living      experts that are run at all
dropped     choices for which the expert had no slot
entropy     of the router's distribution over the experts, nats an item"""


def show_moe_sweep(options: Mapping[str, Any], counts: Sequence[int], factors: Sequence[float], priority: bool | None) -> None:
    """Judge every setting as far as that was not done, then print a table.

    Raises:
        RecipeError: no network of the recipe has layers of experts, or one has fewer experts than asked for.
    """
    settings = settings_of(counts, factors, priority)
    systems = list(_systems(recipe_of(options)))
    if not systems:
        raise RecipeError(
            "--sweep-k and --sweep-capacity are for networks with layers of experts, of which the recipe has none; "
            "set trunk.backbone, "
            "experts.backbone or a rival's to one, such as moe_resnet18 or vmoe_s32"
        )
    if counts:
        _check(options, systems, settings)

    def beside(recipe: Recipe) -> list[Stage]:
        return [
            with_source(moe_sweep_stage(recipe.evaluation, swept, setting), recipe.dataset)
            for swept in systems
            for setting in settings
        ]

    built = build(options, [], beside=beside)
    stages = iter(beside(built.recipe))
    click.echo(_table([(swept, setting, built.artifact(next(stages).name)) for swept in systems for setting in settings]))
    click.echo("\n" + LEGEND)


def _systems(recipe: Recipe) -> Iterator[Swept]:
    trunk, experts = recipe.trunk.backbone, recipe.experts.backbone or recipe.trunk.backbone
    if has_experts(trunk):
        yield Swept("trunk", ("trunk",), "dataset")
    if has_experts(experts) and recipe.evaluation.dense_baseline:
        yield Swept("dense", (DENSE,), "dataset")
    for name, rival in recipe.evaluation.rivals.items():
        if has_experts(rival.backbone):
            yield Swept(name, (rival_network(name),), "dataset")
    if has_experts(experts):
        networks = tuple(f"experts/{expert_name(expert)}" for expert in range(recipe.partition.experts))
        yield Swept("experts_own_decoder", networks, "partition", partitioned=True)


def _check(options: Mapping[str, Any], systems: Sequence[Swept], settings: Sequence[Setting]) -> None:
    """Refuse before anything is started more experts than a layer has."""
    recipe = recipe_of(options)
    most = max(setting.k or 0 for setting in settings)
    for swept in systems:
        section = recipe.evaluation.rivals.get(swept.system) or (
            recipe.trunk if swept.system == "trunk" or recipe.experts.backbone is None else recipe.experts
        )
        from hardmoe.models.moe.networks.build import moe_recipe

        family = moe_recipe(section.backbone or "")
        have = section.moe.num_experts or (family.defaults.num_experts if family is not None else None) or 0
        if most > have:
            raise RecipeError(
                f"--sweep-k {most}: the layers of '{section.backbone}' ({swept.system}) have {have} experts; ask for "
                f"as many at most"
            )


def _table(found: Sequence[tuple[Swept, Setting, Artifact]]) -> str:
    rows: list[Sequence[str]] = [
        ("system", "k", "capacity", "priority", "precision@1", "FLOP/image", "CV", "living", "dropped", "entropy")
    ]
    from hardmoe.report.formats import format_large

    for swept, setting, artifact in found:
        payload = artifact.payload
        usage = payload["usage"]
        rows.append(
            (
                swept.system,
                "own" if setting.k is None else str(setting.k),
                "own" if setting.capacity_factor is None else f"{setting.capacity_factor:g}",
                {None: "own", True: "yes", False: "no"}[setting.priority],
                format_interval(payload["metrics"]["precision@1"]),
                format_large(payload["flops"]),
                f"{usage['cv_activation']:.2f}",
                f"{usage['living_experts']:.1f}",
                f"{100 * usage['dropped']:.1f} %",
                f"{usage['entropy']:.2f}",
            )
        )
    return format_table(rows, right=range(1, len(rows[0])))
