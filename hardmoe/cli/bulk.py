"""`hardmoe predict` and `hardmoe embed`: from files or a recipe's source to lines on stdout, or to tables in a directory."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import click

from hardmoe.artifacts.fingerprint import differences
from hardmoe.artifacts.store import ArtifactStore
from hardmoe.cli.common import existing_run, printable, usable_cpus
from hardmoe.data.config import PILLOW_MAX_PIXELS, DatasetConfig
from hardmoe.data.sources.registry import open_source
from hardmoe.errors import DataError, DriftError, RecipeError
from hardmoe.execution.plan import Plan
from hardmoe.recipe import load_recipe
from hardmoe.stage import Stage
from hardmoe.storage import open_storage


def run_bulk(options: Mapping[str, Any], images: Sequence[str], k: int | None, coverage: float | None = None) -> None:
    """Answer for every image; k tags each, or their places in the unified space; `coverage` is as in `UseOptions`.

    Raises:
        RecipeError: the options do not go together.
        DataError: there are no images, or none that can be decoded.
    """
    storage, _ = existing_run(options)
    if options["out"] is None:
        for option in ("kind", "parallel", "address"):
            if options[option] is not None:
                shown = "--format" if option == "kind" else f"--{option}"
                raise RecipeError(f"{shown} is for tables; name a directory for them with --out")
    dataset = _dataset(images, options["source_path"])
    if options["out"] is None:
        _print_lines(storage.uri, dataset, k, (options["memory_gib"], coverage))
    else:
        _write_tables(storage.uri, dataset, k, options, coverage)


def _dataset(images: Sequence[str], source_path: Path | None) -> DatasetConfig:
    """Where the images are."""
    if bool(images) == (source_path is not None):
        raise RecipeError("name images or folders, or a recipe whose dataset is to be read (--source), and not both")
    if source_path is not None:
        return load_recipe(source_path).dataset
    places = [_place(image) for image in images]
    return DatasetConfig(source="folder", path=places[0] if len(places) == 1 else places, max_pixels=PILLOW_MAX_PIXELS)


def _place(image: str) -> str:
    """An absolute place; a file whose name looks like a pattern is that file."""
    if not image.strip():
        raise RecipeError("an image's place is empty, maybe of a shell variable that is not set; name a file or a folder")
    if image.startswith(("http://", "https://")):
        raise RecipeError(f"'{image}' is a web address; download the image first, and name the file")
    if "://" in image:
        return image
    path = Path(image).expanduser().absolute()
    if not path.exists() and escape(image) == image:
        raise DataError(f"there is no image or folder '{image}'; correct the path")
    return escape(str(path)) if path.exists() else str(path)


def _print_lines(root: str, dataset: DatasetConfig, k: int | None, use: tuple[float | None, float | None]) -> None:
    """In this process, shard by shard, to stdout."""
    from hardmoe.bulk.answers import Decoding, answer
    from hardmoe.bulk.writing import embedded_rows, json_line, predicted_rows
    from hardmoe.mixture import Mixture, UseOptions

    source = open_source(dataset)
    shards = source.shards()
    mixture = Mixture.load(root, UseOptions(memory_gib=use[0], coverage=use[1]))
    good = bad = 0
    for shard in shards:
        answers = answer(mixture, source.read(shard), Decoding(dataset.max_pixels, usable_cpus()))
        for row in embedded_rows(answers) if k is None else predicted_rows(mixture, answers, k):
            click.echo(json_line(row), nl=False)
        for each in answers.bad:
            click.echo(f"{printable(each.source_uri)}: {each.reason}", err=True)
        good, bad = good + len(answers.uris), bad + len(answers.bad)
    sys.stdout.flush()
    _tell(good, bad, "")


def _write_tables(root: str, dataset: DatasetConfig, k: int | None, options: Mapping[str, Any], coverage: float | None) -> None:
    """As a stage of a root of its own: resumable, and on Ray if that is asked for."""
    from hardmoe.bulk.stage import BulkRequest, bulk_stage
    from hardmoe.bulk.work import source_digest
    from hardmoe.execution.config import ExecutionConfig
    from hardmoe.execution.display import make_display
    from hardmoe.execution.opening import open_backend
    from hardmoe.execution.progress import Reporter
    from hardmoe.execution.runner import Runner, RunnerOptions
    from hardmoe.mixture import Mixture, UseOptions

    out = open_storage(options["out"])
    identity = Mixture.load(root, UseOptions(coverage=coverage)).identity()
    request = BulkRequest(root, identity, k, options["kind"] or "parquet", coverage, options["memory_gib"])
    on_ray = options["parallel"] is not None or options["address"] is not None
    digest = source_digest(dataset, out, request.name)
    stage = bulk_stage(request, dataset, digest, 1 if on_ray else usable_cpus())
    store = ArtifactStore(out)
    plan = plan_alone(store, stage, "name another --out, or delete it")
    if plan.missing:
        reporter, limits = (
            Reporter(out, make_display()),
            RunnerOptions(options["parallel"], accept_versions=options["accept_versions"]),
        )
        execution = ExecutionConfig(backend="ray" if on_ray else "inline", address=options["address"] or "local")
        Runner(store, partial(open_backend, execution), reporter, limits).run(plan)
    payload = plan.artifacts[stage.name].payload
    click.echo(out.where(stage.name))
    _tell(payload["rows"], payload["quarantined"], f"; they are listed in {out.where(stage.name)}/quarantine")


def plan_alone(store: ArtifactStore, stage: Stage, remedy: str) -> Plan:
    """The plan of a stage that no recipe asks for.

    Raises:
        DriftError: there is an artifact of that name that was asked for otherwise.
    """
    from hardmoe.execution.plan import make_plan

    try:
        return make_plan(store, [stage])
    except DriftError as error:
        rows = "; ".join(differences(store.get(stage.name).record.config, dict(stage.config)))
        raise DriftError(f"{store.storage.where(stage.name)} answers another request ({rows}); {remedy}") from error


def _tell(good: int, bad: int, where: str) -> None:
    """How many images there were, and how many of no use.

    Raises:
        DataError: all of them were of no use.
    """
    if bad and not good:
        many = "the image cannot" if bad == 1 else f"none of {bad:,} images can"
        raise DataError(f"{many} be decoded{where}; correct what was given")
    counted = "1 image" if good == 1 else f"{good:,} images"
    click.echo(counted + (f", and {bad:,} that cannot be decoded{where}" if bad else ""), err=True)
