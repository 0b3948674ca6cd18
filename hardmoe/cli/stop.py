"""The command that ends a run from another shell: it leaves a request in the root and watches the leases go."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

import click

from hardmoe.artifacts.lease import LEASE_NAME, Holder, lease_holder
from hardmoe.cli.begun import begun_run
from hardmoe.errors import LeaseError
from hardmoe.execution.stopping import POLL_SECONDS, request_stop
from hardmoe.storage import Storage

_LOOK_SECONDS = 1.0
_QUIET_SECONDS = 2.5 * POLL_SECONDS
"""So long nobody holds a lease before it is over: a driver that waited for one may take it just before it sees the request."""


def stop_run(options: Mapping[str, Any], seconds: float) -> None:
    """Ask, and wait until every lease is given back.

    Raises:
        LeaseError: some were not in time; names their holders.
    """
    storage = begun_run(options).storage
    if not (held := _held(storage)):
        # Between two stages nobody holds a lease for a moment: only the second such look in a row says that nothing runs.
        time.sleep(_LOOK_SECONDS)
        held = _held(storage)
    if not held:
        click.echo(f"nothing is running in {storage.where()}")
        return
    request_stop(storage)
    click.echo("asked to stop: " + _told(held), err=True)
    seen, give_up, quiet_since = dict(held), time.monotonic() + seconds, time.monotonic()
    while time.monotonic() - quiet_since < _QUIET_SECONDS:
        # All of a large root is only listed once none is left of the leases that are known.
        if held := _held_of(storage, held) or _held(storage):
            seen |= held
            quiet_since = time.monotonic()
            if quiet_since >= give_up:
                at_work = _told(held | _held(storage))
                raise LeaseError(
                    f"after {seconds:g} seconds still at work: {at_work}; the request stands, ask again to wait on, or end "
                    "the process itself (a lease of a machine that is gone is taken over by the next run)"
                )
        time.sleep(_LOOK_SECONDS)
    click.echo(f"stopped: {_told(seen)}; the same command resumes")


def _held(storage: Storage) -> dict[str, Holder]:
    """Artifacts of this root that somebody is building, and who. One listing: a sweep's are in no recipe."""
    suffix = f"/{LEASE_NAME}"
    return _held_of(storage, sorted(path.removesuffix(suffix) for path in storage.list("") if path.endswith(suffix)))


def _held_of(storage: Storage, names: Iterable[str]) -> dict[str, Holder]:
    """Those of these artifacts that somebody is building, and who."""
    found = {name: lease_holder(storage, name) for name in names}
    return {name: holder for name, holder in found.items() if holder is not None}


def _told(held: Mapping[str, Holder]) -> str:
    by_holder: dict[str, list[str]] = {}
    for name, holder in held.items():
        by_holder.setdefault(str(holder), []).append(name)
    return "; ".join(f"{holder} ({', '.join(names)})" for holder, names in by_holder.items())
