"""What a monitoring system is told: right at the reporter, and found again by whoever asks Ray's exporter."""

import json
import re
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import ray
from counting import Run, ScriptedBackend, counting
from test_ray_backend import eventually, scratch_parent

from hardmoe.config import Json
from hardmoe.execution.measures import DESCRIPTIONS, TOTAL, Measure, Measures
from hardmoe.execution.ray.backend import RayBackend
from hardmoe.execution.runner import RunnerOptions
from hardmoe.execution.task import UnitOutcome, UnitTask
from hardmoe.stage import Resources

__all__ = ["scratch_parent"]
DASHBOARD = Path(__file__).parents[3] / "cluster" / "grafana.json"


class Noting(ScriptedBackend):
    """Keeps what it is told last."""

    def publish(self, measures: Mapping[Measure, float]) -> None:
        self.told = {(measure.name, measure.family): value for measure, value in measures.items()}


def test_driver_counts_units_their_bytes_and_those_handed_over_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hardmoe.execution.progress.STATUS_SECONDS", 0.0)
    losses = iter([True])

    def fate(task: UnitTask) -> UnitOutcome | None:
        return UnitOutcome(task, infrastructure="pretended") if task.unit.name == "1" and next(losses, False) else None

    stages = [counting("experts/expert-0001", numbers=(1, 2, 3)), counting("trunk", inputs=["experts/expert-0001"])]
    backend = Noting(fate=fate)
    run = Run(root, stages, RunnerOptions(), backend)
    run.run()
    assert backend.told["hardmoe_units_again_total", "experts"] == 1
    assert backend.told["hardmoe_units_done_total", "experts"] >= 3
    assert backend.told["hardmoe_bytes_stored_total", "experts"] > 0
    assert ("hardmoe_units_failed_total", "experts") not in backend.told
    assert backend.told["hardmoe_units_running", "experts"] == 0


def test_gauges_are_of_what_runs_now() -> None:
    measures, now = Measures(), datetime.now(UTC)

    def said(rate: float, seconds: float) -> dict[str, Json]:
        return {"values": {"examples/s": rate}, "updated": (now - timedelta(seconds=seconds)).isoformat()}

    measures.count("hardmoe_units_done_total", "experts/expert-0000")
    measures.look([("experts/expert-0001", said(100.0, 5)), ("experts/expert-0002", said(50.0, 60)), ("trunk", None)])
    found = measures.values()
    assert found[Measure("hardmoe_units_running", "experts")] == 2
    assert found[Measure("hardmoe_units_running", "trunk")] == 1
    assert found[Measure("hardmoe_examples_per_second", "experts")] == 150.0
    assert 60 <= found[Measure("hardmoe_progress_lag_seconds", "experts")] < 90
    measures.look([])
    later = measures.values()
    assert later[Measure("hardmoe_units_done_total", "experts")] == 1
    assert {value for measure, value in later.items() if not measure.name.endswith(TOTAL)} == {0.0}


@pytest.mark.usefixtures("scratch_parent")
def test_rays_exporter_has_them_under_these_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    backend = RayBackend("local")
    backend.prepare([Resources()])
    try:
        for value in (3.0, 5.0):
            backend.publish({Measure(name, "experts"): value for name in DESCRIPTIONS})
        node = ray.nodes()[0]
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

        def exported() -> dict[str, float]:
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    text = answer.read().decode()
            except OSError:
                return {}
            lines = re.findall(r'^ray_(hardmoe_\w+)\{.*artifacts="experts".*\} (\S+)$', text, re.MULTILINE)
            return {name: float(value) for name, value in lines}

        eventually(lambda: exported() == dict.fromkeys(DESCRIPTIONS, 5.0))
    finally:
        backend.close()


def test_dashboard_asks_for_all_that_is_told_and_nothing_else() -> None:
    board = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\bray_(hardmoe_\w+)", query)}
    assert asked == set(DESCRIPTIONS)
    assert all("ray_hardmoe_" in query for query in queries)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
