"""What `hardmoe plan` says of the demo beside what the demo takes, with one, two and four units at a time on this machine.

    python tests/benchmarks/plan.py [--slots 1 2 4] [--recipe pipelines/demo.yaml]

Each plan is calibrated twice at the same concurrency: by a run with a quarter of the epochs, and by the unit times of the run
that it is held against, which leaves the simulation of the scheduler alone to be judged. The goal is 25 %.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ray.cluster_utils import Cluster

REPOSITORY = Path(__file__).resolve().parents[2]
_SHORT = ("trunk.epochs=2", "experts.epochs=2", "decoder.epochs=2")


def hardmoe(*words: str) -> str:
    """What one command prints."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "hardmoe", *words]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def planned(recipe: str, slots: int, root: Path) -> float:
    """Seconds, by the unit times of a finished run."""
    asked = ("--cpus", str(max(slots, os.cpu_count() or 1)), "--set", f"execution.parallel={slots}")
    hours: float = json.loads(hardmoe("plan", "-f", recipe, *asked, "--calibrate", str(root), "--json"))["hours"]
    return 3600 * hours


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--recipe", default=str(REPOSITORY / "pipelines" / "demo.yaml"))
    options = parser.parse_args()
    print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {os.cpu_count()} cores, {options.recipe}\n")
    print("| units at a time | took | planned, by a quarter of the epochs | of it | planned, by its own units | of it |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        for slots in options.slots:
            print(f"| {slots} | {' | '.join(measured(options.recipe, slots, Path(directory) / str(slots)))} |", flush=True)


def measured(recipe: str, slots: int, root: Path) -> list[str]:
    """The cells of a row."""
    # A Ray of its own has no more slots than the machine has CPUs.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": slots, "include_dashboard": False})
    try:
        run = ("run", "-f", recipe, "--address", cluster.address, "--parallel", str(slots))
        hardmoe(*run, "--root", str(root / "short"), *(word for change in _SHORT for word in ("--set", change)))
        began = time.perf_counter()
        hardmoe(*run, "--root", str(root / "full"))
        took = time.perf_counter() - began
    finally:
        cluster.shutdown()
    cells = [f"{took:.0f} s"]
    for name in ("short", "full"):
        seconds = planned(recipe, slots, root / name)
        cells += [f"{seconds:.0f} s", f"{seconds / took:.2f}"]
    return cells


if __name__ == "__main__":
    main()
