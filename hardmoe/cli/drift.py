"""`hardmoe partition --check`: another recipe's dataset, routed by this run, beside this run's own examples."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from hardmoe.artifacts.names import expert_name
from hardmoe.artifacts.provenance import describe, now
from hardmoe.artifacts.store import Artifact, ArtifactStore
from hardmoe.cli.build import Built, build
from hardmoe.cli.common import format_table, recipe_of
from hardmoe.errors import RecipeError
from hardmoe.partitioning.advice_stages import CHECKS
from hardmoe.partitioning.drift import HELD_OUT, NEW, TRAINING
from hardmoe.pipeline import check_can_route, drift_stages
from hardmoe.recipe import load_recipe
from hardmoe.storage import open_storage

_DIGEST = 8
_LEGEND = """\
total variation   the least share of the images that would have to be in other parts to have the training images' shares
by chance         what two draws of these sizes out of one pool have on average; p is Pearson's chi-square test of that
distance          how many times as far from their centroid the images are as training images of the same parts
far out           beyond the 99th percentile of the training distances of their part
held out is this run's validation and test images: what the columns say where nothing drifted"""


def show_drift(options: Mapping[str, Any], other_path: Path, as_json: bool) -> None:
    """Build this run's partition and the other's dataset as far as they are missing, compare, print."""
    own = recipe_of(options)
    check_can_route(own)
    other = load_recipe(other_path)
    if open_storage(own.root).uri == open_storage(other.root).uri:
        raise RecipeError(
            f"--check {other_path}: its root is this run's own, {own.root}; give the other dataset a 'root' of its own"
        )
    build(options, ["partition"])
    theirs = build({**options, "recipe_path": other_path, "overrides": (), "root": None}, ["dataset"])
    dataset = theirs.artifact("dataset")
    place = _place(dataset)
    store = ArtifactStore(open_storage(own.root))
    if store.find(f"{place}/dataset") is None:
        store.refer(f"{place}/dataset", dataset, describe(now(), 0.0, reused=True))
    (stage,) = [stage for stage in theirs.plan.stages if stage.name == "dataset"]
    built = build(options, [], beside=lambda recipe: drift_stages(recipe, stage, theirs.recipe.dataset, place))
    payload = built.artifact(f"{place}/drift").payload
    if as_json:
        click.echo(json.dumps({"root": built.store.storage.where(), "new": dataset.home.where(), **payload}, indent=1))
        return
    click.echo(_described(built, dataset, payload))


def _place(dataset: Artifact) -> str:
    """The directory of a dataset's check: a word to know it by, and the digest of its record, so that it never drifts."""
    word = re.sub(r"[^a-z0-9]+", "-", dataset.home.where().rstrip("/").rpartition("/")[2].lower()).strip("-") or "dataset"
    return f"{CHECKS}/{word}-{dataset.record_digest[:_DIGEST]}"


def _described(built: Built, dataset: Artifact, payload: Mapping[str, Any]) -> str:
    title = f"{dataset.home.where()}, routed by {built.store.storage.where()}"
    return "\n\n".join([title, _parts(payload), _overall(payload), _LEGEND])


def _parts(payload: Mapping[str, Any]) -> str:
    training, new = payload["sets"][TRAINING], payload["sets"][NEW]
    rows: list[Sequence[str]] = [("part", "training", "new", "difference", "distance", "new distance", "ratio", "far out")]
    for part in range(payload["parts"]):
        shares = [each["sizes"][part] / max(1, sum(each["sizes"])) for each in (training, new)]
        here, there = training["mean_distance"][part], new["mean_distance"][part]
        size = new["sizes"][part]
        rows.append(
            (
                expert_name(part),
                *(f"{100 * share:.1f} %" for share in shares),
                f"{100 * (shares[1] - shares[0]):+.1f}",
                *("-" if mean is None else f"{mean:.3f}" for mean in (here, there)),
                f"{there / here:.2f}" if here and there is not None else "-",
                f"{100 * new['far'][part] / size:.1f} %" if size and here is not None else "-",
            )
        )
    return format_table(rows, right=range(1, len(rows[0])))


def _overall(payload: Mapping[str, Any]) -> str:
    rows: list[Sequence[str]] = [("against training", "images", "total variation", "by chance", "p", "distance", "far out")]
    for name in (NEW, HELD_OUT):
        if (found := payload["against_training"][name]) is None:
            continue
        p, ratio, far = found["chi_square_p"], found["distance_ratio"], found["far_share"]
        rows.append(
            (
                name.replace("_", " "),
                f"{found['examples']:,}",
                f"{100 * found['total_variation']:.1f} %",
                f"{100 * found['chance_total_variation']:.1f} %",
                "-" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001",
                "-" if ratio is None else f"x {ratio:.3f}",
                "-" if far is None else f"{100 * far:.1f} %",
            )
        )
    return format_table(rows, right=range(1, len(rows[0])))
