"""The command line as others' scripts rely on it. A name that disappears from these tables breaks somebody's script.

Adding to the tables is an ordinary change; taking away from them is one that the changelog must announce.
"""

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from hardmoe.cli.main import cli

RECIPE = {"-f", "--recipe", "--set", "--root", "--debug"}
BUILD = RECIPE | {"--parallel", "--backend", "--address", "--accept-versions"}
BULK = {"--source", "-o", "--out", "--format", "--memory-gib", "--parallel", "--address", "--accept-versions"}

COMMANDS: dict[str, set[str]] = {
    "init": {"PATH", "--schema", "--force", "--debug"},
    "partition": BUILD | {"--sweep", "--seeds", "--check", "--json"},
    "train-experts": BUILD | {"--only"},
    "fit-decoder": BUILD,
    "evaluate": BUILD | {"--sweep-k", "--sweep-capacity", "--priority", "--no-priority"},
    "distil": BUILD,
    "report": BUILD | {"ROOTS", "--compare", "--against", "-o", "--out", "--json"},
    "run": BUILD | {"--dry-run"},
    "sweep": {"STUDY", "--only", "--dry-run", "--json", "--set", "--parallel", "--backend", "--address"}
    | {"--accept-versions", "--debug"},
    "detection": BUILD | {"--json"},
    "status": RECIPE | {"--json", "--watch", "--html"},
    "logs": RECIPE | {"NAME", "--failed"},
    "show": RECIPE | {"NAME", "--json"},
    "verify": RECIPE | {"NAMES", "--images"},
    "stop": RECIPE | {"--timeout"},
    "predict": RECIPE | BULK | {"IMAGES", "-k", "--coverage"},
    "embed": RECIPE | BULK | {"IMAGES"},
    "index": RECIPE | {"--vectors", "--kind", "--recall", "--accept-versions"},
    "search": RECIPE | {"QUERY", "--vectors", "-n", "--json"},
    "doctor": RECIPE | {"--address", "--json"},
    "submit": {"COMMAND", "--address", "--checkout", "--env", "--shared", "--ca", "--resubmit", "--detach"}
    | {"--list", "--logs", "--stop", "--debug"},
    "plan": RECIPE | {"--images", "--image-bytes", "--experts", "--gpus", "--nodes", "--cpus", "--calibrate", "--rate", "--json"},
    "export": RECIPE | {"-o", "--out", "--onnx", "--programs"},
    "serve": RECIPE | {"--host", "--port", "--memory-gib", "--vectors", "--replicas", "--address", "--coverage"},
    "bench data": RECIPE | {"--rows", "--seconds", "--json"},
}


def _parameters(command: click.Command) -> set[str]:
    """Options by their spellings, arguments by their names in capitals."""
    options = {spelling for p in command.params if isinstance(p, click.Option) for spelling in (*p.opts, *p.secondary_opts)}
    return options | {(p.name or "").upper() for p in command.params if isinstance(p, click.Argument)}


def _commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command with its full name, those of groups within the group included."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def test_commands_and_their_options_are_the_frozen_ones() -> None:
    assert {name: _parameters(command) for name, command in _commands(cli)} == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_for_itself_and_for_each_option(name: str) -> None:
    command = dict(_commands(cli))[name]
    result = CliRunner().invoke(cli, [*name.split(), "--help"])
    assert result.exit_code == 0
    summary = (command.help or "").strip().splitlines()[0]
    assert summary.endswith((".", ":")) or "such as" in summary, f"the help of {name} must be a sentence: {summary!r}"
    assert summary.split()[0] in result.output
    silent = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    assert silent == []


def test_group_without_a_command_shows_the_help_and_is_a_usage_error() -> None:
    result = CliRunner().invoke(cli, [])
    assert result.exit_code == 2
    assert "train-experts" in result.output


def test_unknown_option_is_a_usage_error_that_names_the_nearest() -> None:
    result = CliRunner().invoke(cli, ["run", "--paralel", "3"])
    assert result.exit_code == 2
    assert "--parallel" in result.output
