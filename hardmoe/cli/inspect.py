"""The commands that look: status, logs, show. They read the run's files and start nothing."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from hardmoe.artifacts.lease import TIME_TO_LIVE_SECONDS, lease_holder
from hardmoe.artifacts.names import expert_name
from hardmoe.artifacts.record import PROVENANCE_NAME
from hardmoe.artifacts.store import ArtifactStore
from hardmoe.cli.begun import begun_run
from hardmoe.cli.common import format_table
from hardmoe.cli.trainings import experts_line, training_notes
from hardmoe.config import Json
from hardmoe.errors import CorruptFileError, RecipeError, StorageError
from hardmoe.execution.progress import STATUS_SECONDS
from hardmoe.execution.task import BuildPaths
from hardmoe.execution.tracked import format_seconds
from hardmoe.experts.stages import trained_on
from hardmoe.recipe import Recipe
from hardmoe.report.status import StatusRow, render_status
from hardmoe.storage import LocalStorage, Storage, join

_ACTIVE = ("running",)


@dataclass(frozen=True)
class ArtifactStatus:
    """One artifact's line in `hardmoe status`."""

    artifact: str
    state: str
    """done, reused, running, stopped, failed or missing."""
    progress: Mapping[str, Json]
    """What the driver last wrote of it; empty when done or not begun."""
    holder: str | None = None
    seconds: float | None = None


def show_status(options: Mapping[str, Any], as_json: bool, watch: bool, page: Path | None = None) -> None:
    """Print the status, or write it as a page; once, or again and again until nothing is running any more."""
    quiet = 0
    while True:
        run = begun_run(options)
        rows = [artifact_status(run.storage, name) for name in run.names]
        line = None if as_json or run.recipe is None else _experts_line(run.storage, run.recipe, rows)
        quiet = 0 if any(row.state in _ACTIVE or row.holder for row in rows) else quiet + 1
        if page is not None:
            _write_page(page, run.storage, rows, line, goes_on=watch and quiet < 2)
            if quiet == 0 or not watch:
                click.echo(f"{datetime.now().astimezone():%H:%M:%S} {page}", err=True)
        else:
            if watch and not as_json:
                click.clear()
            click.echo(json.dumps([vars(row) for row in rows], indent=1) if as_json else _status_table(rows))
            if line is not None:
                click.echo(line)
        # Between two stages nothing runs for a moment: only the second such look in a row is the end.
        if not watch or quiet == 2:
            return
        time.sleep(STATUS_SECONDS)


def artifact_status(storage: Storage, name: str) -> ArtifactStatus:
    """How an artifact stands, in a few reads, however many units it has."""
    try:
        artifact = ArtifactStore(storage).find(name)
    except CorruptFileError as error:
        return ArtifactStatus(name, "damaged", {"failures": [{"unit": name, "error": str(error)}]})
    if artifact is not None:
        provenance = _provenance(storage, name)
        return ArtifactStatus(name, "reused" if artifact.record.reused_from else "done", {}, seconds=provenance.get("seconds"))
    holder = lease_holder(storage, name)
    body = _read_json(storage, BuildPaths(name, "").status)
    if not body:
        return ArtifactStatus(name, "running" if holder else "missing", {}, str(holder) if holder else None)
    # The driver of a run that was killed could not say so: without a living holder nothing is running.
    state = "stopped" if body["state"] == "running" and holder is None else body["state"]
    return ArtifactStatus(name, state, body, str(holder) if holder else None)


def _write_page(page: Path, storage: Storage, rows: Sequence[ArtifactStatus], experts: str | None, *, goes_on: bool) -> None:
    """The page in place of the one before; nobody ever reads half of it."""
    every = max(1, round(STATUS_SECONDS)) if goes_on else None
    moment = datetime.now().astimezone()
    text = render_status([_in_words(row) for row in rows], storage.where(), moment, experts, every)
    LocalStorage(page.absolute().parent).write_bytes(page.name, text.encode())


def _in_words(row: ArtifactStatus) -> StatusRow:
    body = row.progress
    total = body.get("units_total")
    units = f"{body['units_done']}/{total}" if total else ""
    percent = 100 * body["fraction"] if total else None
    running = row.state in _ACTIVE and bool(body)
    rate = f"{body['units_per_second']:.3g}/s" if running and body["units_per_second"] else ""
    eta = format_seconds(body["eta_seconds"]) if running and body["eta_seconds"] is not None else ""
    share = "" if percent is None else f"{percent:.0f} %"
    return StatusRow(row.artifact, row.state, body.get("phase", ""), units, share, rate, eta, _note(row), percent)


def _status_table(rows: Sequence[ArtifactStatus]) -> str:
    table = [("artifact", "state", "phase", "units", "done", "rate", "ETA", "note")]
    for row in map(_in_words, rows):
        table.append((row.artifact, row.state, row.phase, row.units, row.share, row.rate, row.eta, row.note))
    return format_table(table, right=(3, 4, 5, 6))


def _note(row: ArtifactStatus) -> str:
    if row.seconds is not None:
        return f"took {format_seconds(row.seconds)}"
    failures = row.progress.get("failures", [])
    if failures:
        return f"{failures[0]['unit']}: {failures[0]['error']}"[:160]
    live = row.progress.get("running", {})
    parts = training_notes(row.progress) if row.state in _ACTIVE else []
    rates = [body["values"]["examples/s"] for body in live.values() if "examples/s" in body["values"]]
    if rates and not parts and row.state in _ACTIVE:
        parts = [f"{sum(rates):,.0f} examples/s"]
    if row.holder:
        parts.append(row.holder)
    if row.state in _ACTIVE and row.progress and (silent := _seconds_since(row.progress["updated"])) > TIME_TO_LIVE_SECONDS:
        parts.append(f"not heard of for {format_seconds(silent)}")
    return "; ".join(parts)


def _experts_line(storage: Storage, recipe: Recipe, rows: Sequence[ArtifactStatus]) -> str | None:
    if not any(row.state in _ACTIVE and row.artifact.startswith("experts/") for row in rows):
        return None
    fractions = {row.artifact: 1.0 if row.state in ("done", "reused") else row.progress.get("fraction", 0.0) for row in rows}
    speeds = {
        row.artifact: sum(body["values"].get("examples/s", 0.0) for body in row.progress.get("running", {}).values())
        for row in rows
        if row.state in _ACTIVE
    }
    shown = {name: images for name, images in _shown_by_expert(storage, recipe).items() if name in fractions}
    return experts_line(shown, fractions, speeds, datetime.now().astimezone())


def _shown_by_expert(storage: Storage, recipe: Recipe) -> dict[str, float]:
    """How many images every expert is shown in all, as its part's size and the recipe's budget have it; early stops left out."""
    try:
        artifact = ArtifactStore(storage).find("partition")
    except CorruptFileError:
        artifact = None
    if artifact is None:
        return {}
    sizes: list[float] = [*trained_on(artifact.payload)]
    if recipe.experts.budget == "examples":
        sizes = [sum(sizes) / len(sizes)] * len(sizes)
    return {join("experts", expert_name(number)): recipe.experts.epochs * size for number, size in enumerate(sizes)}


def _seconds_since(moment: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()


def show_logs(options: Mapping[str, Any], name: str | None, failed: bool) -> None:
    """Print the logs of an artifact's units, or list all logs, or print what failed."""
    run = begun_run(options)
    storage, names = run.storage, run.names if name is None else [resolve(run.names, name)]
    if failed:
        _print_failures(storage, names)
        return
    found = [(artifact, path) for artifact in names for path in storage.list(join(artifact, "_progress", "logs"))]
    if not found:
        click.echo("no unit had anything to say: logs hold warnings, errors and resumed trainings", err=True)
    for artifact, path in found:
        if name is None:
            click.echo(f"{artifact}: {path.removesuffix('.log')}")
        else:
            click.echo(f"== {path.removesuffix('.log')}")
            click.echo(storage.read_bytes(join(artifact, "_progress", "logs", path)).decode(errors="replace"), nl=False)


def _print_failures(storage: Storage, names: Sequence[str]) -> None:
    found = 0
    for artifact in names:
        for failure in artifact_status(storage, artifact).progress.get("failures", []):
            found += 1
            click.echo(f"{failure['unit']}: {failure['error']}")
    if not found:
        click.echo("nothing failed")


def show_artifact(options: Mapping[str, Any], name: str, as_json: bool) -> None:
    """Print a record: as JSON with its provenance, or for people."""
    run = begun_run(options)
    storage, names = run.storage, run.names
    artifact = ArtifactStore(storage).get(resolve(names, name))
    provenance = _provenance(storage, artifact.name)
    if as_json:
        click.echo(json.dumps({"record": artifact.record.body(), "provenance": provenance}, indent=1, sort_keys=True))
        return
    record = artifact.record
    where = artifact.storage.where() if record.reused_from else storage.where(artifact.name)
    lines = [
        ("artifact", f"{artifact.name} (kind {record.kind}, version {record.version})"),
        ("files", f"{len(record.files)}, {sum(entry.size for entry in record.files):,} bytes, in {where}"),
        ("fingerprint", record.fingerprint),
        ("inputs", ", ".join(sorted({reference.artifact for reference in record.inputs.values()})) or "-"),
        ("built", f"{provenance.get('finished', '?')} on {provenance.get('host', '?')}, {provenance.get('seconds', 0):.1f} s"),
    ]
    click.echo(format_table(lines))
    for title, body in (("config", record.config), ("payload", record.payload)):
        click.echo(f"\n{title}")
        click.echo(json.dumps(body, indent=2, sort_keys=True))


def resolve(names: Sequence[str], name: str) -> str:
    """The artifact that a person means: its whole name, or the last part of it (`expert-0007`)."""
    wanted = name.strip("/")
    if wanted in names:
        return wanted
    matches = [known for known in names if known.rpartition("/")[2] == wanted] or [k for k in names if wanted.startswith(f"{k}/")]
    if not matches:
        raise RecipeError(f"this run has no artifact '{name}'; it has {', '.join(names)}")
    return matches[0]


def _provenance(storage: Storage, name: str) -> dict[str, Json]:
    return _read_json(storage, join(name, PROVENANCE_NAME))


def _read_json(storage: Storage, path: str) -> dict[str, Json]:
    """A file that nothing depends on; empty if it is missing, damaged, or just being taken away by the driver."""
    if not storage.exists(path):
        return {}
    try:
        body: dict[str, Json] = json.loads(storage.read_bytes(path))
    except (StorageError, ValueError):
        return {}
    return body
