"""What several tests share: real images in Parquet, a recipe small enough to run in seconds, the command line as a process."""

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from forked import run_forked

from hardmoe.cli.main import cli, main
from hardmoe.data.config import DatasetConfig
from hardmoe.data.sources.base import RawExample
from hardmoe.data.sources.icons import IconsSource

SMALL: dict[str, Any] = {
    "dataset": {
        "source": "parquet",
        "path": "photos/*.parquet",
        "shard_rows": 128,
        "test_fraction": 0.15,
        "validation_fraction": 0.1,
    },
    "hashtags": {"min_count": 5},
    "trunk": {"backbone": "quicknet_w4", "image_size": 16, "epochs": 1, "batch_size": 32, "checkpoint_every_steps": 3},
    "partition": {"experts": 3, "max_passes": 5},
    "experts": {"epochs": 2, "batch_size": 16, "checkpoint_every_steps": 2},
    "decoder": {"epochs": 2, "batch_size": 64, "checkpoint_every_steps": 3},
    "evaluation": {"bootstrap_replicates": 50, "map_replicates": 10},
}
"""Everything but the root and the place of the images."""

TWO_LEVEL: dict[str, Any] = {"method": "two_level", "fine_clusters": 24}
"""Keys of `partition` for parts that are groups of fine clusters."""

PREPARATION = ("dataset", "vocabulary", "trunk", "features", "router", "partition")
"""The artifacts of `hardmoe partition`: all that an expert stands on."""


@cache
def _phosphor() -> list[RawExample]:
    source = IconsSource(DatasetConfig(source="icons", icon_size=16))
    shard = next(shard for shard in source.shards() if shard.name == "ph")
    return [row for row in source.read(shard) if isinstance(row, RawExample) and row.tags]


def real_images(count: int) -> list[RawExample]:
    """Glyphs of an icon font, drawn at 16 pixels, with their hashtags.

    Taken from all over the alphabet: the first ones all have the hashtag `thin`, and every system is right about them.
    """
    images = _phosphor()
    return images[:: len(images) // count][:count]


def write_photos(directory: Path, examples: Sequence[RawExample], num_files: int = 3) -> None:
    """Write examples as Parquet files with the columns image and hashtags."""
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(num_files):
        chosen = examples[index::num_files]
        columns = {"image": [row.image for row in chosen], "hashtags": [list(row.tags) for row in chosen]}
        pq.write_table(pa.table(columns), directory / f"{index}.parquet", row_group_size=64)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A recipe with some sections' keys replaced."""
    return base | {key: {**base.get(key, {}), **value} if isinstance(value, dict) else value for key, value in changes.items()}


def write_recipe(directory: Path, name: str = "hardmoe.yaml", /, **changes: Any) -> Path:
    """Write the small recipe, with changes (`root="runs/b"`, `partition={"experts": 1}`), into a directory."""
    path = directory / name
    path.write_text(yaml.safe_dump(merged({"root": "runs/small", **SMALL}, changes)))
    return path


_MAIN = "from hardmoe.cli.main import main; main()"


def command(*arguments: str) -> list[str]:
    """The command line, as it is run by the interpreter of the tests."""
    return [sys.executable, "-c", _MAIN, *arguments]


def hardmoe(directory: Path, *arguments: str, timeout: float = 240, cores: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in a directory, as a process of its own (see `forked`) that takes the machine for one of so many cores."""
    code = _MAIN if cores is None else f"import os; os.cpu_count = lambda: {cores}; {_MAIN}"
    return run_forked(code, arguments, directory, timeout)


def succeed(directory: Path, *arguments: str, timeout: float = 240) -> str:
    """Run a command that must succeed; returns what it printed."""
    result = hardmoe(directory, *arguments, timeout=timeout)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_here(directory: Path, *arguments: str) -> None:
    """Run a building command inline and in this process, which has torch loaded already; raises hardmoe's own errors."""
    with contextlib.chdir(directory), contextlib.redirect_stdout(io.StringIO()):
        cli.main(args=[*arguments, "--backend", "inline"], standalone_mode=False)


def invoke(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A whole command with its exit code and what it says, but in this process, which has torch loaded already."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    previous = signal.getsignal(signal.SIGTERM)
    try:
        with (
            contextlib.chdir(directory),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "argv", ["hardmoe", *arguments]),
        ):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        signal.signal(signal.SIGTERM, previous)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


_DYING = """
import os, signal
from hardmoe.partitioning import fit
run = fit.RouterWork.run
def dying(self, context):
    if os.environ.get("DIE_AT") == f"{context.phase}/{context.unit.name}":
        os.kill(os.getpid(), signal.SIGKILL)
    return run(self, context)
fit.RouterWork.run = dying
os.cpu_count = lambda: 4
"""


def partition(directory: Path, backend: str = "inline", *, die_at: str = "", patch: str = "") -> subprocess.CompletedProcess[str]:
    """`hardmoe partition` as a process that takes the machine for one of four cores.

    Args:
        directory: with the recipe.
        backend: `inline` or `ray`.
        die_at: a unit of the router, `phase/unit`, at which it is killed.
        patch: statements that run before.
    """
    code = f"{_DYING}\n{patch}\n{_MAIN}"
    return run_forked(code, ("partition", "--backend", backend), directory, DIE_AT=die_at)


def refusal(result: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The one sentence with which a command ended; it must be one, for people, and the exit code must be this one."""
    assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    sentences = [line.removeprefix("error: ") for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, result.stderr
    for leak in ("Traceback", "[Errno", "nput should be", "pydantic", "object at 0x", "Error("):
        assert leak not in result.stderr, result.stderr
    return sentences[0]


def copied_run(finished: Path, directory: Path, *, keep: Sequence[str] | None = None) -> Path:
    """Make a directory like that of `finished` with a copy of its run, or of these artifacts of it; returns the copy's root."""
    shutil.copytree(finished / "runs", directory / "runs")
    shutil.copy(finished / "hardmoe.yaml", directory)
    (directory / "photos").symlink_to((finished / "photos").resolve())
    root = directory / "runs" / "small"
    for path in root.iterdir():
        if keep is not None and path.is_dir() and path.name not in keep:
            shutil.rmtree(path)
    return root


def records(root: Path) -> dict[str, bytes]:
    """Every `artifact.json` below a root, by its relative path: what two equal runs have in common."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("artifact.json"))}


def payload(root: Path, artifact: str) -> Any:
    """What an artifact's record says of itself."""
    return json.loads((root / artifact / "artifact.json").read_text())["payload"]


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    """Every file below a root with size and modification time, to see that nothing changed."""
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(root.rglob("*")) if p.is_file()}


def metrics(root: Path) -> dict[str, Any]:
    """The evaluation's results."""
    body: dict[str, Any] = json.loads((root / "evaluation" / "metrics.json").read_text())
    return body
