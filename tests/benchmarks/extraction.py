"""How fast images become batches: our features stage beside the decoder alone and beside other loaders.

    python tests/benchmarks/extraction.py [--files 20000] [--repeats 5] [--quick]

JPEGs 500 pixels long to squares of 224, for a trunk that costs nothing, on all cores; and to 64 with reduced decoding, beside
full decoding at that size. Every measurement is a process of its own over all files; a round runs each system once, in another
order every time, so that what else the machine does falls on all alike. Printed: the median over the rounds with the least and
the most. `first` is the time from the start of the process to its first batch, imports and Ray included; `steady` the rate
from when every core has had a batch until 95 % are done; `whole` all images over all seconds. Nothing is left behind. The
systems themselves are in extraction_systems.py.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from extraction_systems import write_files

HERE = Path(__file__).parent
PACKAGES = ("hardmoe", "pillow", "simplejpeg", "torch", "ray", "webdataset")


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    label: str
    system: str
    size: int
    reduced: bool = False


ENTRIES = (
    Entry("bare decode and resize (ceiling)", "ceiling", 224),
    Entry("hardmoe, features stage", "stage", 224),
    Entry("Ray Data, read_images", "ray_data", 224),
    Entry("Ray Data, our decoder", "ray_data_with_our_decoder", 224),
    Entry("torch DataLoader, our decoder", "data_loader", 224),
    Entry("WebDataset, our decoder", "web_dataset", 224),
    Entry("bare decode and resize (ceiling)", "ceiling", 64),
    Entry("hardmoe, features stage", "stage", 64),
    Entry("hardmoe, features stage, reduced", "stage", 64, reduced=True),
)


def run(entry: Entry, system: str, directory: Path, cores: int) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, str(HERE / "extraction_systems.py"), system, str(directory)]
    command += ["--size", str(entry.size), "--cores", str(cores), "--began", str(time.time())]
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *["--reduced"] * entry.reduced], env=environment, **pipes) as child:
        try:
            out, err = child.communicate()
        finally:
            child.terminate()  # interrupted ourselves: the child stops its Ray and removes what it wrote
    if child.returncode != 0:
        sys.exit(f"{system} failed:\n{err[-4000:]}")
    result: dict[str, float] = json.loads(out.splitlines()[-1]) if system != "prepare" else {}
    return result


def spread(values: list[float], digits: int = 0) -> str:
    """Median (least to most)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def machine(cores: int) -> str:
    """What it ran on."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return (
        f"{names[0] if names else platform.machine()}, {cores} cores, {memory / 2**20:.0f} GiB; Python "
        f"{platform.python_version()}, {versions}; {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def table(results: dict[Entry, list[dict[str, float]]]) -> list[str]:
    """The lines to print; the ratios are between measurements of the same round."""
    lines = [f"{'':36}{'px':>4}{'first s':>22}{'steady images/s':>24}{'of ceiling':>22}{'whole images/s':>24}"]
    for entry, runs in results.items():
        top = results[next(e for e in results if e.system == "ceiling" and e.size == entry.size)]
        ratios = [one["steady"] / best["steady"] for one, best in zip(runs, top, strict=False)]
        lines.append(
            f"{entry.label:36}{entry.size:>4}{spread([r['first'] for r in runs], 1):>22}{spread([r['steady'] for r in runs]):>24}"
            f"{spread(ratios, 2):>22}{spread([r['images'] / r['seconds'] for r in runs]):>24}"
        )
    return lines


def main() -> None:
    """Make the files, measure in rounds, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="1,500 files and 2 rounds: shows that it works, measures little")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was written is removed then, too
    count, repeats = (1500, 2) if arguments.quick else (arguments.files, arguments.repeats)
    cores = len(os.sched_getaffinity(0))
    results: dict[Entry, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="hardmoe-bench-") as name:
        directory = Path(name)
        write_files(directory, count)
        size = sum(file.stat().st_size for file in (directory / "files").iterdir())
        print(f"{count} JPEGs, {size / count / 1024:.0f} kB each; {machine(cores)}", flush=True)
        for entry in ENTRIES:
            if entry.system == "stage":
                run(entry, "prepare", directory, cores)
        for round_number in range(repeats):
            turn = round_number % len(ENTRIES)
            for entry in ENTRIES[turn:] + ENTRIES[:turn]:
                measured = run(entry, entry.system, directory, cores)
                if measured["images"] != count:
                    sys.exit(f"{entry.label} gave {measured['images']} of {count} images")
                results[entry].append(measured)
                note = f"{entry.label}, {entry.size} px: {measured['steady']:.0f} images/s"
                print(f"round {round_number + 1} of {repeats}: {note}", file=sys.stderr, flush=True)
    print("\n".join(table({entry: results[entry] for entry in ENTRIES})))


if __name__ == "__main__":
    main()
