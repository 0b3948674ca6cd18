"""The page of `hardmoe report --compare`: several finished runs side by side. Self-contained.

It is a function of what was gathered from the runs' records, so writing it again changes nothing. Systems of one name stand
together across runs, since that is what is compared. Rejected: a best value marked in every column, which of many runs is the
luckiest one; whether a difference is more than chance, its interval says.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from hardmoe.report import charts
from hardmoe.report.charts import Captions, Interval, Profile
from hardmoe.report.formats import format_large, format_percent, format_points
from hardmoe.report.render import METRICS, page_environment
from hardmoe.report.systems import HEADLINE_METRIC, SYSTEMS, ordered

_UNITS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"), (1.0, "FLOP"))
_COSTS = (("flops", "in use", "an image"), ("training_flops", "of training", "of training"))


def render_comparison(comparison: Mapping[str, Any]) -> str:
    """Render the page.

    Args:
        comparison: `runs` (each with `name`, `root`, `systems`, of which each has `metrics`, `cost` and a `difference`, and
            `num_experts`, `gain`), `against` and `test_sets`, as `hardmoe report --compare --json` prints it.

    Returns:
        A complete HTML document that refers to nothing outside itself.
    """
    runs, chosen = comparison["runs"], comparison["against"]
    metrics = ordered({name for run in runs for told in run["systems"].values() for name in told["metrics"]}, METRICS)
    rows = [(run, system, run["systems"][system]) for run in runs for system in ordered(run["systems"], SYSTEMS)]
    return (
        page_environment()
        .get_template("compare.html")
        .render(
            title=", ".join(run["name"] for run in runs),
            runs=runs,
            rows=rows,
            chosen=chosen,
            test_sets=comparison["test_sets"],
            metrics=metrics,
            compared=[name for name in metrics if any(name in _differences(told) for _, _, told in rows)],
            meanings=METRICS,
            systems=SYSTEMS,
            headline=_headline(runs, rows),
            figures=_system_figures(runs),
            differences=_difference_chart(rows, chosen),
            costs=[chart for chart in (_cost_chart(runs, *each) for each in _COSTS) if chart is not None],
            gains=_gain_chart(runs),
        )
    )


def _headline(runs: Sequence[Mapping[str, Any]], rows: Sequence[Any]) -> str:
    told = "One run" if len(runs) == 1 else f"{len(runs)} runs"
    return f"{told}, {len(rows)} systems, side by side"


def _differences(told: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = told.get("difference", {}).get("metrics", {})
    return found


def _interval(name: str, metric: Mapping[str, Any], style: int | None, text: str) -> Interval:
    value = 100 * metric["value"]
    low, high = (value if metric[key] is None else 100 * metric[key] for key in ("low", "high"))
    return Interval(name, value, low, high, text, style)


def _system_figures(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    """A chart of the headline metric for every system that several runs have, and one of all others."""
    values: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for run in runs:
        for system, told in run["systems"].items():
            if told["metrics"].get(HEADLINE_METRIC, {}).get("value") is not None:
                values.setdefault(system, []).append((run["name"], told["metrics"][HEADLINE_METRIC]))
    several = [system for system in ordered(values, SYSTEMS) if len(values[system]) > 1]
    groups = [(system, values[system]) for system in several]
    alone = [system for system in ordered(values, SYSTEMS) if system not in several]
    if alone:
        where = "systems of one run" if several else "every system"
        named = [
            (f"{name}: {system}" if len(runs) > 1 else system, metric) for system in alone for name, metric in values[system]
        ]
        groups.append((where, named))
    found = []
    for number, (title, members) in enumerate(groups):
        intervals = [_interval(name, metric, None, format_percent(metric["value"])) for name, metric in members]
        captions = Captions(f"chart-system-{number}", title, f"{HEADLINE_METRIC}, %", note="In per cent.")
        found.append((title, charts.interval_chart(captions, intervals)))
    return found


def _difference_chart(
    rows: Sequence[tuple[Mapping[str, Any], str, Mapping[str, Any]]], chosen: Mapping[str, str]
) -> Markup | None:
    """Paired differences in the headline metric; unpaired ones have no interval and are in the table alone."""
    intervals = []
    for run, system, told in rows:
        metric = _differences(told).get(HEADLINE_METRIC)
        if metric is not None and metric["value"] is not None and metric["low"] is not None:
            text = format_points(metric["value"])
            intervals.append(_interval(f"{run['name']}: {system}", metric, 0 if system == chosen["system"] else None, text))
    captions = Captions("chart-differences", f"Paired differences in {HEADLINE_METRIC}", "points", note="In percentage points.")
    return charts.interval_chart(captions, intervals, zero=True) if intervals else None


def _gain_chart(runs: Sequence[Mapping[str, Any]]) -> Markup | None:
    """What a mixture gains over its own run's control against the images it was shown, a line for every number of experts.

    None where there are no two such runs.
    """
    lines: dict[int, dict[int, Interval]] = {}
    for run in runs:
        cost = run["systems"].get("mixture", {}).get("cost")
        if run["gain"] is not None and run["gain"]["low"] is not None and cost and cost["images_seen"]:
            # Of runs with the same schedule and number of experts the last one named stands for all.
            text = f"{format_points(run['gain']['value'])} after {cost['images_seen']:,} images"
            point = _interval(run["name"], run["gain"], None, text)
            lines.setdefault(run["num_experts"], {})[cost["images_seen"]] = point
    if sum(map(len, lines.values())) <= 1:
        return None
    profiles = [
        Profile(
            f"{count} experts", [(float(f"{seen / 1e6:.3g}"), line[seen]) for seen in sorted(line)], style % charts.NUM_STYLES
        )
        for style, (count, line) in enumerate(sorted(lines.items()))
    ]
    captions = Captions("chart-gains", "What the mixture gains", "million images shown, the trunk's included", "points")
    return charts.profile_chart(captions, profiles)


def _cost_chart(runs: Sequence[Mapping[str, Any]], key: str, name: str, of: str) -> tuple[str, Markup] | None:
    """The headline metric against operations, a colour for every run."""
    counts = [told["cost"][key] for run in runs for told in run["systems"].values() if told["cost"]]
    if not any(counts):
        return None
    divisor, unit = next((size, unit) for size, unit in _UNITS if max(counts) >= size)
    profiles = []
    for style, run in enumerate(runs):
        points = []
        for system, told in run["systems"].items():
            metric = told["metrics"].get(HEADLINE_METRIC)
            # What cost nothing has no place on a logarithmic axis.
            if told["cost"] and told["cost"][key] and metric is not None and metric["value"] is not None:
                text = f"{format_percent(metric['value'])} % at {format_large(told['cost'][key])}"
                points.append(
                    (float(f"{told['cost'][key] / divisor:.3g}"), _interval(f"{run['name']}: {system}", metric, None, text))
                )
        if points:
            profiles.append(Profile(run["name"], sorted(points, key=lambda point: point[0]), style % charts.NUM_STYLES))
    if not profiles:
        return None
    title = f"{HEADLINE_METRIC} against operations {name}"
    captions = Captions(f"chart-{key.replace('_', '-')}", title, f"{unit} {of}", f"{HEADLINE_METRIC}, %")
    return title, charts.profile_chart(captions, profiles, joined=False)
