"""`hardmoe doctor`: what this machine, or every node of a cluster, can do for the recipe; a line each, and the remedy."""

import contextlib
import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from hardmoe.artifacts.pinned_versions import read_versions
from hardmoe.artifacts.provenance import versions
from hardmoe.cli.common import format_table, recipe_of
from hardmoe.errors import BackendError, HardmoeError, StorageError
from hardmoe.execution.checkup.facts import PLACE, measure
from hardmoe.execution.checkup.findings import Finding, judge, judge_demands
from hardmoe.pipeline import ExternalInputs, build_stages
from hardmoe.recipe import DEFAULT_PATH, Recipe
from hardmoe.storage import LocalStorage, Storage, join, open_storage

_IMAGE_SIZE = 224
_HERE = "this machine"


def examine(options: Mapping[str, Any], as_json: bool) -> None:
    """Look, print every finding, and fail if one is bad.

    Raises:
        BackendError: something would make a run fail, hang or give other bytes; or no Ray answers at the address.
    """
    recipe = recipe_of(options) if options["recipe_path"] or Path(DEFAULT_PATH).exists() else None
    if recipe is None and options["overrides"]:
        recipe = recipe_of(options)  # which says that there is none
    root = options["root"] or (recipe.root if recipe else None)
    storage = None if root is None else open_storage(root)
    address = options["address"] or (recipe.execution.address if recipe else "local")
    begun = _versions_of_run(storage)
    image_size = recipe.trunk.image_size if recipe else _IMAGE_SIZE
    with _something_to_see(storage) as (token, problem):
        uri = None if storage is None else storage.uri
        found = (
            [Finding("this machine", "root", "bad", problem, "correct the root, or permissions and credentials")]
            if problem
            else []
        )
        uri = None if problem else uri
        if address == "local":
            found += judge(_HERE, measure(uri, image_size, ""), versions(), begun)
        else:
            found += _examine_cluster(address, (uri, image_size, token), begun, recipe)
    click.echo(json.dumps([asdict(each) for each in found], indent=1) if as_json else _table(found))
    if bad := [each for each in found if each.state == "bad"]:
        first = bad[0]
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise BackendError(f"{first.node}, {first.check}: {first.text}{more}; {first.remedy}")


def _examine_cluster(
    address: str, look: tuple[str | None, int, str], begun: Mapping[str, str], recipe: Recipe | None
) -> list[Finding]:
    from hardmoe.execution.ray.nodes import ask_every_node, joined

    # Ray tells of nodes that died whenever it learns of it, on standard output, which is the findings' alone.
    with contextlib.redirect_stdout(sys.stderr), joined(address):
        nodes = ask_every_node(measure, *look)
    found = []
    for node in nodes:
        if node.facts is None:
            remedy = "install it there" if node.problem == "has no hardmoe" else "see that node's Ray logs, or take it out"
            found.append(Finding(node.name, "answer", "bad", node.problem, remedy))
        else:
            found += judge(node.name, node.facts, versions(), begun)
    if recipe is not None:
        demands = [stage.resources for stage in build_stages(recipe, ExternalInputs(""))]
        found += judge_demands(demands, [node.resources for node in nodes])
    return found


@contextlib.contextmanager
def _something_to_see(storage: Storage | None) -> Any:
    """A file in the root, for other machines to find; its name, or why it could not be written. Gone afterwards."""
    if storage is None:
        yield "", ""
        return
    token, problem = secrets.token_hex(8), ""
    absent = _first_absent(storage)
    try:
        storage.write_bytes(join(PLACE, token), b"seen\n")
    except StorageError as error:
        problem = str(error)
    try:
        yield token, problem
    finally:
        if not problem:
            with contextlib.suppress(HardmoeError):
                storage.delete_tree(PLACE)
        for directory in absent:
            with contextlib.suppress(OSError):
                directory.rmdir()


def _first_absent(storage: Storage) -> Sequence[Path]:
    """Directories that writing to the root makes, innermost first."""
    if not isinstance(storage, LocalStorage):
        return []
    root = storage.directory
    return [path for path in (root, *root.parents) if not path.exists()]


def _versions_of_run(storage: Storage | None) -> Mapping[str, str]:
    """What the run was begun with; nothing if it was not, or if that cannot be read."""
    with contextlib.suppress(HardmoeError):
        return read_versions(storage) if storage is not None else {}
    return {}


def _table(found: Sequence[Finding]) -> str:
    rows = [("node", "check", "", "finding")]
    for each in found:
        text = f"{each.text}; {each.remedy}" if each.remedy else each.text
        rows.append((each.node, each.check, "" if each.state == "ok" else each.state.upper(), text))
    return format_table(rows)
