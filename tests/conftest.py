"""Fixtures of all tests."""

from pathlib import Path

import pytest
import torch
from support import hardmoe, real_images, write_photos, write_recipe

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with 500 real images in three Parquet files."""
    directory = tmp_path_factory.mktemp("collection") / "photos"
    write_photos(directory, real_images(500))
    return directory


@pytest.fixture
def project(tmp_path: Path, photos: Path) -> Path:
    """An empty directory with `photos/` and the small recipe `hardmoe.yaml` in it; nothing was run yet."""
    (tmp_path / "photos").symlink_to(photos)
    write_recipe(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A directory in which the small recipe was run to its end, inline, into `runs/small`. Tests must not change it."""
    directory = tmp_path_factory.mktemp("finished")
    (directory / "photos").symlink_to(photos)
    write_recipe(directory)
    result = hardmoe(directory, "run", "--backend", "inline")
    assert result.returncode == 0, result.stderr
    return directory
