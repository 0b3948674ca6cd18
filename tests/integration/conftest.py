"""Runs that several integration tests look at, each made once per session. Tests must not change them; they copy."""

from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import PREPARATION, TWO_LEVEL, copied_run, hardmoe, invoke, run_here, write_recipe


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
    result = hardmoe(directory, "run", "--backend", "ray", "--parallel", "4", cores=4, timeout=280)
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
def branched(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run with experts that branch off behind a stage; returns its root."""
    directory = tmp_path_factory.mktemp("branched")
    root = copied_run(finished, directory, keep=PREPARATION)
    run_here(directory, "evaluate", "--set", "experts.branch_at=layer2", "--set", "evaluation.map_replicates=2")
    return root


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


@pytest.fixture(scope="session")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run's mixture, exported with everything."""
    folder = tmp_path_factory.mktemp("exported") / "hub"
    result = invoke(finished, "export", "--root", "runs/small", "--out", str(folder), "--onnx", "--programs")
    assert result.returncode == 0, result.stderr
    return folder
