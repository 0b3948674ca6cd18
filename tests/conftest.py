"""Fixtures of all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from s3 import CREDENTIALS, Store, running_store
from support import hardmoe, real_images, write_photos, write_recipe

torch.set_num_threads(1)
# What takes how long is for the benchmarks: here a busy machine would be a failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes longest in front of the random order: at the end, one process would work alone."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Tests kill processes and not the machine, and a small run waits for the disk 530 times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


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


@pytest.fixture
def one_search_thread() -> Iterator[None]:
    """Searches for neighbours by one thread: the same few rows a thousand times over are slower with two."""
    import faiss

    threads = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    yield
    torch.set_num_threads(threads[0])
    faiss.omp_set_num_threads(threads[1])


@pytest.fixture(scope="session")
def _running_store() -> Iterator[Store]:
    with running_store() as store:
        yield store


@pytest.fixture
def s3_store(_running_store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An S3 store behind a proxy that can misbehave, and the environment in which boto3 finds it."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    # The pauses before this process's own retries; a server on loopback recovers at once.
    monkeypatch.setattr("hardmoe.storage.s3_client.FIRST_WAIT_SECONDS", 0.002)
    _running_store.proxy.reset()
    yield _running_store
    _running_store.proxy.reset()
