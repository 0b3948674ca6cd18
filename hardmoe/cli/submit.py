"""`hardmoe submit`: a command as a job on a Ray cluster. Everything that can be refused is refused before anything is sent.

The recipe travels resolved, with every override in it, so the job sees what this machine saw. The driver runs on the cluster and
keeps its state in the root: if it dies, the same submission goes on where it was.
"""

import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from hardmoe.artifacts.provenance import commit
from hardmoe.cli.common import format_table, recipe_of
from hardmoe.errors import BackendError, RecipeError
from hardmoe.execution.checkup.findings import judge_demands
from hardmoe.execution.packing import RECIPE_NAME, pack, tracked_files
from hardmoe.execution.ray.jobs import Job, JobServer
from hardmoe.pipeline import ExternalInputs, build_stages
from hardmoe.recipe import Recipe, places_of

_OF_OTHER_FILES = {"detection"}
"""Commands that build from a file which is no recipe."""
_IN_THE_RECIPE = {"recipe_path", "overrides", "root", "backend", "address", "parallel"}
"""Parameters of commands that the resolved recipe says."""
_INTERRUPTED = 130


def submit_command(group: click.Group, words: Sequence[str], options: Mapping[str, Any]) -> None:
    """Check, send, and unless told to detach follow to the end; ends with the command's own exit code.

    Args:
        group: all commands of hardmoe.
        words: the command, with or without `hardmoe` before it.
        options: `address`, `ca`, `checkout`, `environment`, `shared`, `resubmit`, `detach`.

    Raises:
        RecipeError: the command or recipe cannot run on a cluster.
        BackendError: the cluster cannot be reached or refuses; or the job died without a word.
    """
    command, parameters = _parsed(group, words)
    recipe = recipe_of({"root": None, **parameters})
    _check_places(recipe, options["shared"])
    files = tracked_files(Path.cwd()) if options["checkout"] else {}
    server = JobServer(options["address"], options["ca"])
    _check_demands(recipe, server)
    there = recipe.model_copy(update={"execution": recipe.execution.model_copy(update={"backend": "ray", "address": "auto"})})
    entrypoint = shlex.join(["python", "-m", "hardmoe", str(command.name), "-f", RECIPE_NAME, *_remaining(command, parameters)])
    about = {"hardmoe_command": shlex.join(words), "hardmoe_root": recipe.root, "hardmoe_commit": commit() or ""}
    for left in range(options["resubmit"], -1, -1):
        with tempfile.TemporaryDirectory() as directory:
            archive = Path(directory) / "job.zip"
            pack(archive, yaml.safe_dump(there.model_dump(mode="json"), sort_keys=False).encode(), files)
            job = server.submit(entrypoint, archive, options["environment"], about)
        click.echo(f"submitted as {job}", err=True)
        if options["detach"]:
            click.echo(job)
            return
        ended = _follow(server, job, options["address"])
        if not (_died(ended) and left):
            _finish(ended)
            return
        click.echo(f"{_how_it_died(ended)}; submitting it again, which goes on where it was", err=True)


def list_jobs(server: JobServer) -> None:
    """A table of the cluster's jobs."""
    rows: list[Sequence[str]] = [("job", "state", "started", "command", "root")]
    for job in server.list():
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started)) if job.started else ""
        rows.append((job.id, job.status.lower(), started, job.command, job.root))
    click.echo(format_table(rows) if len(rows) > 1 else "no job was submitted to this cluster")


def show_logs(server: JobServer, job: str) -> None:
    """What a job's driver has printed so far."""
    click.echo(server.logs(job), nl=False)


def stop_job(server: JobServer, job: str) -> None:
    """End a job's driver."""
    click.echo(f"asked {job} to end; submitting it again resumes" if server.stop(job) else f"{job} had ended already")


def _parsed(group: click.Group, words: Sequence[str]) -> tuple[click.Command, dict[str, Any]]:
    """The command and its parameters, checked as if it were run here."""
    name, *arguments = words[1:] if words[0] == "hardmoe" else words
    command = group.commands.get(name)
    building = {known for known, each in group.commands.items() if {p.name for p in each.params} >= _IN_THE_RECIPE}
    sendable = sorted(building - _OF_OTHER_FILES)
    if command is None or name not in sendable:
        raise RecipeError(f"'{name}' is no command for a cluster; submit one of {', '.join(sendable)}")
    parameters = command.make_context(name, list(arguments)).params
    for each in command.params:
        if isinstance(each.type, click.Path) and each.name != "recipe_path" and parameters[str(each.name)] is not None:
            raise RecipeError(f"{each.opts[0]} names a file of this machine, which the cluster does not see; run that one here")
    return command, parameters


def _remaining(command: click.Command, parameters: Mapping[str, Any]) -> list[str]:
    """Options of the command that the recipe does not say, written out again."""
    words: list[str] = []
    for each in command.params:
        value = parameters[str(each.name)]
        if each.name in _IN_THE_RECIPE or value in (None, False, ()):
            continue
        if isinstance(each, click.Option) and each.is_flag:
            words.append(each.opts[0])
        elif each.multiple:
            words += [word for one in value for word in (each.opts[0], str(one))]
        else:
            words += [each.opts[0], ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words


def _check_places(recipe: Recipe, shared: Sequence[Path]) -> None:
    """Refuse paths that only this machine has."""
    for key, places in places_of(recipe).items():
        for place in places:
            path = Path(place.removeprefix("file://")).expanduser()
            if ("://" in place and not place.startswith("file://")) or any(path.is_relative_to(mount) for mount in shared):
                continue
            what = "relative path" if not path.is_absolute() else "path"
            if what == "relative path" and any(path.absolute().is_relative_to(mount) for mount in shared):
                raise RecipeError(
                    f"{key} is '{place}', a relative path, which is elsewhere for workers of the cluster; write {path.absolute()}"
                )
            raise RecipeError(
                f"{key} is '{place}', a {what} of this machine, which workers of the cluster do not see; use s3://bucket/prefix, "
                f"or say with --shared DIR that every node mounts that directory at the same place"
            )


def _check_demands(recipe: Recipe, server: JobServer) -> None:
    """Refuse what no node can run, where the cluster is one of fixed size."""
    if nodes := server.nodes():
        for finding in judge_demands([stage.resources for stage in build_stages(recipe, ExternalInputs(""))], nodes):
            if finding.state == "bad":
                raise BackendError(f"{finding.text} of the cluster; {finding.remedy}")


def _follow(server: JobServer, job: str, address: str) -> Job:
    try:
        return server.follow(job, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        click.echo(
            f"\n{job} goes on; see it with 'hardmoe submit --address {address} --logs {job}', end it with --stop", err=True
        )
        sys.exit(_INTERRUPTED)


def _died(job: Job) -> bool:
    """Whether the driver was ended from outside: a signal, or a node that went; nothing of the command's own."""
    return job.status == "FAILED" and (job.exit_code is None or job.exit_code < 0 or job.exit_code > 128 + 2)


def _how_it_died(job: Job) -> str:
    return f"the driver of {job.id} died ({' '.join(job.message.split())[:300] or 'no message'})"


def _finish(job: Job) -> None:
    """End as the command ended, whose own words were shown."""
    if job.status == "SUCCEEDED":
        return
    if job.status == "STOPPED":
        click.echo(f"{job.id} was stopped; submitting it again resumes", err=True)
        sys.exit(_INTERRUPTED)
    if _died(job):
        raise BackendError(f"{_how_it_died(job)}; submit it again, which goes on where it was")
    sys.exit(job.exit_code)
