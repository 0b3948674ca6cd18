"""Real mounts for tests of full and read-only disks. Where mounting is refused, the test is skipped and says so."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def _mount(*arguments: str) -> None:
    result = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip(f"mounting is refused here: {result.stderr.strip()}")


@contextlib.contextmanager
def _mounted(place: Path, *arguments: str) -> Iterator[None]:
    _mount(*arguments, str(place))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextlib.contextmanager
def small_disk(place: Path, size: str, *options: str) -> Iterator[None]:
    """A file system of its own of at most `size` (`512k`, `1m`), in memory; `options` such as `ro`."""
    with _mounted(place, "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs"):
        yield


def resize(place: Path, size: str) -> None:
    """Give a small disk another size."""
    _mount("-o", f"remount,size={size}", str(place))


@contextlib.contextmanager
def bind_read_only(source: Path, place: Path) -> Iterator[None]:
    """The same files at another place, where nothing can be written."""
    with _mounted(place, "--bind", str(source)):
        _mount("-o", "remount,ro,bind", str(place))
        yield
