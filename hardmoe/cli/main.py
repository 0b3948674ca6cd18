"""`hardmoe`: the commands, their options, their exit codes.

Everything heavy is imported inside a command, so `--help` answers at once. Data goes to stdout, progress and errors to
stderr. Exit codes: 0 done; 1 an error of hardmoe's own, one sentence; 2 usage; 3 some units failed, running again resumes;
130 interrupted, by a signal or by `hardmoe stop`.
"""

import signal
import sys
from pathlib import Path
from typing import Any

import click

import hardmoe
from hardmoe.cli import use
from hardmoe.cli.cluster import doctor, plan, submit
from hardmoe.cli.options import accept_versions_option, building_options, recipe_options
from hardmoe.errors import HardmoeError, StoppedError

_SEEDS = 3


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(hardmoe.__version__, prog_name="hardmoe")
def cli() -> None:
    """Train a vision model far larger than one GPU can hold, by splitting the data.

    A trunk embeds the images, k-means partitions them, one expert is trained per part, and one decoder is fitted over all
    experts. Every command does only what is missing; run it again after anything went wrong.
    """


@cli.command()
@click.argument("path", type=click.Path(path_type=Path), default="hardmoe.yaml")
@click.option("--schema", is_flag=True, help="Print the recipe's JSON Schema instead, for editors.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def init(path: Path, schema: bool, force: bool, debug: bool) -> None:
    """Write a commented recipe to PATH (hardmoe.yaml)."""
    from hardmoe.cli.init import json_schema, write_recipe

    click.echo(json_schema() if schema else write_recipe(path, force))


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Numbers of parts, in ascending order, each once."""
    if value is None:
        return None
    try:
        found = sorted({int(word) for word in value.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise click.BadParameter(f"{value!r} is not a list of numbers of parts; write it like 4,8,16")
    return tuple(found)


@cli.command()
@click.option(
    "--sweep",
    "counts",
    callback=_numbers,
    metavar="K,K,...",
    help="Compare these numbers of parts on a sample; build no partition.",
)
@click.option("--seeds", type=click.IntRange(min=1), help="With --sweep: fits for each number of parts.  [default: 3]")
@click.option(
    "--check",
    "other_path",
    type=click.Path(path_type=Path),
    metavar="RECIPE",
    help="Route the dataset of another recipe by this partition, and compare.",
)
@click.option("--json", "as_json", is_flag=True, help="With --sweep or --check: print JSON.")
@building_options
def partition(counts: tuple[int, ...] | None, seeds: int | None, other_path: Path | None, as_json: bool, **options: Any) -> None:
    """Dataset, vocabulary, trunk, features, router, partition: each only if missing."""
    if counts and other_path:
        raise click.UsageError("--sweep and --check are two commands; give one of them")
    if seeds is not None and not counts:
        raise click.UsageError("--seeds goes with --sweep")
    if as_json and not (counts or other_path):
        raise click.UsageError("--json goes with --sweep or --check")
    if counts:
        from hardmoe.cli.sweep import show_sweep

        show_sweep(options, counts, seeds or _SEEDS, as_json)
    elif other_path:
        from hardmoe.cli.drift import show_drift

        show_drift(options, other_path, as_json)
    else:
        from hardmoe.cli.build import build, print_parts

        print_parts(build(options, ["partition"]))


@cli.command("train-experts")
@click.option("--only", multiple=True, metavar="EXPERT", help="Train only this expert, such as expert-0007; may be repeated.")
@building_options
def train_experts(only: tuple[str, ...], **options: Any) -> None:
    """Train one expert per part, at most --parallel at a time."""
    from hardmoe.cli.build import build, print_experts

    print_experts(build(options, ["experts"], only))


@cli.command("fit-decoder")
@building_options
def fit_decoder(**options: Any) -> None:
    """Cache the experts' embeddings, then fit the shared decoder."""
    from hardmoe.cli.build import build, print_decoder

    print_decoder(build(options, ["decoder"]))


def _expert_counts(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Numbers of experts of an item, in ascending order, each once."""
    if value is None:
        return None
    words = value.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise click.BadParameter(f"{value!r} is not a list of numbers of experts; write it like 1,2,4")
    return tuple(sorted({int(word) for word in words}))


def _factors(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """Capacity factors in ascending order, each once."""
    if value is None:
        return None
    try:
        found = sorted({float(word) for word in value.split(",")})
    except ValueError:
        found = [-1.0]
    if not 0 <= found[0] <= found[-1] < float("inf"):
        raise click.BadParameter(f"{value!r} is not a list of capacity factors; write it like 0.25,0.5,1")
    return tuple(found)


@cli.command()
@click.option(
    "--sweep-k",
    "counts",
    callback=_expert_counts,
    metavar="K,K,...",
    help="Judge networks with layers of experts with so many experts an item; no other evaluation.",
)
@click.option(
    "--sweep-capacity",
    "factors",
    callback=_factors,
    metavar="C,C,...",
    help="Judge them with such capacity factors, 0 for no limit; no other evaluation.",
)
@click.option(
    "--priority/--no-priority", default=None, help="With a sweep: give slots by priority, or in order.  [default: as trained]"
)
@building_options
def evaluate(counts: tuple[int, ...] | None, factors: tuple[float, ...] | None, priority: bool | None, **options: Any) -> None:
    """Measure the mixture and its controls on the test split."""
    if counts or factors:
        from hardmoe.cli.moe_sweep import show_moe_sweep

        show_moe_sweep(options, counts or (), factors or (), priority)
        return
    if priority is not None:
        raise click.UsageError("--priority and --no-priority go with --sweep-k or --sweep-capacity")
    from hardmoe.cli.build import build, print_metrics

    print_metrics(build(options, ["evaluation"]))


@cli.command()
@building_options
def distil(**options: Any) -> None:
    """Train one dense network on what the mixture says, and measure it beside the mixture."""
    from hardmoe.cli.distil import show_distilled

    show_distilled(options)


@cli.command()
@click.argument("roots", nargs=-1, metavar="[ROOT]...")
@click.option(
    "--compare", "is_comparison", is_flag=True, help="Put the finished runs in these roots side by side; builds nothing."
)
@click.option("--against", metavar="[RUN:]SYSTEM", help="With --compare: what differences are held against.  [default: mixture]")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="With --compare: the page.  [default: compare.html]")
@click.option("--json", "as_json", is_flag=True, help="With --compare: print JSON.")
@building_options
def report(
    roots: tuple[str, ...], is_comparison: bool, against: str | None, out: Path | None, as_json: bool, **options: Any
) -> None:
    """Write one self-contained HTML page about the run, or with --compare about several finished ones."""
    if is_comparison:
        from hardmoe.cli.compare import check_options, compare_runs

        check_options(roots, options)
        compare_runs(roots, against, out or Path("compare.html"), as_json)
        return
    if roots or against or out or as_json:
        raise click.UsageError("ROOT, --against, --out and --json go with --compare")
    from hardmoe.cli.build import build, publish

    click.echo(publish(build(options, ["report"])))


@cli.command()
@click.option("--dry-run", is_flag=True, help="Print what would be built, and build nothing.")
@building_options
def run(dry_run: bool, **options: Any) -> None:
    """Everything: from the images to the report."""
    from hardmoe.cli.build import build, print_metrics, print_plan, publish

    if dry_run:
        print_plan(options)
        return
    built = build(options, ["report"])
    print_metrics(built)
    click.echo(f"\nreport: {publish(built)}")


@cli.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.option("--only", multiple=True, metavar="LINE", help="Run only this line, and the first; may be repeated.")
@click.option("--dry-run", is_flag=True, help="Print what each run would build, and build nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key in every line.")
@click.option("--parallel", type=click.IntRange(min=1), help="At most so many units at a time.")
@click.option("--backend", type=click.Choice(["ray", "inline"]), help="Override execution.backend.")
@click.option("--address", help="Override execution.address: 'local', or a running Ray cluster's.")
@accept_versions_option
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def sweep(study: Path, only: tuple[str, ...], dry_run: bool, as_json: bool, **options: Any) -> None:
    """Run the lines of STUDY, variations of one recipe, each with every seed; print one table of all."""
    from hardmoe.cli.study import run_study

    run_study(study, options, only, dry_run, as_json)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@building_options
def detection(as_json: bool, **options: Any) -> None:
    """Train detectors with and without experts in their heads on canvases of a source's images, and compare them."""
    from hardmoe.cli.detection import run_detection

    run_detection(options, as_json)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--watch", is_flag=True, help="Refresh every two seconds until nothing is running.")
@click.option(
    "--html", "page", type=click.Path(path_type=Path), metavar="FILE", help="Write a page in place of printing; see --watch."
)
@recipe_options
def status(as_json: bool, watch: bool, page: Path | None, **options: Any) -> None:
    """Show every artifact: state, units done, rate, ETA, failures."""
    from hardmoe.cli.inspect import show_status

    if as_json and page is not None:
        raise click.UsageError("--json prints and --html writes a page; give one of them")
    show_status(options, as_json, watch, page)


@cli.command()
@click.argument("name", required=False)
@click.option("--failed", is_flag=True, help="Only units that failed.")
@recipe_options
def logs(name: str | None, failed: bool, **options: Any) -> None:
    """Print what the units of artifact NAME said, such as expert-0007; without NAME, list what there is."""
    from hardmoe.cli.inspect import show_logs

    show_logs(options, name, failed)


@cli.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print record and provenance as JSON.")
@recipe_options
def show(name: str, as_json: bool, **options: Any) -> None:
    """Show the record of artifact NAME: what it was built from, and what came of it."""
    from hardmoe.cli.inspect import show_artifact

    show_artifact(options, name, as_json)


@cli.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--images", is_flag=True, help="Also read every image that a dataset refers to and does not hold (dataset.store).")
@recipe_options
def verify(names: tuple[str, ...], images: bool, **options: Any) -> None:
    """Hash again every file that the records vouch for, of all artifacts or of those named."""
    from hardmoe.cli.verify import verify_artifacts

    verify_artifacts(options, names, images)


@cli.command()
@click.option(
    "--timeout", "seconds", type=click.FloatRange(min=0), default=300.0, show_default=True, help="Seconds to wait for the end."
)
@recipe_options
def stop(seconds: float, **options: Any) -> None:
    """Ask every command at work in this root, on whatever machine, to make checkpoints and end; wait until it has."""
    from hardmoe.cli.stop import stop_run

    stop_run(options, seconds)


@cli.group()
def bench() -> None:
    """Measure what this machine can do with a recipe; builds nothing."""


@bench.command("data")
@click.option("--rows", type=click.IntRange(min=1), default=2000, show_default=True, help="Images to measure with.")
@click.option("--seconds", type=click.FloatRange(min=0.01), default=2.0, show_default=True, help="Least time of each step.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@recipe_options
def bench_data(rows: int, seconds: float, as_json: bool, **options: Any) -> None:
    """Reading, decoding, resizing, transfer, network: what each could do alone, and which one the others wait for."""
    from hardmoe.cli.bench import bench_data

    bench_data(options, rows, seconds, as_json)


for command in (*use.COMMANDS, doctor, plan, submit):
    cli.add_command(command)


def main() -> None:
    """Run the command line; turns errors into one sentence and an exit code."""
    # A job scheduler's SIGTERM is an interruption like Ctrl-C: leases are released, Ray is stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    debug = "--debug" in sys.argv
    try:
        cli.main(prog_name="hardmoe", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; running the command again resumes", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # `hardmoe show … | head` is no error; nothing more can be said on a closed stdout.
        sys.stderr.close()
        sys.exit(0)
    except StoppedError as end:
        click.echo(str(end), err=True)
        sys.exit(end.exit_code)
    except HardmoeError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
