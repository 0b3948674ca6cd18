"""How a run stands, as one page for people without Grafana: the same lines as `hardmoe status`, for a browser or a web server.

A page that is written again while the run goes on loads itself anew, without any script. Rejected: a server of our own, where
any that serves files will do, and a run in a bucket is looked at from anywhere.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from hardmoe.report.render import page_environment

STATES = ("running", "failed", "damaged", "stopped", "missing", "reused", "done")
_FINISHED = ("done", "reused")
_NUM_OPEN = 40
"""The table of all artifacts is unfolded up to so many."""


@dataclass(frozen=True)
class StatusRow:
    """One artifact, in words."""

    artifact: str
    state: str
    phase: str = ""
    units: str = ""
    share: str = ""
    rate: str = ""
    eta: str = ""
    note: str = ""
    percent: float | None = None
    """Of the present phase, 0 to 100; None where nothing is known."""


def render_status(
    rows: Sequence[StatusRow], title: str, moment: datetime, experts: str | None = None, refresh_seconds: int | None = None
) -> str:
    """Render the page.

    Args:
        rows: every artifact in the order in which they are built.
        title: the run's root, for people to read.
        moment: when the rows were read.
        experts: what there is to say of all experts together.
        refresh_seconds: how often the page is written again; None if it is not.

    Returns:
        A complete HTML document that refers to nothing outside itself.
    """
    counts = Counter(row.state for row in rows)
    return (
        page_environment()
        .get_template("status.html")
        .render(
            title=title,
            headline=_headline(counts),
            counts={state: counts[state] for state in STATES},
            rows=rows,
            current=[row for row in rows if row.state not in (*_FINISHED, "missing")],
            experts=experts,
            moment=f"{moment:%Y-%m-%d %H:%M:%S %Z}",
            refresh_seconds=refresh_seconds,
            num_open=_NUM_OPEN,
        )
    )


def _headline(counts: Counter[str]) -> str:
    done, total = sum(counts[state] for state in _FINISHED), counts.total()
    if bad := counts["failed"] + counts["damaged"]:
        return f"{bad} of {total} artifacts failed"
    if done == total:
        return f"All {total} artifacts are done"
    doing = f", {counts['running']} being built" if counts["running"] else ", nothing is being built"
    return f"{done} of {total} artifacts are done{doing}"
