"""The page of a detection run: precision by size, which expert takes which sizes, canvases with what was found. Self-contained.

It is a function of the results alone (no time, no host), so writing it again changes nothing. Boxes are drawn as SVG over the
picture, so that they stay sharp and can be told apart in print. Rejected: pictures with boxes painted in.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from hardmoe.report import charts
from hardmoe.report.charts import Captions, Interval
from hardmoe.report.formats import format_percent, format_points
from hardmoe.report.render import page_environment

PAGE_PATH = "detection/index.html"
NAMES = {"all": "all sizes", "small": "small", "medium": "medium", "large": "large"}
SYSTEMS = {
    "baseline": "trained from nothing, backbone and all",
    "dense": "its heads trained on, backbone frozen: the control",
    "regression": "experts in the head of boxes",
    "classification": "experts in the head of classes",
    "both": "experts in both heads",
}
_CONTROL = "dense"


def render_detection(results: Mapping[str, Any], title: str) -> str:
    """Render the page.

    Args:
        results: `set`, `sizes`, `systems` (each with `ap`, `experts`, `training`), `differences`, `canvases`, `shown`.
        title: the run's root, for people to read.

    Returns:
        A complete HTML document that refers to nothing outside itself.
    """
    shown = list(results["systems"])[-1]
    return (
        page_environment()
        .get_template("detection.html")
        .render(
            title=title,
            results=results,
            names=NAMES,
            meanings=SYSTEMS,
            headline=headline(results["differences"]),
            figures=[_chart(results["systems"], name) for name in NAMES],
            heads=_heads(results["systems"]),
            ranges=[
                (name, f"{low} to {high} pixels") for name, (low, high) in zip(list(NAMES)[1:], results["sizes"], strict=True)
            ],
            size=results["set"]["size"],
            shown=shown,
            canvases=[(canvas, found) for canvas, found in zip(results["canvases"], results["shown"][shown], strict=False)],
            classes=results["set"]["classes"],
        )
    )


def headline(differences: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether experts in a head did better or worse than the control, by the intervals of the paired differences alone."""
    said = []
    for pair, told in differences.items():
        system, found = pair.split(" - ")[0], told["all"]
        if found["value"] is None or found["low"] is None:
            continue
        word = "better" if found["low"] > 0 else "worse" if found["high"] < 0 else None
        by = f"{format_points(found['value'])} points"
        said.append(f"{system} is {word} by {by}" if word else f"{system} shows no difference ({by})")
    return f"Experts in heads against the dense control: {'; '.join(said)}." if said else "Nothing to compare."


def _chart(systems: Mapping[str, Any], name: str) -> tuple[str, Markup]:
    rows = []
    for system, told in systems.items():
        found = told["ap"][name]
        if found["value"] is None:
            continue
        low, high = (found["value"] if found[key] is None else found[key] for key in ("low", "high"))
        style = 1 if system == _CONTROL else None if system == "baseline" else 0
        rows.append(Interval(system, 100 * found["value"], 100 * low, 100 * high, format_percent(found["value"]), style))
    title = f"Objects of {NAMES[name]}" if name == "all" else f"{NAMES[name].capitalize()} objects"
    return title, charts.interval_chart(Captions(f"chart-{name}", title, "average precision at 0.5, %"), rows)


def _heads(systems: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every head with experts, as the page shows it."""
    return [
        {
            "system": system,
            "head": head,
            "by_range": list(zip(list(NAMES)[1:], facts["by_range"], strict=True)),
            "by_level": list(zip(_LEVELS, facts["by_level"], strict=True)),
            "usage": facts["usage"],
            "num_experts": len(facts["by_range"][0]),
            "sentence": _sentence(facts["by_range"]),
        }
        for system, told in systems.items()
        for head, facts in told["experts"].items()
    ]


_LEVELS = ("stride 8", "stride 16", "stride 32")


def _sentence(by_range: Sequence[Sequence[float]]) -> str:
    """Who takes most of what."""
    parts = []
    for name, shares in zip(list(NAMES)[1:], by_range, strict=True):
        if (best := max(shares)) > 0:
            parts.append(f"{name} objects go most to expert {shares.index(best)} ({format_percent(best, 0)} %)")
    return (parts[0][:1].upper() + "; ".join(parts)[1:] + ".") if parts else "No objects."
