"""Runs that several integration tests look at, each made once per session. Tests must not change them; they copy."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import TWO_LEVEL, run_here, write_recipe

_FOUR_SLOTS = "import os; os.cpu_count = lambda: 4; from hardmoe.cli.main import main; main()"


@pytest.fixture(scope="session")
def root(finished: Path) -> Path:
    """The root of the small recipe's run, inline and uninterrupted."""
    return finished / "runs" / "small"


@pytest.fixture(scope="session")
def root_on_ray(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """The small recipe's root, built by four Ray workers at a time, whatever the number of this machine's cores."""
    directory = tmp_path_factory.mktemp("on-ray")
    (directory / "photos").symlink_to(photos)
    write_recipe(directory)
    arguments = ("run", "--backend", "ray", "--parallel", "4")
    result = subprocess.run(
        [sys.executable, "-c", _FOUR_SLOTS, *arguments], cwd=directory, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr
    return directory / "runs" / "small"


@pytest.fixture(scope="session")
def root_of_one_expert(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    """A mixture of a single expert; what does not depend on the number of experts is taken over from the small run."""
    directory = tmp_path_factory.mktemp("one-expert")
    (directory / "photos").symlink_to((finished / "photos").resolve())
    write_recipe(directory, partition={"experts": 1}, reuse=[str(finished / "runs" / "small")])
    run_here(directory, "evaluate")
    return directory / "runs" / "small"


@pytest.fixture(scope="session")
def two_level_root(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    """A whole run whose three parts are groups of 24 fine clusters; what the parts do not decide is the small run's."""
    directory = tmp_path_factory.mktemp("two-level")
    (directory / "photos").symlink_to((finished / "photos").resolve())
    write_recipe(directory, partition=TWO_LEVEL, reuse=[str(finished / "runs" / "small")])
    run_here(directory, "report")
    return directory / "runs" / "small"


@pytest.fixture(scope="session")
def resharded_root(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """The same images from five source files instead of three, in eleven dataset shards instead of four."""
    directory = tmp_path_factory.mktemp("resharded")
    table = pa.concat_tables([pq.read_table(path) for path in sorted(photos.iterdir())])
    (directory / "photos").mkdir()
    bounds = [0, 20, 190, 191, 350, table.num_rows]
    for index, (low, high) in enumerate(pairwise(bounds)):
        pq.write_table(table.slice(low, high - low), directory / "photos" / f"{index}.parquet", row_group_size=50)
    write_recipe(directory, dataset={"shard_rows": 47})
    run_here(directory, "evaluate")
    return directory / "runs" / "small"
