"""`hardmoe verify`: what the records vouch for, read again; and with `--images` what a dataset refers to in its source."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from hardmoe.artifacts.store import Artifact, ArtifactStore
from hardmoe.cli.begun import BegunRun, begun_run
from hardmoe.cli.common import recipe_of
from hardmoe.cli.inspect import resolve
from hardmoe.data.config import DatasetConfig
from hardmoe.errors import ArtifactError, CorruptFileError, DataError
from hardmoe.execution.display import LOG_SECONDS


def verify_artifacts(options: Mapping[str, Any], names: Sequence[str], with_images: bool) -> None:
    """Hash every vouched file, check every input's record, look at the source's images if asked; tell all, then fail.

    Raises:
        CorruptFileError: some artifacts are damaged.
        DataError: only images of the source are.
    """
    run = begun_run(options)
    known, store = run.names, ArtifactStore(run.storage)
    config = _where_images_are(options, run)
    damaged = bad_images = 0
    for name in [resolve(known, name) for name in names] or known:
        sentence, artifact = _verified(store, name)
        damaged += sentence.startswith("BAD")
        if artifact is not None and artifact.payload.get("store") == "reference":
            is_sound, more = _looked_at_images(artifact, config) if with_images else (True, _NOT_LOOKED_AT)
            bad_images += not is_sound
            sentence = f"{sentence}; {more}" if is_sound else f"BAD: {more}"
        click.echo(f"{name}: {sentence}")
    if damaged:
        raise CorruptFileError(
            f"{damaged} {'artifact is' if damaged == 1 else 'artifacts are'} damaged; delete their directories and what stands "
            "on them, and run again"
        )
    if bad_images:
        raise DataError(
            "images that the dataset refers to are not what they were; put the source's files back, or build from those there "
            "are now in a new root"
        )


_NOT_LOOKED_AT = "its images, which are in the source, were not looked at (--images reads them)"


def _where_images_are(options: Mapping[str, Any], run: BegunRun) -> DatasetConfig:
    """The source as the recipe in hand has it, since it may have moved; else as the run has it."""
    is_given = options["root"] is None or options["recipe_path"] is not None
    return recipe_of(options).dataset if is_given else run.config.dataset


def _verified(store: ArtifactStore, name: str) -> tuple[str, Artifact | None]:
    """What is to be said of an artifact; it itself if it is sound."""
    try:
        artifact = store.find(name)
        if artifact is None:
            return "missing", None
        count = artifact.verify()
        _check_inputs(store, artifact)
    except ArtifactError as error:
        return f"BAD: {error}", None
    return f"ok, {count} files", artifact


def _check_inputs(store: ArtifactStore, artifact: Artifact) -> None:
    for reference in artifact.record.inputs.values():
        there = store.find(reference.artifact)
        if there is None or there.record.digest() != reference.record:
            raise CorruptFileError(f"its input '{reference.artifact}' is {'missing' if there is None else 'another one by now'}")


def _looked_at_images(artifact: Artifact, config: DatasetConfig) -> tuple[bool, str]:
    """Whether all images in the source are as they were, and what to say of them."""
    from hardmoe.data.reading import ReferringExamples
    from hardmoe.data.verification import check_images

    total = sum(artifact.payload["sizes"].values())
    try:
        with _progress(artifact.name, total) as progress:
            check = check_images(ReferringExamples(artifact, config), progress)
    except DataError as error:
        return False, f"its {total} images are out of reach: {error}"
    if not check.first:
        return True, f"{check.num_images} images in the source are as they were"
    return False, (
        f"of {check.num_images} images in the source {check.num_missing} cannot be read and {check.num_altered} "
        f"{'has' if check.num_altered == 1 else 'have'} other content, the first: {check.first}"
    )


@contextmanager
def _progress(name: str, total: int) -> Iterator[Any]:
    """Something to be called with the number of images looked at: a bar on a terminal, else a line now and then."""
    if sys.stderr.isatty():
        with click.progressbar(length=total, label=f"{name}: images", file=sys.stderr) as bar:
            yield lambda done: bar.update(done - bar.pos)
        return
    told = time.monotonic()

    def tell(done: int) -> None:
        nonlocal told
        if time.monotonic() - told > LOG_SECONDS:
            told = time.monotonic()
            click.echo(f"{name}: {done:,} of {total:,} images read", err=True)

    yield tell
