"""Who may import whom: the arrows of the layout, read from the source itself.

ruff's TID251 keeps ray, faiss, click and boto3 in their homes while one types; what it cannot say, which layer stands on
which, is said here. Names are read with `ast`, so an import inside a function counts as well.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "hardmoe"

FAMILIES = {"trunk", "features", "partitioning", "experts", "decoder", "distil", "evaluation", "report"}
LAYERS = [
    {"__init__", "config", "errors", "storage", "hashing", "arrays", "yaml_files"},
    {"artifacts", "stage", "tables"},
    {"data", "models", "training", "neighbours"},
    FAMILIES,
    {"execution", "mixture"},
    {"bulk", "searching", "export", "detection"},
    {"serving"},
    {"recipe", "outside", "pipeline", "planning", "cli", "__main__"},
]
"""From the bottom to the top: a module imports from its own layer and from those below, never from above."""

HOMES = {
    "ray": ("execution/ray/", "serving/ray_app.py"),
    "faiss": ("neighbours/",),
    "click": ("cli/",),
    "boto3": ("storage/",),
}
NEVER = ("pickle", "cloudpickle", "dill", "marshal", "shelve")
"""What executes code, or ties a file to a module's name, when it is read."""


def _imports(path: Path) -> Iterator[str]:
    """Full dotted names that a module imports, at its top or anywhere else."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _edges() -> Iterator[tuple[Path, str, str]]:
    """Module, the part of the package it belongs to, the part it imports from."""
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in _imports(path):
            root, _, rest = name.partition(".")
            if root == "hardmoe":
                target = rest.split(".")[0]
                yield path, part, target if target in PARTS else "__init__"


PARTS = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
LEVEL = {part: level for level, layer in enumerate(LAYERS) for part in layer}


def test_layers_name_every_part_of_the_package() -> None:
    assert PARTS - LEVEL.keys() == set(), "a new part of the package: say in LAYERS where it stands"


def test_imports_never_point_upwards() -> None:
    upwards = [
        f"{path.relative_to(REPOSITORY)} imports {target}" for path, part, target in _edges() if LEVEL[target] > LEVEL[part]
    ]
    assert upwards == []


def test_stage_families_never_import_one_another() -> None:
    """Stages meet through files: an import between two of them is a dependency that the workflow cannot see."""
    sideways = [
        f"{path.relative_to(REPOSITORY)} imports {target}"
        for path, part, target in _edges()
        if {part, target} <= FAMILIES and part != target
    ]
    assert sideways == []


def test_parts_of_the_package_import_each_other_in_no_circle() -> None:
    below: dict[str, set[str]] = {part: set() for part in PARTS}
    for _, part, target in _edges():
        if part != target:
            below[part].add(target)
    while free := [part for part, targets in below.items() if not targets]:
        for part in free:
            del below[part]
        for targets in below.values():
            targets.difference_update(free)
    assert below == {}, "these parts import each other in a circle, or stand on one that does"


@pytest.mark.parametrize("library", HOMES)
def test_library_is_imported_only_at_its_home(library: str) -> None:
    strangers = [
        str(path.relative_to(PACKAGE))
        for path in sorted(PACKAGE.rglob("*.py"))
        if any(name.split(".")[0] == library for name in _imports(path))
        and not str(path.relative_to(PACKAGE)).startswith(HOMES[library])
    ]
    assert strangers == []


def test_package_unpickles_nothing_and_never_imports_tests_or_recipes() -> None:
    banned = {*NEVER, "tests", "support", "conftest", "pipelines", "cluster"}
    found = [
        f"{path.relative_to(REPOSITORY)} imports {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in _imports(path)
        if name.split(".")[0] in banned
    ]
    assert found == []


def test_recipes_only_compose_and_hold_no_code() -> None:
    """`pipelines/` is data: every file is a recipe or the table about them."""
    files = sorted(path for path in (REPOSITORY / "pipelines").rglob("*") if path.is_file())
    assert {path.suffix for path in files} <= {".yaml", ".md"}
    for path in files:
        if path.suffix == ".yaml":
            assert isinstance(yaml.safe_load(path.read_text()), dict), path
