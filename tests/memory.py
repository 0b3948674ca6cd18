"""How much memory a process used at most, by its own account.

The peak that `getrusage` and `wait4` tell of a process includes that of the process it was started from: Linux keeps it across
`exec`, and what a child that is just being started shares with its parent counts as the child's. A test run of 2 GB thus made
every child one of 2 GB. `VmHWM` belongs to the address space, which is a new one after `exec`.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent

_MEASURED = """
import sys
from pathlib import Path
from memory import peak_bytes
place, code = sys.argv[1:3]
sys.argv[1:3] = []
try:
    exec(compile(code, "measured", "exec"), {"__name__": "__main__"})
finally:
    Path(place).write_text(str(peak_bytes()))
"""


def peak_bytes() -> int:
    """The most memory that the calling process ever held at a time, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024


def with_tests_path() -> Mapping[str, str]:
    """The environment of a child that imports this module."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))}


def run_measured(
    code: str, arguments: Sequence[str], directory: Path, timeout: float = 240
) -> tuple[subprocess.CompletedProcess[str], int]:
    """Run Python code with arguments in a process of its own; returns what came of it, and its peak memory in bytes."""
    place = directory / "peak-bytes"
    result = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(place), code, *arguments],
        cwd=directory,
        env=with_tests_path(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return result, int(place.read_text())
