"""The commands that use a finished run: their options. What they do is in modules of their own, which import what is heavy.

Rejected: all commands in one module, which would be past what one reads in a sitting.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from hardmoe.cli.options import accept_versions_option, recipe_options

Command = TypeVar("Command", bound=Callable[..., Any])

_K = 10
_COUNT = 10
_PORT = 8000
_RECALL = 0.95


def bulk_options(command: Command) -> Command:
    """Options of the commands that look at many images."""
    options = [
        click.option(
            "--source",
            "source_path",
            type=click.Path(path_type=Path),
            metavar="RECIPE",
            help="Read the images that the dataset section of this recipe names, from whatever source.",
        ),
        click.option("-o", "--out", help="Directory (path or URI) to write tables to, resumable; without it lines go to stdout."),
        click.option(
            "--format", "kind", type=click.Choice(["parquet", "jsonl"]), help="Of the tables.  [default: parquet]", default=None
        ),
        click.option("--memory-gib", type=click.FloatRange(min=0, min_open=True), help="What experts may take in each process."),
        click.option("--parallel", type=click.IntRange(min=1), help="Start Ray; at most so many shards at a time."),
        click.option("--address", help="Join this Ray cluster."),
        accept_versions_option,
    ]
    for option in reversed(options):
        command = option(command)
    return recipe_options(command)


_COVERAGE = click.option(
    "--coverage",
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    help="Share of images like the validation images to answer; those farther from every centroid get no tags.",
)


@click.command()
@click.argument("images", nargs=-1)
@click.option("-k", "num_tags", type=click.IntRange(min=1), default=_K, show_default=True, help="Tags for each image.")
@_COVERAGE
@bulk_options
def predict(images: tuple[str, ...], num_tags: int, coverage: float | None, **options: Any) -> None:
    """Tags of images: of files and folders, or of any source that a recipe names."""
    from hardmoe.cli.bulk import run_bulk

    run_bulk(options, images, num_tags, coverage)


@click.command()
@click.argument("images", nargs=-1)
@bulk_options
def embed(images: tuple[str, ...], **options: Any) -> None:
    """Places of images in the unified space: of files and folders, or of any source that a recipe names."""
    from hardmoe.cli.bulk import run_bulk

    run_bulk(options, images, None)


_VECTORS = click.option("--vectors", metavar="DIR", help="What 'hardmoe embed --out DIR' wrote, instead of the run's own images.")


@click.command()
@_VECTORS
@click.option("--kind", type=click.Choice(["flat", "ivf", "ivfpq"]), help="Of the index.  [default: by the number of vectors]")
@click.option(
    "--recall",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=_RECALL,
    show_default=True,
    help="Share of the ten nearest that is to be found.",
)
@accept_versions_option
@recipe_options
def index(vectors: str | None, kind: str | None, recall: float, **options: Any) -> None:
    """Index the unified space for 'hardmoe search'; print the recall against exact search."""
    from hardmoe.cli.search import make_index

    make_index(options, vectors, kind, recall)


@click.command()
@click.argument("query")
@_VECTORS
@click.option("-n", "count", type=click.IntRange(min=1), default=_COUNT, show_default=True, help="Images to show.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@recipe_options
def search(query: str, vectors: str | None, count: int, as_json: bool, **options: Any) -> None:
    """The images nearest to QUERY: an image's path or URI, or a hashtag such as '#sunset'."""
    from hardmoe.cli import search as searching

    searching.search(options, query, vectors, count, as_json)


@click.command()
@click.option("-o", "--out", required=True, help="Folder (path or URI) to write.")
@click.option("--onnx", is_flag=True, help="Also ONNX of every piece, checked with ONNX Runtime (pip install 'hardmoe[onnx]').")
@click.option("--programs", is_flag=True, help="Also torch.export programs of every piece with its weights.")
@recipe_options
def export(out: str, onnx: bool, programs: bool, **options: Any) -> None:
    """Write the mixture as a folder that loads without hardmoe: safetensors, graphs, a loader, a model card."""
    from hardmoe.cli.export import export_run

    export_run(options, out, onnx, programs)


@click.command()
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need a token in HARDMOE_TOKEN."
)
@click.option("--port", type=click.IntRange(1, 65535), default=_PORT, show_default=True, help="Port to listen on.")
@click.option(
    "--memory-gib", type=click.FloatRange(min=0, min_open=True), help="What experts may take together, in each process."
)
@click.option(
    "--replicas",
    type=click.IntRange(min=1),
    help="Start Ray; at most so many replicas of the trunk, and as many that hold experts.",
)
@click.option("--address", help="Let replicas on this Ray cluster compute.")
@_COVERAGE
@_VECTORS
@recipe_options
def serve(host: str, port: int, **options: Any) -> None:
    """Serve the mixture over HTTP, with a page to try it, until interrupted."""
    from hardmoe.cli.serve import serve_run

    serve_run(options, host, port)


COMMANDS: list[click.Command] = [predict, embed, index, search, export, serve]
