"""`hardmoe serve`: a mixture behind HTTP, which this process answers; what it computes, this process or replicas on a Ray do."""

import ipaddress
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import click

from hardmoe.cli.common import existing_run
from hardmoe.errors import MissingRecordError, RecipeError

if TYPE_CHECKING:
    from hardmoe.mixture import Mixture
    from hardmoe.searching.search import SearchIndex
    from hardmoe.serving.engine import Engine

TOKEN_VARIABLE = "HARDMOE_TOKEN"
_BACKLOG = 1024
_INTERRUPTED = 130


def serve_run(options: Mapping[str, Any], host: str, port: int) -> None:
    """Serve until interrupted.

    Raises:
        RecipeError: a package is missing, or the server would be open to others without a token.
        BackendError: replicas are asked for, and do not start.
    """
    try:
        from hardmoe.serving.app import Service, build_app
        from hardmoe.serving.server import make_server
    except ImportError as error:
        raise RecipeError(f"serving needs a package that is missing ({error.name}); pip install 'hardmoe[serve]'") from error
    from hardmoe.mixture import Mixture, UseOptions
    from hardmoe.serving.limits import Limits

    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is None and not _is_loopback(host):
        raise RecipeError(
            f"--host {host} lets other machines ask; set the environment variable {TOKEN_VARIABLE} to a secret that they "
            "must send, or serve on 127.0.0.1"
        )
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise RecipeError(
            f"{TOKEN_VARIABLE} has a character that no header can carry, such as a space, a line's end or an accent; "
            "set it to letters and digits, as of 'openssl rand -hex 32'"
        )
    storage, _ = existing_run(options)
    mixture = Mixture.load(storage.uri, UseOptions(memory_gib=options["memory_gib"], coverage=options["coverage"]))
    index, limits = _index(mixture, storage.uri, options["vectors"]), Limits()
    with _listening(host, port) as place, _engine(mixture, options, f"hardmoe-{socket.gethostname()}-{port}") as engine:
        server = make_server(build_app(Service(mixture, engine, index, limits, token)), limits, host, port)
        click.echo(f"serving {storage.where()} at http://{host}:{port} (the page, /docs, /metrics); Ctrl-C ends it", err=True)
        try:
            server.run(sockets=[place])
        except KeyboardInterrupt:
            # Raised by uvicorn when all is answered. To a server this is no interruption that anything could resume after.
            click.echo("\nstopped; what was asked is answered", err=True)
            sys.exit(_INTERRUPTED)


@contextmanager
def _engine(mixture: "Mixture", options: Mapping[str, Any], name: str) -> "Iterator[Engine]":
    """In this process, or replicas on a Ray under a name that is this door's."""
    from hardmoe.serving.engine import LocalEngine

    if options["address"] is None and options["replicas"] is None:
        mixture.warm_up()
        with closing(LocalEngine(mixture)) as engine:
            yield engine
        return
    from hardmoe.serving.ray_app import ReplicaEngine, ReplicaOptions, on_ray

    address = options["address"] or "local"
    click.echo("starting replicas on " + ("a Ray of this machine" if address == "local" else f"the Ray at {address}"), err=True)
    asked = ReplicaOptions(mixture.store.storage.uri, options["replicas"], options["memory_gib"], options["coverage"])
    with on_ray(address, asked, name) as (gates, experts):
        yield ReplicaEngine(mixture, gates, experts)


def _index(mixture: "Mixture", root: str, vectors: str | None) -> "SearchIndex | None":
    """The index that was asked for, or the run's own if it has one."""
    from hardmoe.searching.search import SearchIndex

    try:
        return SearchIndex.open(vectors or root, mixture)
    except MissingRecordError as error:
        if vectors is not None:
            raise
        click.echo(f"{error}; serving without search", err=True)
        return None


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
