"""The tests' own measure of memory: what a child used, whatever its parent had grown to."""

import subprocess
import sys
from pathlib import Path

from memory import run_measured, with_tests_path

_LARGE_PARENT = """
import resource, sys
from pathlib import Path
from memory import run_measured
ballast = b"x" * 400_000_000
_, peak = run_measured("pass", [], Path(sys.argv[1]))
print(peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def test_peak_of_a_child_is_not_that_of_its_large_parent(tmp_path: Path) -> None:
    """A test that passed alone failed at the end of a whole run: `ru_maxrss` of its child was the test run's own 2 GB."""
    command = [sys.executable, "-c", _LARGE_PARENT, str(tmp_path)]
    result = subprocess.run(command, env=with_tests_path(), capture_output=True, text=True, check=True, timeout=60)
    own, by_rusage = map(int, result.stdout.split())
    assert own < 100_000_000
    assert by_rusage > 400_000_000, "this is why it is not measured so"


def test_peak_of_a_child_counts_what_it_let_go_of_again_and_is_told_when_it_fails(tmp_path: Path) -> None:
    code = "import sys\nballast = b'x' * 200_000_000\ndel ballast\nsys.exit(len(sys.argv))"
    result, peak = run_measured(code, ["a", "b"], tmp_path)
    assert result.returncode == 3, result.stderr
    assert 200_000_000 < peak < 300_000_000
