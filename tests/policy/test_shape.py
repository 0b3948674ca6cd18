"""The shape of the code: what a newcomer can read in one sitting."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MODULES = sorted((REPOSITORY / "hardmoe").rglob("*.py"))
TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES, MOST_ARGUMENTS = 400, 80, 7

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function))


def _arguments(function: Function) -> list[ast.arg]:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return [argument for argument in every if argument is not None and argument.arg not in {"self", "cls"}]


@pytest.mark.parametrize("path", [*MODULES, *TESTS], ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_module_opens_with_a_docstring(path: Path) -> None:
    assert (ast.get_docstring(ast.parse(path.read_text())) or "").strip(), f"{path} does not say what it is for"


def _is_triton_program(function: Function) -> bool:
    """A program for a GPU takes pointers, numbers and sizes one by one: it knows no objects to group them in."""
    return any("triton.jit(" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_files_and_functions_of_the_package_stay_readable() -> None:
    found = [f"{path}: {count} lines" for path in MODULES if (count := len(path.read_text().splitlines())) > MOST_LINES]
    for path in MODULES:
        for function in _functions(path):
            lines = (function.end_lineno or function.lineno) - function.lineno + 1
            if lines > MOST_FUNCTION_LINES:
                found.append(f"{path}:{function.lineno} {function.name}: {lines} lines")
            if len(_arguments(function)) > MOST_ARGUMENTS and not _is_triton_program(function):
                found.append(f"{path}:{function.lineno} {function.name}: {len(_arguments(function))} arguments")
    assert found == []


def test_every_argument_and_every_result_of_the_package_is_typed() -> None:
    found = [
        f"{path}:{function.lineno} {function.name}"
        for path in MODULES
        for function in _functions(path)
        if function.returns is None or any(argument.annotation is None for argument in _arguments(function))
    ]
    assert found == []


def test_no_exception_is_swallowed() -> None:
    """A handler that does nothing turns a failure into a value; `contextlib.suppress` names what it lets pass, and where."""
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and all(isinstance(statement, ast.Pass) for statement in node.body):
                found.append(f"{path}:{node.lineno}")
    assert found == []


def test_parquet_is_read_without_arrows_threads() -> None:
    """One that still lets go of a Python buffer when the interpreter ends takes the process down; see `hardmoe.tables`."""
    reads = {"iter_batches", "read_row_group", "read_row_groups", "read_table"}
    found, num_reads = [], 0
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in reads:
                continue
            num_reads += 1
            threads = [keyword.value for keyword in node.keywords if keyword.arg == "use_threads"]
            if not (len(threads) == 1 and isinstance(threads[0], ast.Constant) and threads[0].value is False):
                found.append(f"{path}:{node.lineno}")
    assert found == [] and num_reads >= 5


def test_test_modules_have_names_of_their_own() -> None:
    """pytest imports them by name, and refuses the second of two in one process."""
    names = [path.name for path in TESTS if path.name.startswith("test_")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
