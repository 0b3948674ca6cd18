"""Fixtures of the tests of the workflow."""

import os
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


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests kill processes and not the machine, and write ten thousand tiny files."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
