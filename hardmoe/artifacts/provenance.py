"""Provenance: who built an artifact, when, where, with what, and how long each unit took. Never part of any identity."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

import hardmoe
from hardmoe.artifacts.lease import this_process
from hardmoe.config import Json

_PACKAGES = ("torch", "torchvision", "ray", "faiss-gpu", "faiss-cpu", "numpy", "pyarrow", "pillow")


def now() -> str:
    """The present moment in ISO 8601, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@cache
def versions() -> dict[str, str]:
    """Versions of hardmoe, Python and the packages that decide bytes."""
    found = {"hardmoe": hardmoe.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def commit() -> str | None:
    """The git commit of the checkout that hardmoe runs from, or None outside one."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def machine() -> str:
    """This machine's processors, and the GPUs of this process if it has used one: `16 x Intel Xeon Platinum 8481C, NVIDIA H200`.

    Nothing is loaded or started to find out.
    """
    told = f"{os.cpu_count() or 1} x {_processor()}"
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return told
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return ", ".join([told, *(name if count == 1 else f"{count} x {name}" for name, count in counts.items())])


@cache
def _processor() -> str:
    """The processor's name as Linux tells it; elsewhere its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join(names[0].split()) if names else platform.machine()


def describe(started: str, seconds: float, units: Sequence[Mapping[str, Json]] = (), **more: Json) -> bytes:
    """The content of `provenance.json`."""
    body = {
        "started": started,
        "finished": now(),
        "seconds": round(seconds, 3),
        "host": this_process().host,
        "argv": sys.argv,
        "commit": commit(),
        "versions": versions(),
        "units": list(units),
        **more,
    }
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()
