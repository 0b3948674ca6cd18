"""Commands about machines: what they can do, what a run would take on them, and running it there."""

import os
from pathlib import Path
from typing import Any

import click

from hardmoe.cli.options import recipe_options

_MOST, _MOST_MACHINES = 1e18, 1_000_000
"""Of images and their bytes, and of GPUs and nodes, that a plan is made for."""


@click.command()
@click.option("--address", help="Look at every node of this Ray cluster (host:6379), as execution.address has it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@recipe_options
def doctor(as_json: bool, **options: Any) -> None:
    """What this machine, or every node of a cluster, can do: versions, GPUs, memory, disk, the root; and remedies."""
    from hardmoe.cli.doctor import examine

    examine(options, as_json)


def _variables(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
    """`KEY=VALUE` each."""
    if wrong := [text for text in value if not text.partition("=")[0].strip() or "=" not in text]:
        raise click.BadParameter(f"{wrong[0]!r} is not of the form KEY=VALUE")
    return {key: rest for key, _, rest in (text.partition("=") for text in value)}


def _amount(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """A number that there can be of something, which nan and inf are not."""
    if value is not None and not 1 <= value <= _MOST:
        raise click.BadParameter(f"{value:g} is not a number from 1 to {_MOST:g}")
    return value


@click.command()
@click.option(
    "--images", type=float, callback=_amount, help="Images in the collection, such as 1e9.  [default: as many as the run has]"
)
@click.option("--image-bytes", type=float, callback=_amount, help="Bytes of an image, on average.")
@click.option("--experts", type=click.IntRange(min=1), help="Override partition.experts.")
@click.option("--gpus", type=click.IntRange(0, _MOST_MACHINES), default=0, show_default=True, help="GPUs of all nodes together.")
@click.option("--nodes", type=click.IntRange(1, _MOST_MACHINES), help="Nodes.  [default: one for every eight GPUs]")
@click.option("--cpus", type=click.IntRange(min=1), default=os.cpu_count, help="CPUs of a node.  [default: this machine's]")
@click.option("--calibrate", metavar="ROOT", help="Take unit times from this finished run, of the same networks and machines.")
@click.option(
    "--rate",
    "rates",
    multiple=True,
    callback=_variables,
    metavar="NAME=VALUE",
    help="State a rate or price, such as gpu_price=1.2.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@recipe_options
def plan(as_json: bool, images: float | None, experts: int | None, **options: Any) -> None:
    """Time, GPU-hours, bytes, memory and cost of every stage, by simulating the scheduler; begins nothing."""
    from hardmoe.cli.plan import Asked, show_plan

    words = ("image_bytes", "gpus", "nodes", "cpus", "calibrate", "rates")
    asked = Asked(None if images is None else round(images), *(options.pop(word) for word in words))
    if experts is not None:
        options["overrides"] = (*options["overrides"], f"partition.experts={experts}")
    show_plan(options, asked, as_json)


def _mounts(context: click.Context, parameter: click.Parameter, value: tuple[Path, ...]) -> tuple[Path, ...]:
    """Directories that are the same everywhere, which relative ones are not."""
    if relative := [str(path) for path in value if not path.is_absolute()]:
        raise click.BadParameter(f"'{relative[0]}' is a relative path; write it from the root on, as every node has it")
    return value


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--address", required=True, metavar="URL", help="The cluster's job server: http://head:8265.")
@click.option("--checkout", is_flag=True, help="Also send the files of this checkout that git tracks, at most 20 MiB.")
@click.option(
    "--env",
    "environment",
    multiple=True,
    callback=_variables,
    metavar="KEY=VALUE",
    help="A variable of the job; may be repeated.",
)
@click.option(
    "--shared",
    multiple=True,
    type=click.Path(path_type=Path),
    callback=_mounts,
    metavar="DIR",
    help="Every node mounts this directory at the same place, so the recipe may name paths in it; may be repeated.",
)
@click.option("--ca", type=click.Path(path_type=Path, exists=True), metavar="FILE", help="Certificates to trust, for https.")
@click.option(
    "--resubmit", type=click.IntRange(min=0), default=2, show_default=True, help="How often to go on if the driver dies."
)
@click.option("--detach", is_flag=True, help="Print the job's id and do not wait.")
@click.option("--list", "list_", is_flag=True, help="List the cluster's jobs instead.")
@click.option("--logs", metavar="JOB", help="Print what a job said instead.")
@click.option("--stop", metavar="JOB", help="End a job instead.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def submit(
    context: click.Context, /, command: tuple[str, ...], list_: bool, logs: str | None, stop: str | None, **options: Any
) -> None:
    """Run COMMAND, such as `run -f photos.yaml`, as a job on a Ray cluster; write it behind `--`."""
    if bool([word for word in command if word != "hardmoe"]) + list_ + bool(logs) + bool(stop) != 1:
        raise click.UsageError("give a COMMAND behind '--', or one of --list, --logs JOB and --stop JOB")
    from hardmoe.cli import submit as jobs
    from hardmoe.execution.ray.jobs import JobServer

    group = context.parent.command if context.parent else None
    if command and isinstance(group, click.Group):
        jobs.submit_command(group, command, options)
    elif list_:
        jobs.list_jobs(JobServer(options["address"], options["ca"]))
    elif logs:
        jobs.show_logs(JobServer(options["address"], options["ca"]), logs)
    elif stop:
        jobs.stop_job(JobServer(options["address"], options["ca"]), stop)
