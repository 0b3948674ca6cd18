"""How long a command takes to answer, beside what it would cost to import what it does not.

    python tests/benchmarks/startup.py [ROOT]     ROOT: a finished run; without it, one is made of 200 images

Prints the median and the fastest of several starts, and the median as a multiple of the bare interpreter's: seconds depend
on the machine, the multiple hardly does. Nothing is asserted here; tests/policy/test_heavy_imports.py asserts what is
loaded. Rejected: timing inside one process, where the second import is free.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import command, hardmoe, real_images, write_photos, write_recipe


def seconds(arguments: list[str], directory: Path, repeats: int) -> list[float]:
    """Wall-clock times of a process that must succeed; the first start, which warms the disk's cache, is left out."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        subprocess.run(arguments, cwd=directory, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return times[1:]


def finished_run(directory: Path) -> list[str]:
    """Make a small finished run; returns the options that name it."""
    write_photos(directory / "photos", real_images(200))
    path = write_recipe(directory, experts={"epochs": 1})
    result = hardmoe(directory, "run", "--backend", "inline")
    if result.returncode != 0:
        sys.exit(result.stderr)
    return ["-f", str(path)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, help="root of a finished run")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        run = ["-f", str(arguments.root.resolve() / "recipe.yaml")] if arguments.root else finished_run(directory)
        # The recipe in a root names that root and its images relative to where the run was begun.
        place = Path.cwd() if arguments.root else directory
        measured = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "hardmoe --help": command("--help"),
            "hardmoe run --help": command("run", "--help"),
            "hardmoe status (finished)": command("status", *run),
            "hardmoe run (finished)": command("run", *run),
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
            "python -c 'import ray'": [sys.executable, "-c", "import ray"],
        }
        bare = 0.0
        print(f"{'':28}{'median':>10}{'fastest':>10}{'times bare':>12}")
        for label, process in measured.items():
            times = seconds(process, place, arguments.repeats)
            median = statistics.median(times)
            bare = bare or median
            print(f"{label:28}{median:>8.3f} s{min(times):>8.3f} s{median / bare:>11.1f}x", flush=True)


if __name__ == "__main__":
    main()
