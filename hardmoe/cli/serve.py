"""`hardmoe serve`: a mixture behind HTTP, in this process."""

import ipaddress
import os
import socket
from collections.abc import Mapping
from typing import Any

import click

from hardmoe.cli.common import existing_run
from hardmoe.errors import MissingRecordError, RecipeError

TOKEN_VARIABLE = "HARDMOE_TOKEN"
_BACKLOG = 1024


def serve_run(options: Mapping[str, Any], host: str, port: int, memory_gib: float | None, vectors: str | None) -> None:
    """Serve until interrupted.

    Raises:
        RecipeError: a package is missing, or the server would be open to others without a token.
    """
    try:
        from hardmoe.serving.app import Service, build_app
        from hardmoe.serving.server import make_server
    except ImportError as error:
        raise RecipeError(f"serving needs a package that is missing ({error.name}); pip install 'hardmoe[serve]'") from error
    from hardmoe.mixture import Mixture, UseOptions
    from hardmoe.searching.search import SearchIndex
    from hardmoe.serving.engine import LocalEngine
    from hardmoe.serving.limits import Limits

    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is None and not _is_loopback(host):
        raise RecipeError(
            f"--host {host} lets other machines ask; set the environment variable {TOKEN_VARIABLE} to a secret that they "
            "must send, or serve on 127.0.0.1"
        )
    storage, _ = existing_run(options)
    mixture = Mixture.load(storage.uri, UseOptions(memory_gib=memory_gib))
    try:
        index = SearchIndex.open(vectors or storage.uri, mixture)
    except MissingRecordError as error:
        if vectors is not None:
            raise
        index = None
        click.echo(f"{error}; serving without search", err=True)
    engine, limits = LocalEngine(mixture), Limits()
    server = make_server(build_app(Service(mixture, engine, index, limits, token), engine.close), limits, host, port)
    with _listening(host, port) as place:
        click.echo(f"serving {storage.where()} at http://{host}:{port} (the page, /docs, /metrics); Ctrl-C ends it", err=True)
        server.run(sockets=[place])


def _listening(host: str, port: int) -> socket.socket:
    """A socket at that place; uvicorn, which would make one itself, ends the process where it cannot."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=_BACKLOG)
    except OSError as error:
        raise RecipeError(f"{host}:{port} cannot be listened on ({error.strerror or error}); name another --port") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
