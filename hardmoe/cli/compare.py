"""`hardmoe report --compare ROOT…`: finished runs side by side, as tables, as JSON and as one page.

Differences are held against one system of one run. They are paired, image by image, where both runs were judged on the same test
examples with the same hashtags, which the records of dataset and vocabulary say; elsewhere only the values are subtracted and no
interval is made up. Rejected: a mean over runs, which is for runs that differ in their seed alone (`hardmoe sweep`).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from hardmoe.cli.build import METRIC_COLUMNS, cost_table, format_interval
from hardmoe.cli.common import format_table
from hardmoe.cli.finished import CONTROL, MIXTURE, FinishedRun, distinct_names, speed_of, wall_clock
from hardmoe.config import Json
from hardmoe.errors import RecipeError, StorageError


def check_options(roots: Sequence[str], options: Mapping[str, Any]) -> None:
    """Refuse a comparison of nothing, and options that would be ignored, as finished runs have their recipes."""
    if not roots:
        raise click.UsageError("--compare needs the root of at least one finished run: hardmoe report --compare runs/a runs/b")
    given = [name for name in options if name != "debug" and options[name]]
    if given:
        raise click.UsageError(
            "--compare reads finished runs and takes no recipe; leave out everything but ROOT, --against, --out and --json"
        )


def compare_runs(roots: Sequence[str], against: str | None, out: Path, as_json: bool) -> None:
    """Read the runs, write the page, print the tables.

    Args:
        roots: of finished runs, paths or URIs; only read.
        against: `SYSTEM` of the first run, or `RUN:SYSTEM`; None for the first run's mixture.
        out: the page's file.
        as_json: print JSON instead of tables.

    Raises:
        RecipeError: a root holds no finished run, or is named twice, or there is no system to be held against.
        StorageError: a root cannot be read, or the page cannot be written.
    """
    from hardmoe.report.compare import render_comparison

    comparison = gather([FinishedRun.open(root) for root in roots], against)
    try:
        out.write_text(render_comparison(comparison))
    except OSError as error:
        raise StorageError(
            f"cannot write {out}: {(error.strerror or str(error)).lower()}; name another file with --out"
        ) from error
    if as_json:
        click.echo(json.dumps({**comparison, "page": str(out)}, indent=1))
    else:
        click.echo(f"{described(comparison)}\n\npage: {out}")


def gather(runs: Sequence[FinishedRun], against: str | None) -> dict[str, Json]:
    """What is known of all runs and their differences to one system, as plain JSON.

    Raises:
        RecipeError: a run is named twice, or `against` names nothing.
    """
    places = [run.where for run in runs]
    if twice := [place for place in places if places.count(place) > 1]:
        raise RecipeError(f"{twice[0]} is named twice; name every run once")
    names = distinct_names(places)
    chosen = _chosen(names, runs, against)
    reference = runs[names.index(chosen["run"])]
    told = []
    for name, run in zip(names, runs, strict=True):
        row = _described_run(name, run)
        for system, facts in row["systems"].items():
            if (name, system) != (chosen["run"], chosen["system"]):
                facts["difference"] = _differences(run, system, reference, chosen["system"])
        told.append(row)
    return {"runs": told, "against": chosen, "test_sets": _test_sets(told)}


def _chosen(names: Sequence[str], runs: Sequence[FinishedRun], against: str | None) -> dict[str, str]:
    """Which system of which run differences are held against."""
    if against is None:
        systems = list(runs[0].results["systems"])
        return {"run": names[0], "system": MIXTURE if MIXTURE in systems else systems[0]}
    name, _, system = against.rpartition(":")
    name = name or names[0]
    if name not in names:
        raise RecipeError(f"--against {against}: there is no run '{name}'; the runs are {', '.join(names)}")
    if system not in (there := runs[names.index(name)].results["systems"]):
        raise RecipeError(f"--against {against}: the run '{name}' has no system '{system}'; it has {', '.join(there)}")
    return {"run": name, "system": system}


def _described_run(name: str, run: FinishedRun) -> dict[str, Json]:
    dataset, vocabulary = run.test_set
    systems: dict[str, dict[str, Json]] = {}
    for system, metrics in run.results["systems"].items():
        cost, trainings = run.results["costs"].get(system), run.trainings(system)
        if cost is not None:
            cost = {**cost, "rho": cost.get("routed_flops", 0) / cost["flops"]}
        systems[system] = {
            "metrics": metrics,
            "cost": cost,
            "examples_per_second": speed_of(trainings),
            "training_seconds": wall_clock(trainings),
        }
    return {
        "name": name,
        "root": run.where,
        "num_test_examples": run.results["num_test_examples"],
        "dataset": dataset,
        "vocabulary": vocabulary,
        "training_seconds": wall_clock(run.trainings()),
        **run.built_by(),
        "num_experts": run.num_experts(),
        "gain": _gain(run),
        "systems": systems,
    }


def _gain(run: FinishedRun) -> Json:
    """The mixture's headline metric less the control's of its own run; None where it lacks one of them."""
    from hardmoe.evaluation.bootstrap import paired_result

    values_R = run.replicates(METRIC_COLUMNS[0])
    return paired_result(values_R[MIXTURE], values_R[CONTROL]) if values_R.keys() >= {MIXTURE, CONTROL} else None


def _differences(run: FinishedRun, system: str, reference: FinishedRun, chosen: str) -> dict[str, Json]:
    """Of every metric that has replicates: paired with an interval, or the values' difference without one."""
    from hardmoe.evaluation.bootstrap import paired_result
    from hardmoe.evaluation.metrics import METRICS

    found: dict[str, Json] = {}
    is_paired = run.test_set == reference.test_set
    for metric in METRICS:
        ours_R, theirs_R = run.replicates(metric)[system], reference.replicates(metric)[chosen]
        # Fewer replicates in one of two runs: those that both have are the same draws.
        rows = min(len(ours_R), len(theirs_R))
        if is_paired:
            found[metric] = paired_result(ours_R[:rows], theirs_R[:rows])
        else:
            value = float(ours_R[0] - theirs_R[0])
            found[metric] = {"value": value if np.isfinite(value) else None, "low": None, "high": None, "reason": "unpaired"}
    return {"is_paired": is_paired, "metrics": found}


def _test_sets(runs: Sequence[Mapping[str, Json]]) -> dict[str, Json]:
    """Which runs were judged on the same examples, and one sentence about it."""
    groups: dict[tuple[str, str], list[str]] = {}
    counts: dict[tuple[str, str], int] = {}
    for run in runs:
        key = (run["dataset"], run["vocabulary"])
        groups.setdefault(key, []).append(run["name"])
        counts[key] = run["num_test_examples"]
    if len(groups) == 1:
        (count,) = counts.values()
        who = "The run was" if len(runs) == 1 else "All runs were"
        return {
            "is_same": True,
            "groups": list(groups.values()),
            "sentence": f"{who} judged on the same {count:,} test examples, so every difference is paired.",
        }
    parts = [f"{', '.join(names)}: {counts[key]:,} test examples" for key, names in groups.items()]
    differ = "vocabularies over one dataset" if len({dataset for dataset, _ in groups}) == 1 else "datasets"
    return {
        "is_same": False,
        "groups": list(groups.values()),
        "sentence": f"The runs were judged on different {differ} ({'; '.join(parts)}), so between these groups values are no "
        "fair comparison, and differences are unpaired and have no interval.",
    }


def described(comparison: Mapping[str, Json]) -> str:
    """The tables."""
    from hardmoe.report.formats import format_duration, format_large

    chosen, runs = comparison["against"], comparison["runs"]
    headline = METRIC_COLUMNS[0]
    measured: list[Sequence[str]] = [("run", "system", *METRIC_COLUMNS, f"{headline} - {chosen['run']}:{chosen['system']}")]
    costs: dict[tuple[str, ...], Mapping[str, int]] = {}
    times: list[Sequence[str]] = [("run", "system", "examples/s", "training time")]
    built: list[Sequence[str]] = [("run", "trainings took", "commit", "machine", "root")]
    for run in runs:
        for system, told in run["systems"].items():
            values = [format_interval(told["metrics"].get(name)) for name in METRIC_COLUMNS]
            measured.append((run["name"], system, *values, _difference(told.get("difference"), headline)))
            if told["cost"] is not None:
                costs[run["name"], system] = told["cost"]
            speed, seconds = told["examples_per_second"], told["training_seconds"]
            speed_told = "-" if speed is None else format_large(speed)
            times.append((run["name"], system, speed_told, "-" if seconds is None else format_duration(seconds)))
        took = "-" if run["training_seconds"] is None else format_duration(run["training_seconds"])
        commits = ", ".join(commit[:10] for commit in run["commits"]) or "-"
        built.append((run["name"], took, commits, "; ".join(run["machines"]) or "-", run["root"]))
    sections = [
        f"{comparison['test_sets']['sentence']}\nPer cent, with 95 % bootstrap intervals over test images, not over the luck of "
        f"training.\n\n{format_table(measured, right=range(2, len(measured[0])))}",
        cost_table(costs, ("run", "system")) if costs else "",
        format_table(times, right=(2, 3)),
        format_table(built, right=(1,)),
    ]
    return "\n\n".join(section for section in sections if section)


def _difference(difference: Mapping[str, Json] | None, metric: str) -> str:
    if difference is None:
        return "-"
    told = format_interval(difference["metrics"].get(metric), signed=True)
    return told if difference["is_paired"] or told == "-" else f"{told} (unpaired)"
