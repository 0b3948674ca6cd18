"""`hardmoe bench`: what the recipe's steps could do on this machine, and which of them the others wait for."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click

from hardmoe.cli.common import format_table, recipe_of, usable_cpus

_NOISE = 1.05
"""No pipeline is faster than its steps; one that seems so by more than this was measured beside something else."""


def bench_data(options: Mapping[str, Any], rows: int, seconds: float, as_json: bool) -> None:
    """Measure reading, decoding, resizing, transfer, network and pipeline on the recipe's own images."""
    from hardmoe.features.speed import measure_speed
    from hardmoe.training.network import Architecture

    recipe = recipe_of(options)
    trunk = recipe.trunk
    network = Architecture(trunk.backbone, trunk.stem, trunk.image_size, num_tags=0, decode=trunk.decode, moe=trunk.moe)
    speed = measure_speed(recipe.dataset, network, usable_cpus(), rows, seconds)
    if as_json:
        body = asdict(speed) | {"limit": speed.limit, "bottleneck": speed.bottleneck.name}
        click.echo(json.dumps(body, indent=1))
        return
    click.echo(
        f"{speed.num_images:,} images of {speed.bytes_per_image / 1000:.1f} kB, to {recipe.trunk.image_size} pixels; "
        f"{speed.num_threads} threads, {speed.device}\n"
    )
    table = [["step", "images/s", "of the pipeline's time", ""]]
    for step in speed.steps:
        share = speed.pipeline / step.images_per_second
        table.append([step.name, f"{step.images_per_second:,.0f}", f"{100 * share:.0f} %", step.note])
    table.append(["pipeline", f"{speed.pipeline:,.0f}", "100 %", "all of it: read, decode and resize, network"])
    click.echo(format_table(table, right=(1, 2)))
    if speed.pipeline > _NOISE * speed.limit:
        click.echo(
            f"\nthe pipeline did {speed.pipeline:,.0f} images/s where its steps alone allow {speed.limit:,.0f}: something else "
            "ran meanwhile, or the steps were too short; raise --seconds, or try again on an idle machine"
        )
        return
    slowest = speed.bottleneck
    click.echo(
        f"\nthe bottleneck is '{slowest.name}' ({slowest.images_per_second:,.0f} images/s); together the steps allow "
        f"{speed.limit:,.0f} images/s, and the pipeline reaches {100 * speed.pipeline / speed.limit:.0f} % of it"
    )
