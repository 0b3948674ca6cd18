"""`hardmoe partition --sweep`: several numbers of parts, measured side by side; a table, JSON, a page. It only advises."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.cli.build import build
from hardmoe.cli.common import format_table, recipe_of
from hardmoe.partitioning.sweep_sample import check_counts
from hardmoe.partitioning.sweep_summary import summarise
from hardmoe.pipeline import sweep_stages
from hardmoe.recipe import Recipe
from hardmoe.stage import Stage
from hardmoe.storage import Storage, open_storage

LEGEND = """\
objective      mean squared distance to the centroid; it falls with every part more, so look for where it stops falling fast
of variance    the same as a share of what one part leaves
largest/mean   size of the largest part: the longest training; variation is the sizes' standard deviation by their mean
agreement      adjusted Rand index of two seeds' parts, mean [lowest, highest]: 1 the same parts, 0 no more alike than chance
tag bits       what the part says about a hashtag, less what parts dealt out by lot say; beside it the share of all there is"""


def show_sweep(options: Mapping[str, Any], counts: Sequence[int], num_seeds: int, as_json: bool) -> None:
    """Build the sweep as far as it is missing, then print it and write its page."""

    def beside(recipe: Recipe) -> list[Stage]:
        return sweep_stages(recipe, counts, num_seeds)

    _check_finished_sample(options, counts, num_seeds)
    built = build(options, [], beside=beside)
    sample, *fitted = [built.artifact(stage.name) for stage in beside(built.recipe)]
    summary = summarise(sample.payload, [artifact.payload for artifact in fitted])
    body = {"seeds": num_seeds, "partition": dict(fitted[0].record.config["partition"]), **summary}
    page = _publish(built.store.storage, body)
    click.echo(json.dumps({**body, "page": page}, indent=1) if as_json else _described(body, page))


def _check_finished_sample(options: Mapping[str, Any], counts: Sequence[int], num_seeds: int) -> None:
    """Refuse before anything is started what an earlier sweep's sample is too small for."""
    recipe = recipe_of(options)
    sample, *_ = sweep_stages(recipe, counts, num_seeds)
    if (found := ArtifactStore(open_storage(recipe.root)).find(sample.name)) is not None:
        check_counts(list(counts), found.payload)


def _described(body: Mapping[str, Any], page: str) -> str:
    sample = body["sample"]
    return "\n\n".join(
        [
            f"{sample['rows']:,} of {sample['of']:,} training examples, {body['seeds']} seeds for each number of parts",
            _table(body["sweep"]),
            *_unfinished(body),
            LEGEND,
            f"page: {page}",
        ]
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    table: list[Sequence[str]] = [
        ("parts", "objective", "of variance", "largest/mean", "variation", "agreement", "tag bits", "of entropy")
    ]
    for row in rows:
        agreement = row["agreement"]
        table.append(
            (
                str(row["parts"]),
                f"{row['objective']['mean']:.4g}",
                _percent(row["variance_share"]),
                f"{row['largest']['mean']:.2f}",
                f"{row['variation']['mean']:.2f}",
                "-" if agreement is None else "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**agreement),
                f"{row['tag_bits']['mean']:.3f}",
                _percent(row["tag_share"]),
            )
        )
    return format_table(table, right=range(len(table[0])))


def _unfinished(body: Mapping[str, Any]) -> list[str]:
    """What the numbers must be read with."""
    short = {row["parts"]: body["seeds"] - row["converged"] for row in body["sweep"] if row["converged"] < body["seeds"]}
    if not short:
        return []
    which = ", ".join(f"{count} of {body['seeds']} with {parts} parts" for parts, count in short.items())
    passes = body["partition"]["max_passes"]
    return [f"stopped at partition.max_passes={passes} before they converged: {which}; raise it to compare these"]


def _percent(spread: Mapping[str, float] | None) -> str:
    return "-" if spread is None else f"{100 * spread['mean']:.1f} %"


def _publish(storage: Storage, body: Mapping[str, Any]) -> str:
    """Write the page unless it is there already, word for word; returns where it is."""
    from hardmoe.report.sweep import PAGE_PATH, render_sweep

    page = render_sweep(body, storage.where()).encode()
    if not storage.exists(PAGE_PATH) or storage.read_bytes(PAGE_PATH) != page:
        storage.write_bytes(PAGE_PATH, page)
    return storage.where(PAGE_PATH)
