"""`hardmoe sweep`: one recipe many times over, each time with something else in it, and a table of what came of it.

A study is a YAML file: a recipe, a root, seeds, and lines, each a name and what it changes. Every line and seed is a run of its
own below the root, which takes over from the lines before it, and from its own first seed, whatever is the same, so that a study
of the decoder trains its experts once. A killed study goes on where it was, like any run.

Shape letters: S seeds, R rows of the bootstrap (the point estimate first).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from hardmoe.cli.build import build, format_interval, print_plan
from hardmoe.cli.common import RECIPE_FILE, format_table
from hardmoe.cli.finished import CONTROL, MIXTURE, FinishedRun
from hardmoe.config import Config, Json
from hardmoe.errors import RecipeError
from hardmoe.recipe import load_recipe
from hardmoe.storage import join, open_storage
from hardmoe.yaml_files import read_yaml

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


class StudyConfig(Config):
    """A file of `hardmoe sweep`."""

    recipe: str = Field(min_length=1)
    """The recipe that every line is a variation of; relative to this file."""
    root: str = Field(min_length=1)
    """Directory or URI below which each line's run has a root of its own."""
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    """Every line is run with each of these."""
    metric: str = "precision@1"
    """What the table shows."""
    reuse: list[str] = Field(default_factory=list)
    """Roots of other runs, from which lines take over what is the same."""
    lines: dict[str, dict[str, Any] | None] = Field(min_length=1)
    """Name of a line, and what it changes: keys of the recipe, with their dots. The first is what the others are held against."""


@dataclass(frozen=True)
class Run:
    """One line with one seed."""

    line: str
    seed: int
    root: str
    overrides: tuple[str, ...]
    sources: tuple[str, ...]
    """Roots of the study's other runs from which it takes over what is the same, as far as they were begun."""


def read_study(path: Path) -> tuple[StudyConfig, list[Run]]:
    """A study and its runs in their order: all seeds of the first line, then of the next.

    Raises:
        RecipeError: the file is wrong; says what and how to mend it.
    """
    try:
        study = StudyConfig.model_validate(read_yaml(path, "study", "name a YAML file with recipe, root and lines"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        wrong = f"{path}: {key}: {first['msg'][0].lower()}{first['msg'][1:]}"
        raise RecipeError(f"{wrong}; a study has recipe, root and lines, and may have seeds, metric and reuse") from error
    for name in study.lines:
        if _NAME.fullmatch(name) is None:
            raise RecipeError(f"{path}: the line '{name}' names a directory; use small letters, digits, '-', '_' and '.'")
    if len(set(study.seeds)) < len(study.seeds):
        raise RecipeError(f"{path}: seeds: {study.seeds} names one twice; its runs would be the same")
    runs: list[Run] = []
    for name, changes in study.lines.items():
        for seed in study.seeds:
            root = join(study.root, name if len(study.seeds) == 1 else f"{name}-seed{seed}")
            sources = tuple(run.root for run in runs if run.seed == seed or run.line == name)
            changed = [f"{key}={json.dumps(value)}" for key, value in (changes or {}).items()]
            runs.append(Run(name, seed, root, (*changed, f"root={json.dumps(root)}", f"seed={seed}"), sources))
    return study, runs


def run_study(path: Path, options: Mapping[str, Any], only: Sequence[str], dry_run: bool, as_json: bool) -> None:
    """Run all lines, or some, and print the table of those that are through."""
    study, runs = read_study(path)
    recipe_path = path.parent / study.recipe
    _check(path, study, runs, recipe_path, only)
    found: dict[str, list[FinishedRun]] = {}
    for number, run in enumerate(runs, 1):
        if only and run.line not in only and run.line != runs[0].line:
            continue
        begun = [root for root in run.sources if open_storage(root).exists(RECIPE_FILE)]
        overrides = [*options["overrides"], *run.overrides, f"reuse={json.dumps([*study.reuse, *begun])}"]
        told = {**options, "recipe_path": recipe_path, "overrides": overrides, "root": None}
        click.echo(f"{run.line}, seed {run.seed}: run {number} of {len(runs)}, in {run.root}", err=True)
        if dry_run:
            print_plan(told)
        else:
            built = build(told, ["evaluation"])
            found.setdefault(run.line, []).append(FinishedRun(built.store, built.artifact("evaluation")))
    if not dry_run:
        rows = summarise(study, found)
        click.echo(json.dumps(rows, indent=1) if as_json else _described(study, rows))


def _check(path: Path, study: StudyConfig, runs: Sequence[Run], recipe_path: Path, only: Sequence[str]) -> None:
    """Everything that can be wrong with any line, before the first one is begun."""
    if unknown := [name for name in only if name not in study.lines]:
        raise RecipeError(f"--only {unknown[0]}: the lines of {path} are {', '.join(study.lines)}")
    for run in runs:
        try:
            load_recipe(recipe_path, run.overrides)
        except RecipeError as error:
            raise RecipeError(f"{path}: line '{run.line}': {error}") from error


def summarise(study: StudyConfig, found: Mapping[str, Sequence[FinishedRun]]) -> list[dict[str, Json]]:
    """Of every line its systems, and the differences that count, with intervals over seeds and test images."""
    lines = {name: [run.replicates(study.metric) for run in of_line] for name, of_line in found.items()}
    first = next(iter(lines.values()))
    rows = []
    for name, of_line in lines.items():
        shown = [run.images_shown() for run in found[name]]
        common = [system for system in of_line[0] if all(system in each for each in of_line)]
        systems = {system: result([each[system] for each in of_line]) for system in common}
        row: dict[str, Json] = {"line": name, "metric": study.metric, "runs": len(of_line), "systems": systems}
        row |= {"images_shown": {"experts": [e for e, _ in shown], "dense": [d for _, d in shown]}}
        if CONTROL in common:
            row[f"{MIXTURE} - {CONTROL}"] = result([each[MIXTURE] - each[CONTROL] for each in of_line])
        if name != next(iter(lines)):
            pairs = [a[MIXTURE] - b[MIXTURE] for a, b in zip(of_line, first, strict=True) if a[MIXTURE].shape == b[MIXTURE].shape]
            row["mixture - first line's"] = result(pairs)
        rows.append(row)
    return rows


def result(values: Sequence[NDArray[np.float64]]) -> dict[str, Json]:
    """The mean of several runs' [R] with an interval."""
    from hardmoe.evaluation.bootstrap import hierarchical_result

    return hierarchical_result(np.stack(values))


def _described(study: StudyConfig, rows: Sequence[Mapping[str, Json]]) -> str:
    systems = list(dict.fromkeys(system for row in rows for system in row["systems"]))
    differences = [f"{MIXTURE} - {CONTROL}", "mixture - first line's"]
    header = ["line", "experts shown", "dense shown", *systems, *differences]
    table: list[Sequence[str]] = [header]
    for row in rows:
        experts, dense = row["images_shown"]["experts"], row["images_shown"]["dense"]
        told = [f"{round(np.mean(experts)):,}", "-" if None in dense else f"{round(np.mean(dense)):,}"]
        told += [format_interval(row["systems"].get(system)) for system in systems]
        told += [format_interval(row.get(name), signed=True) for name in differences]
        table.append([row["line"], *told])
    runs = f"mean of {len(study.seeds)} seeds" if len(study.seeds) > 1 else "one seed"
    over = "over seeds and test images" if len(study.seeds) > 1 else "over test images alone"
    note = f"{study.metric}, per cent, {runs}; 95 % bootstrap intervals {over}; differences are paired"
    return f"{note}\n\n{format_table(table, right=range(1, len(header)))}"
