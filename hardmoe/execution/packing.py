"""What travels with a job: the resolved recipe and, when asked, the tracked files of this checkout, as one archive.

Ray would pack the whole directory, datasets, runs and `.git` included, and fail after the upload. Here git says which files
belong to the project, their size is known before anything is sent, and the archive has the same bytes for the same content, so
that a second submission uploads nothing. Rejected: `.gitignore` as Ray reads it, which knows nothing of untracked files.
"""

import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path

from hardmoe.errors import RecipeError

MOST_BYTES = 20 * 2**20
RECIPE_NAME = "hardmoe-job.yaml"
_LEFT_OUT = ("runs", "data", "datasets")
"""Directories at the top that hold what a job reads from the store, should they be tracked."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
_MODE = 0o644 << 16


def tracked_files(directory: Path) -> dict[str, Path]:
    """The tracked files of the checkout that a directory is in, as they are now, by their paths within it.

    Links and submodules are left out, and so is what lies in `runs`, `data` and `datasets`.

    Raises:
        RecipeError: it is in no checkout, or there is too much of it.
    """
    top = Path(_git(directory, "rev-parse", "--show-toplevel").strip())
    names = [name for name in _git(top, "ls-files", "-z").split("\0") if name and name.split("/")[0] not in _LEFT_OUT]
    files = {name: top / name for name in sorted(names)}
    files = {name: path for name, path in files.items() if path.is_file() and not path.is_symlink()}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if (total := sum(sizes.values())) > MOST_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        told = ", ".join(f"{name} ({sizes[name] / 2**20:.1f} MiB)" for name in largest)
        raise RecipeError(
            f"--checkout: the tracked files of {top} have {total / 2**20:.0f} MiB, and more than {MOST_BYTES / 2**20:.0f} do not "
            f"travel with a job; take the largest out of git ({told}), or install the code on the nodes"
        )
    return files


def pack(target: Path, recipe: bytes, files: Mapping[str, Path]) -> None:
    """Write the archive: the recipe as `hardmoe-job.yaml`, and the files; the same bytes for the same content."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in ((RECIPE_NAME, recipe), *((name, path.read_bytes()) for name, path in files.items())):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr, entry.compress_type = _MODE, zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)


def _git(directory: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            errors="surrogateescape",
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise RecipeError(
            f"--checkout sends the files that git tracks, but {directory} is in no git checkout; run it in one, or leave it out "
            "and install the code on the nodes"
        ) from error
    return done.stdout
