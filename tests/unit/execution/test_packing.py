"""What travels with a job: only what git tracks, never too much, the same bytes for the same content."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from hardmoe.errors import RecipeError
from hardmoe.execution import packing
from hardmoe.execution.packing import RECIPE_NAME, pack, tracked_files


def git(directory: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=directory, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small checkout with everything in it that must not travel."""
    top = tmp_path / "checkout"
    for name in ("own/network.py", "runs/photos/model.bin", "data/images.bin", "datasets/more.bin", "notes ü.txt"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(name)
    (top / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("not ours")
    git(top, "init", "-q")
    git(top, "add", ".")
    (top / "untracked.bin").write_bytes(b"0" * 1000)
    return top


def test_only_tracked_files_travel_and_no_run_dataset_or_link(checkout: Path) -> None:
    assert sorted(tracked_files(checkout / "own")) == ["notes ü.txt", "own/network.py"]


def test_file_that_was_deleted_since_is_left_out(checkout: Path) -> None:
    (checkout / "own" / "network.py").unlink()
    assert sorted(tracked_files(checkout)) == ["notes ü.txt"]


def test_checkout_that_is_too_large_is_refused_with_its_largest_files(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MOST_BYTES", 2**20)
    (checkout / "large.bin").write_bytes(b"0" * (3 * 2**20))
    git(checkout, "add", ".")
    with pytest.raises(RecipeError, match=r"have 3 MiB, and more than 1 .*large\.bin \(3\.0 MiB\)"):
        tracked_files(checkout)


def test_directory_outside_any_checkout_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(RecipeError, match="is in no git checkout"):
        tracked_files(tmp_path)


def test_same_content_gives_the_same_bytes(checkout: Path, tmp_path: Path) -> None:
    files = tracked_files(checkout)
    pack(tmp_path / "a.zip", b"root: x\n", files)
    (checkout / "own" / "network.py").touch()
    pack(tmp_path / "b.zip", b"root: x\n", tracked_files(checkout))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist() == [RECIPE_NAME, "notes ü.txt", "own/network.py"]
        assert archive.read("own/network.py") == b"own/network.py"
