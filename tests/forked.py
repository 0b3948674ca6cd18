"""Processes of their own for the tests' commands that begin with torch loaded: forked off a server instead of started anew.

Of the six seconds of processor time that a small `hardmoe run` takes as a fresh process, four and a half are imports, and the
tests run some hundred of them. The server is `multiprocessing`'s: one process with one thread, which imports and nothing
else, so that what is forked off it is as clean as a fresh interpreter that has come past its imports. Everything else is a
process as ever: its own id, working directory, environment, output and exit code; it can be killed. What a command loads, how
it starts and what the shell sees of it is tested with fresh interpreters (tests/policy, and all drivers that a test watches
at work). Rejected: commands within the test's own process (`support.invoke`) where the process is part of what is claimed.
"""

import atexit
import multiprocessing
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import hardmoe

_LEFT_OUT = ("ray", "s3", "kernels", "randaugment")
"""Parts of the names of modules that import what not every command does."""

_context = multiprocessing.get_context("forkserver")
_own_modules = [module.name for module in pkgutil.walk_packages(hardmoe.__path__, "hardmoe.")]
_context.set_forkserver_preload(
    ["torch._dynamo", "torchvision", "faiss", *(name for name in _own_modules if not any(part in name for part in _LEFT_OUT))]
)


def run_forked(
    code: str, arguments: Sequence[str], directory: Path, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python code as `python -c` would, in a process that has the libraries loaded.

    Args:
        code: is run as `__main__`.
        arguments: of its command line.
        directory: its working directory.
        timeout: in seconds, after which it is killed.
        environment: variables beside this process's own; for what is read at the start, as `PYTHONPATH` is, it is too late.

    Raises:
        subprocess.TimeoutExpired: it was killed for its time.
    """
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place) / "out", Path(place) / "err"
        variables = {**os.environ, **environment}
        process = _context.Process(target=_become, args=(code, list(arguments), directory, variables, out, err))
        process.start()
        process.join(timeout)
        try:
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(arguments, timeout, out.read_text(), err.read_text())
            return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())
        finally:
            process.kill()
            process.join()
            process.close()


def _become(code: str, arguments: list[str], directory: Path, variables: dict[str, str], out: Path, err: Path) -> None:
    for number, place in ((1, out), (2, err)):
        with place.open("wb") as file:
            os.dup2(file.fileno(), number)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(variables)
    os.fsync = lambda descriptor: None  # as in the test's own process, see conftest
    sys.argv = ["-c", *arguments]
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    finally:
        # `multiprocessing` ends a process without them.
        atexit._run_exitfuncs()
