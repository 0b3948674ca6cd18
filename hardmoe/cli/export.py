"""`hardmoe export`: a folder that loads without hardmoe."""

from collections.abc import Mapping
from typing import Any

import click

from hardmoe.cli.common import existing_run
from hardmoe.storage import open_storage


def export_run(options: Mapping[str, Any], out: str, onnx: bool, programs: bool) -> None:
    """Write the folder, and say where it is."""
    from hardmoe.export.folder import export_mixture
    from hardmoe.mixture import Mixture, UseOptions

    storage, _ = existing_run(options)
    mixture = Mixture.load(storage.uri, UseOptions(device="cpu"))
    target = open_storage(out)

    def say(name: str) -> None:
        click.echo(f"exporting the {name}", err=True)

    names = export_mixture(mixture, target, onnx=onnx, programs=programs, say=say)
    click.echo(f"{target.where()}: {len(names)} files")
