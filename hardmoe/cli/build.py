"""The commands that build: from options to a run of the durable workflow, and what they print when it is through."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import click

from hardmoe.artifacts.names import DENSE, expert_name, is_of_the_mixture
from hardmoe.artifacts.store import Artifact, ArtifactStore
from hardmoe.cli.checks import check_before_building, taken_over
from hardmoe.cli.common import RECIPE_FILE, format_table, keep_description, recipe_of
from hardmoe.cli.notices import tell_about_data
from hardmoe.config import Json
from hardmoe.data.schemas import SPLITS
from hardmoe.errors import RecipeError
from hardmoe.execution.display import make_display
from hardmoe.execution.opening import open_backend
from hardmoe.execution.plan import Plan, make_plan
from hardmoe.execution.progress import Reporter
from hardmoe.execution.runner import Runner, RunnerOptions
from hardmoe.pipeline import build_stages, identify_inputs, select
from hardmoe.planning.room import Room
from hardmoe.recipe import Recipe
from hardmoe.stage import Stage
from hardmoe.storage import open_storage

METRIC_COLUMNS = ("precision@1", "precision@5", "recall@10", "hit@5", "map")


@dataclass(frozen=True)
class Built:
    """A run after a command has done its part."""

    store: ArtifactStore
    recipe: Recipe
    plan: Plan
    fresh: frozenset[str]
    """Artifacts that this command built or took over."""

    def artifact(self, name: str) -> Artifact:
        """A finished artifact."""
        return self.plan.artifacts[name]


def build(
    options: Mapping[str, Any],
    targets: Sequence[str],
    only: Sequence[str] = (),
    beside: Callable[[Recipe], Sequence[Stage]] | None = None,
) -> Built:
    """Build the targets and whatever they stand on, as far as it is missing.

    Args:
        options: the command's options.
        targets: names of artifacts; `experts` stands for all experts.
        only: names of experts to choose from them.
        beside: stages, all of them targets, that the recipe does not ask for and this command does.
    """
    store, recipe, plan = _planned(options, targets, only, beside)
    missing = {stage.name for stage in plan.missing}
    if missing:
        check_before_building(recipe, plan)
        keep_description(store.storage, RECIPE_FILE, recipe.model_dump(mode="json"))
        room = Room(recipe, store.storage, plan.artifacts)
        accept, execution = options["accept_versions"], recipe.execution
        limits = RunnerOptions(execution.parallel, execution.attempts, recipe.reuse, accept, room)
        display = make_display()
        reporter = Reporter(store.storage, display)
        Runner(store, partial(open_backend, recipe.execution, display.say), reporter, limits).run(plan)
        tell_about_data(recipe, plan, missing)
    return Built(store, recipe, plan, frozenset(missing))


def print_plan(options: Mapping[str, Any]) -> None:
    """What `run` would do."""
    _, recipe, plan = _planned(options, ["report"])
    check_before_building(recipe, plan)
    reused = taken_over(recipe, plan)
    rows: list[Sequence[str]] = [("artifact", "state", "inputs")]
    for stage in plan.stages:
        state = "done" if stage.name in plan.artifacts else "reused" if stage.name in reused else "missing"
        inputs = list(dict.fromkeys(stage.inputs.values()))
        rows.append((stage.name, state, ", ".join(inputs[:4]) + (", …" if len(inputs) > 4 else "")))
    click.echo(format_table(rows))
    click.echo(f"\n{len(plan.missing) - len(reused)} of {len(plan.stages)} artifacts would be built")
    if reused:
        click.echo(f"{len(reused)} would be taken over: " + ", ".join(reused))


def print_parts(built: Built) -> None:
    """Sizes of the parts."""
    payload = built.artifact("partition").payload
    extra: Mapping[str, Sequence[int]] = payload.get("extra", {})
    headings = [f"from others: {kind.replace('_', '-')}" for kind in extra]
    rows: list[Sequence[str]] = [("part", *SPLITS, "mean distance", *headings)]
    for expert in range(payload["experts"]):
        distance = payload["mean_distance"][expert]
        sizes = [str(payload["sizes"][split][expert]) for split in SPLITS]
        copies = [str(counts[expert]) for counts in extra.values()]
        rows.append((expert_name(expert), *sizes, "-" if distance is None else f"{distance:.3f}", *copies))
    click.echo(format_table(rows, right=range(1, len(rows[0]))))
    facts = _router_facts(built)
    if projected := facts.get("transform"):
        whitened, share = ", whitened" if projected["kind"] == "whiten" else "", _percent(projected["explained"])
        directions = f"{projected['components']} principal directions of {projected['of']}{whitened}"
        click.echo(f"\nby distances along {directions}: {share} of the features' variance")
    if fine := facts.get("fine_clusters"):
        click.echo(f"\n{sum(fine)} fine clusters in {len(fine)} parts, {min(fine)} to {max(fine)} in each")
    if elsewhere := payload.get("routed_elsewhere"):
        counts = ", ".join(f"{elsewhere[split]} of {sum(payload['sizes'][split])} {split}" for split in SPLITS)
        click.echo(f"\nexamples that the router would send to another part than the one given: {counts}")
    if balance := payload.get("balance"):
        elsewhere, examples = sum(balance["serve_elsewhere"]), sum(payload["sizes"]["train"])
        above = balance["cost"] / balance["lower_bound"] - 1.0 if balance["lower_bound"] else 0.0
        click.echo(
            f"\nbalanced to {balance['capacity']} training examples a part, at most {100 * above:.3f} % above the least possible "
            f"cost; {elsewhere} of {examples} ({_percent(elsewhere / examples)}) serve elsewhere than they trained"
        )


def _router_facts(built: Built) -> Mapping[str, Json]:
    """What the router's record says; nothing where parts are random."""
    names = {stage.name for stage in built.plan.stages}
    facts: Mapping[str, Json] = built.artifact("router").payload if "router" in names else {}
    return facts


def print_experts(built: Built) -> None:
    """What came of the experts."""
    rows: list[Sequence[str]] = [("expert", "examples", "seen", "steps", "loss", "validation precision@1")]
    for stage in built.plan.stages:
        if stage.name.startswith("experts/"):
            payload = built.artifact(stage.name).payload
            counts = [str(payload[key]) for key in ("unique_examples", "examples_seen", "steps")]
            rows.append((stage.name, *counts, _number(payload["final_loss"]), _percent(payload["validation_precision@1"])))
    click.echo(format_table(rows, right=(1, 2, 3, 4, 5)))


def print_decoder(built: Built) -> None:
    """What came of the decoder."""
    payload = built.artifact("decoder").payload
    click.echo(
        f"decoder over {payload['experts']} experts: {payload['num_features']} -> {payload['dim']} dimensions, "
        f"{payload['num_tags']} tags, loss {_number(payload['final_loss'])}, "
        f"validation precision@1 {_percent(payload['validation_precision@1'])}"
    )


def print_metrics(built: Built) -> None:
    """The metrics table, in per cent with 95 % intervals."""
    evaluation = built.artifact("evaluation")
    results = json.loads(evaluation.storage.read_bytes(evaluation.path("metrics.json")))
    rows: list[Sequence[str]] = [("system", *METRIC_COLUMNS)]
    for system, metrics in results["systems"].items():
        rows.append((system, *(format_interval(metrics[name]) for name in METRIC_COLUMNS)))
    click.echo(f"{results['num_test_examples']} test examples; per cent, with 95 % bootstrap intervals\n")
    click.echo(format_table(rows, right=range(1, len(rows[0]))))
    _print_differences(results["differences"])
    if results["costs"]:
        click.echo("\n" + cost_table({(system,): cost for system, cost in results["costs"].items()}, ("system",)))
        _print_teachers(results["costs"])
    _print_unequal_costs(built)


def _print_differences(differences: Mapping[str, Mapping[str, Any]]) -> None:
    """What the mixture is above the control that counts, and above what learnt from it."""
    lines = []
    for name in ("mixture - dense_refit", "mixture - distilled"):
        difference = differences.get(name, {}).get("precision@1")
        if difference and difference["low"] is not None:
            low, high = 100 * difference["low"], 100 * difference["high"]
            lines.append(f"{name}, precision@1: {100 * difference['value']:+.1f} points [{low:+.1f}, {high:+.1f}]")
    if lines:
        click.echo("\n" + "\n".join(lines))


def cost_table(costs: Mapping[tuple[str, ...], Mapping[str, int]], names: Sequence[str]) -> str:
    """What every system takes, in use and in training; `names` head the columns of its key."""
    from hardmoe.report.formats import format_large

    rows: list[Sequence[str]] = [(*names, "parameters", "of one image", "FLOP/image", "images shown", "training FLOP")]
    for system, cost in costs.items():
        counts = (cost["parameters"], cost["active_parameters"], cost["flops"])
        told = [*map(format_large, counts), f"{cost['images_seen']:,}", format_large(cost["training_flops"])]
        rows.append((*system, *told))
    if any("routed_flops" in cost for cost in costs.values()):
        shares = [f"{100 * cost.get('routed_flops', 0) / cost['flops']:.1f} %" for cost in costs.values()]
        rows = [(*row, last) for row, last in zip(rows, ["routed of it", *shares], strict=True)]
    return format_table(rows, right=range(len(names), len(rows[0])))


def _print_teachers(costs: Mapping[str, Mapping[str, int]]) -> None:
    """What of a training's operations made its teacher."""
    from hardmoe.report.formats import format_large

    for system, cost in costs.items():
        if taught := cost.get("teacher_flops"):
            whole, own = (format_large(each) for each in (cost["training_flops"], cost["training_flops"] - taught))
            click.echo(
                f"\n{system}: of its {whole} training FLOP {format_large(taught)} made the mixture and its answers, "
                f"{own} are its own"
            )


def _print_unequal_costs(built: Built) -> None:
    """What each side of the comparison has seen, where an early stop or repeats of rare hashtags made it unequal."""
    dense = built.plan.artifacts.get(DENSE)
    experts = [artifact for name, artifact in built.plan.artifacts.items() if is_of_the_mixture(name)]
    seen = sum(artifact.payload["examples_seen"] for artifact in experts)
    if dense is not None and seen != dense.payload["examples_seen"]:
        click.echo(
            f"\nnot at equal cost: the experts were shown {seen:,} images together, the dense baseline "
            f"{dense.payload['examples_seen']:,}"
        )


def publish(built: Built) -> str:
    """Write the page if it is missing or its data are new; returns where it is."""
    from hardmoe.report.publish import PAGE_PATH, publish_page

    if "report" in built.fresh or not built.store.storage.exists(PAGE_PATH):
        publish_page(built.store.storage, built.artifact("report"), list(built.plan.artifacts.values()))
    return built.store.storage.where(PAGE_PATH)


def _planned(
    options: Mapping[str, Any],
    targets: Sequence[str],
    only: Sequence[str] = (),
    beside: Callable[[Recipe], Sequence[Stage]] | None = None,
) -> tuple[ArtifactStore, Recipe, Plan]:
    recipe = recipe_of(options)
    more = beside(recipe) if beside is not None else []
    store = ArtifactStore(open_storage(recipe.root))
    stages = [*build_stages(recipe, identify_inputs(recipe, store)), *more]
    experts = [stage.name for stage in stages if stage.name.startswith("experts/")]
    names = [name for target in targets for name in (_chosen(experts, only) if target == "experts" else [target])]
    return store, recipe, make_plan(store, select(stages, [*names, *(stage.name for stage in more)]))


def _chosen(experts: Sequence[str], only: Sequence[str]) -> list[str]:
    wanted = {name if name.startswith("experts/") else f"experts/{name}" for name in only} or set(experts)
    if unknown := sorted(wanted - set(experts)):
        first, last = experts[0].removeprefix("experts/"), experts[-1].removeprefix("experts/")
        raise RecipeError(f"--only {unknown[0].removeprefix('experts/')}: the recipe's experts are {first} to {last}")
    return [name for name in experts if name in wanted]


def format_interval(metric: Mapping[str, Any] | None, signed: bool = False) -> str:
    """A metric in per cent, with its interval where there is one; `signed` is for differences."""
    if metric is None or metric["value"] is None:
        return "-"
    sign = "+" if signed else ""
    value = f"{100 * metric['value']:{sign}.1f}"
    if metric["low"] is None:  # too few test examples for an interval
        return value
    return f"{value} [{100 * metric['low']:{sign}.1f}, {100 * metric['high']:{sign}.1f}]"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
