"""Options that many commands have. Rejected: in the module of the group, which modules of commands would import in a circle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def recipe_options(command: Command) -> Command:
    """Options of every command that reads a recipe."""
    options = [
        click.option(
            "-f", "--recipe", "recipe_path", type=click.Path(path_type=Path), help="Recipe file. [default: hardmoe.yaml]"
        ),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key, as in partition.experts=16."
        ),
        click.option("--root", help="Override the run's root."),
        click.option("--debug", is_flag=True, help="Show tracebacks."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def accept_versions_option(command: Command) -> Command:
    """The way out for whoever goes on with a run after an update."""
    help_text = "Go on with another torch, Pillow or faiss than the run was begun with."
    return click.option("--accept-versions", is_flag=True, help=help_text)(command)


def building_options(command: Command) -> Command:
    """Options of every command that builds something."""
    options = [
        click.option("--parallel", type=click.IntRange(min=1), help="At most so many units at a time."),
        click.option("--backend", type=click.Choice(["ray", "inline"]), help="Override execution.backend."),
        click.option("--address", help="Override execution.address: 'local', or a running Ray cluster's."),
        accept_versions_option,
    ]
    for option in reversed(options):
        command = option(command)
    return recipe_options(command)
