"""What commands share: the recipe with its overrides, a plain table."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hardmoe.errors import CorruptFileError, RecipeError
from hardmoe.recipe import DEFAULT_PATH, Recipe, load_recipe, parse_recipe
from hardmoe.storage import Storage, open_storage

RECIPE_FILE = "recipe.yaml"
DETECTION_FILE = "detection.yaml"
"""What a run keeps in its root of the file that it was begun with."""
_OPTION_KEYS = {
    "root": "root",
    "backend": "execution.backend",
    "address": "execution.address",
    "parallel": "execution.parallel",
}


def recipe_of(options: Mapping[str, Any]) -> Recipe:
    """The recipe that a command's options ask for."""
    return load_recipe(options["recipe_path"] or Path(DEFAULT_PATH), overrides_of(options))


def overrides_of(options: Mapping[str, Any]) -> list[str]:
    """`KEY=VALUE` of everything that a command's options override in its file."""
    overrides = list(options["overrides"])
    for option, key in _OPTION_KEYS.items():
        if options.get(option) is not None:
            # As JSON, which is YAML: `--root 2024` is a directory and not a number.
            overrides.append(f"{key}={json.dumps(options[option])}")
    return overrides


def usable_cpus() -> int:
    """How many CPUs this process may use."""
    counted = os.process_cpu_count() if hasattr(os, "process_cpu_count") else len(os.sched_getaffinity(0))
    return counted or 1


def existing_run(options: Mapping[str, Any]) -> tuple[Storage, Recipe]:
    """The root and the recipe of a run that was begun; with --root alone, no recipe file is needed.

    Raises:
        RecipeError: there is no run in that root.
    """
    root = options["root"]
    if root is None or options["recipe_path"] is not None:
        root = recipe_of(options).root
    storage = open_storage(root)
    if not storage.exists(RECIPE_FILE):
        if storage.exists(DETECTION_FILE):
            raise RecipeError(
                f"{storage.where()} holds detectors and no mixture; look at it with status, logs, show, verify or stop, and "
                "--root alone, or name the root of a mixture"
            )
        raise RecipeError(
            f"no run was begun in {storage.where()}; begin one with 'hardmoe run', or name another root with --root"
        )
    return storage, parse_recipe(described_in(storage, RECIPE_FILE), storage.where(RECIPE_FILE))


def described_in(storage: Storage, name: str) -> Any:
    """What is in the file that a run was begun with.

    Raises:
        CorruptFileError: it is no YAML any more.
    """
    try:
        return yaml.safe_load(storage.read_bytes(name))
    except (yaml.YAMLError, ValueError) as error:
        where = storage.where(name)
        raise CorruptFileError(
            f"{where} is damaged; delete it, and the command that the run was begun with writes it again"
        ) from error


def keep_description(storage: Storage, name: str, content: Mapping[str, Any]) -> None:
    """Write the file that a run was begun with beside what is built from it, by which `status` and the like know the run.

    Args:
        storage: the root.
        name: `RECIPE_FILE` or `DETECTION_FILE`.
        content: of the file, with defaults and overrides.

    Raises:
        RecipeError: the root is that of a run of the other kind.
    """
    if storage.exists(DETECTION_FILE if name == RECIPE_FILE else RECIPE_FILE):
        held, wanted = ("detectors", "a mixture") if name == RECIPE_FILE else ("a mixture", "detectors")
        raise RecipeError(f"{storage.where()} holds {held}, and {wanted} cannot lie beside; name another root with --root")
    body = yaml.safe_dump(dict(content), sort_keys=False).encode()
    if not storage.exists(name) or storage.read_bytes(name) != body:
        storage.write_bytes(name, body)


def printable(text: str) -> str:
    """A name in one line: what a terminal would act on, such as a line's end in a file's name, as Python writes it."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def format_table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows (the first one is the header) in aligned columns; those numbered in `right` are flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(w) if column in right else cell.ljust(w) for column, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
