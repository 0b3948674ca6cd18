"""Fixtures of the tests of the workflow."""

from pathlib import Path

import pytest
from counting import Control


@pytest.fixture
def control(tmp_path: Path) -> Control:
    """A control directory of its own."""
    directory = tmp_path / "control"
    directory.mkdir()
    return Control(directory)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root that does not exist yet."""
    return tmp_path / "root"
