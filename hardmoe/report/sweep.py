"""The page of a sweep over the number of parts: five charts, one table, what the parts are about. Self-contained.

It is a function of the sweep's records alone (no time, no host), so writing it again changes nothing; it recommends no number.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from hardmoe.report import charts
from hardmoe.report.charts import Bar, Captions, Interval, Profile
from hardmoe.report.formats import format_count, format_percent
from hardmoe.report.render import page_environment

PAGE_PATH = "sweep/index.html"
NUM_OPEN = 16
"""What the parts are about is unfolded up to so many parts."""
NUM_SHOWN = 64
"""Of more parts than this only the largest are shown."""
_X = "parts"


def render_sweep(sweep: Mapping[str, Any], title: str) -> str:
    """Render the page.

    Args:
        sweep: `seeds`, the settings `partition`, `sample`, `columns` (every measure and what it is) and `sweep`, a row for each
            number of parts with the measures' mean, range and values.
        title: the run's root, for people to read.

    Returns:
        A complete HTML document that refers to nothing outside itself.
    """
    rows = sweep["sweep"]
    figures = [chart for chart in (_chart(rows, *each) for each in _CHARTS) if chart is not None]
    return (
        page_environment()
        .get_template("sweep.html")
        .render(
            title=title,
            sweep=sweep,
            strips=_strips(rows),
            figures=figures,
            columns=[(name, *_FORMATS[name], meaning) for name, meaning in sweep["columns"].items()],
            parts=[(row["parts"], _by_size(row)) for row in rows],
            num_open=NUM_OPEN,
        )
    )


def _number(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}".replace("-", "−")


def _significant(value: float) -> str:
    return f"{value:.4g}"


def _percent(value: float) -> str:
    return f"{format_percent(value)}\N{NO-BREAK SPACE}%"


_FORMATS: dict[str, tuple[str, Callable[[float], str]]] = {
    "objective": ("objective", _significant),
    "variance_share": ("of variance", _percent),
    "largest": ("largest / mean", _number(2)),
    "variation": ("variation", _number(2)),
    "agreement": ("agreement", _number(2)),
    "tag_bits": ("tag bits", _number(3)),
    "tag_share": ("of entropy", _percent),
}

_CHARTS: tuple[tuple[str, str, float, tuple[tuple[str, str, int], ...]], ...] = (
    ("What the parts leave of the variance", "% of the variance", 100.0, (("variance_share", "left", 0),)),
    ("How alike the parts of two seeds are", "adjusted Rand index", 1.0, (("agreement", "two seeds", 2),)),
    ("What a part says about a hashtag", "bits per hashtag", 1.0, (("tag_bits", "net", 1), ("tag_chance_bits", "chance", 7))),
    ("How uneven the sizes are", "largest / mean", 1.0, (("largest", "largest", 3),)),
)


def _chart(
    rows: Sequence[Mapping[str, Any]], title: str, label: str, factor: float, measures: Sequence[tuple[str, str, int]]
) -> tuple[str, Markup] | None:
    profiles = []
    for measure, name, style in measures:
        points = [(float(row["parts"]), _interval(row, measure, factor)) for row in rows if row[measure] is not None]
        if points:
            profiles.append(Profile(name, points, style))
    if not profiles:
        return None
    return title, charts.profile_chart(Captions(f"chart-{measures[0][0]}", title, _X, label), profiles)


def _interval(row: Mapping[str, Any], measure: str, factor: float) -> Interval:
    value, low, high = (factor * row[measure][key] for key in ("mean", "low", "high"))
    return Interval(f"{row['parts']} parts", value, low, high, f"{value:.3g} [{low:.3g}, {high:.3g}]")


def _by_size(row: Mapping[str, Any]) -> dict[str, Any]:
    """A number's parts for the page, largest first, with their share of the examples and their hashtags."""
    total, largest = sum(row["sizes"]), max(row["sizes"])
    order = sorted(range(len(row["sizes"])), key=lambda part: (-row["sizes"][part], part))
    shown = [
        {"size": size, "share": size / total, "relative": size / largest, "tags": row["tags"][part]}
        for part in order[:NUM_SHOWN]
        for size in (row["sizes"][part],)
    ]
    return {"shown": shown, "left_out": len(order) - len(shown)}


def _strips(rows: Sequence[Mapping[str, Any]]) -> Markup:
    strips = []
    for row in rows:
        parts, total = _by_size(row)["shown"], sum(row["sizes"])
        bars = [Bar(", ".join(part["tags"]) or "no hashtag", part["size"], _percent(part["share"])) for part in parts]
        if rest := total - sum(part["size"] for part in parts):
            bars.append(Bar("all others together", rest, _percent(rest / total)))
        strips.append((format_count(row["parts"]), bars))
    return charts.strip_chart(Captions("chart-strips", "Sizes of the parts", y_label="parts"), strips)
