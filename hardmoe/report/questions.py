"""What the page says where a recipe asks more: probes of the systems' spaces, and what the mixture is worth if it may refuse."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from hardmoe.report import charts
from hardmoe.report.charts import Captions, Series
from hardmoe.report.schema import ReportData
from hardmoe.report.systems import HEADLINE_METRIC, MIXTURE, SYSTEMS, ordered

PROBES = {
    "linear": ("precision@1", "recall@10"),
    "knn": ("precision@1", "recall@10"),
    "neighbours": ("neighbours@10:all", "neighbours@10:other"),
}
"""Columns of what probes say, by probe."""
RULES = {"distance": "the farthest from every centroid", "probability": "those it is least sure of"}
SHOWN_COVERAGES = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Rows of the table; the chart has all."""
PROBE_NAMES = {"linear": "linear", "knn": "votes", "neighbours": "neighbours"}
COLLECTIONS = {"own_images": "this run's own images", "second_dataset": "the second dataset"}


def probe_tables(data: ReportData) -> list[dict[str, Any]]:
    """Of every collection that was probed: its facts, its columns, the systems' values, the mixture's above theirs."""
    found = []
    for name, title in COLLECTIONS.items():
        if (probed := data["metrics"].get("transfer", {}).get(name)) is None:
            continue
        systems: Mapping[str, Mapping[str, Any]] = probed["systems"]
        columns = [
            (probe, metric) for probe, names in PROBES.items() for metric in names if any(probe in of for of in systems.values())
        ]
        rows = []
        for system in ordered(systems, SYSTEMS):
            difference = probed["differences"].get(f"{MIXTURE} - {system}", {})
            rows.append(
                (
                    system,
                    systems[system]["fitted"],
                    [systems[system].get(probe, {}).get(metric) for probe, metric in columns],
                    [difference.get(probe, {}).get(metric) for probe, metric in columns],
                )
            )
        found.append({"title": title, "probed": probed, "columns": columns, "rows": rows})
    return found


def abstention_chart(data: ReportData) -> Markup | None:
    """Precision@1 of what is answered, against the share of test images that is, for both rules."""
    curve = data["metrics"].get("abstention", {}).get("curve", [])
    series = []
    for style, (rule, name) in enumerate(RULES.items()):
        known = [(point[rule]["answered"]["value"], point[rule][HEADLINE_METRIC]["value"]) for point in curve]
        points = [(100 * answered, 100 * right) for answered, right in known if answered is not None and right is not None]
        series.append(Series(f"refusing {name}", points, style))
    captions = Captions("chart-abstention", "Right among those answered", "test images answered, %", f"{HEADLINE_METRIC}, %")
    return charts.line_chart(captions, series)


def abstention_rows(data: ReportData) -> list[Mapping[str, Any]]:
    """The points of the curve that the table shows."""
    curve = data["metrics"].get("abstention", {}).get("curve", [])
    return [point for point in curve if point["coverage"] in SHOWN_COVERAGES]
