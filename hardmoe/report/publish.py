"""From a finished report artifact and everybody's provenance to `report/index.html`.

The page shows times and hosts, so no record vouches for it; it is written anew whenever it is missing or its data changed.
"""

import json
import math
from collections.abc import Iterable, Sequence
from datetime import datetime

from hardmoe.artifacts.record import PROVENANCE_NAME
from hardmoe.artifacts.store import Artifact
from hardmoe.report.collect import DATA_FILE
from hardmoe.report.render import render_report
from hardmoe.report.schema import ReportData, ReportProvenance, StageTime
from hardmoe.storage import Storage, join

PAGE_PATH = "report/index.html"


def publish_page(storage: Storage, report: Artifact, artifacts: Sequence[Artifact]) -> str:
    """Render the page of a run; returns its storage path."""
    data: ReportData = json.loads(report.storage.read_bytes(report.path(DATA_FILE)))
    page = render_report(data, _provenance(storage, report, artifacts))
    storage.write_bytes(PAGE_PATH, page.encode())
    return PAGE_PATH


def _provenance(storage: Storage, report: Artifact, artifacts: Sequence[Artifact]) -> ReportProvenance:
    own = json.loads(storage.read_bytes(join(report.name, PROVENANCE_NAME)))
    stages: list[StageTime] = []
    for artifact in artifacts:
        body = json.loads(storage.read_bytes(join(artifact.name, PROVENANCE_NAME)))
        units = body.get("num_units", len(body["units"]))
        stages.append({"artifact": artifact.name, "seconds": body["seconds"], "units": units, "started": body["started"]})
    return {
        "title": storage.where(),
        "command": " ".join(["hardmoe", *own["argv"][1:]]),
        "commit": own["commit"],
        "host": own["host"],
        "versions": own["versions"],
        "finished": own["finished"],
        "stages": stages,
        "total_seconds": busy_seconds((stage["started"], stage["seconds"]) for stage in stages),
    }


def busy_seconds(spans: Iterable[tuple[str, float]]) -> float:
    """How long anything at all was at work: what overlaps counts once, pauses between resumed runs not at all.

    Args:
        spans: when something was begun, ISO 8601, and the seconds it took.
    """
    ordered = sorted((datetime.fromisoformat(started).timestamp(), seconds) for started, seconds in spans)
    total, until = 0.0, -math.inf
    for start, seconds in ordered:
        total += max(0.0, start + seconds - max(start, until))
        until = max(until, start + seconds)
    return total
