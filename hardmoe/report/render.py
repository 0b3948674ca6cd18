"""From the report's data to one HTML page that needs nothing beside itself.

Python prepares (groups, sorts, words the result), Jinja2 lays out with autoescape on, since tags, names and reasons are the
user's data, and a content security policy in the page forbids every request even if something slipped through. The
headline is worded from the paired difference `mixture - dense_refit` and its interval alone: where the interval contains
zero the page says that no difference was shown. Rejected: comparing the two systems' own intervals, which overlap long
before a paired difference vanishes.

Shape letters: K experts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hardmoe.artifacts.names import DENSE, expert_name, is_of_the_mixture
from hardmoe.report import charts
from hardmoe.report.charts import Bar, Captions, Interval, Series
from hardmoe.report.collect import curve_name
from hardmoe.report.formats import format_count, format_duration, format_large, format_percent, format_points, format_time
from hardmoe.report.parts import describe_partition, distance_chart, fit_chart
from hardmoe.report.questions import PROBE_NAMES, RULES, abstention_chart, abstention_rows, probe_tables
from hardmoe.report.schema import (
    Breakdown,
    Cost,
    CurvePoint,
    Exemplar,
    FrequencyBand,
    Metric,
    Network,
    Part,
    ReportData,
    ReportProvenance,
    StageTime,
)
from hardmoe.report.systems import CONTROL, HEADLINE_METRIC, MIXTURE, SYSTEMS, ordered

METRICS = {
    "precision@1": "share of images whose first predicted tag is right",
    "precision@5": "share of right tags among the first 5",
    "precision@10": "share of right tags among the first 10",
    "recall@10": "share of all true tags found among the first 10",
    "hit@1": "share of images with a right tag at rank 1",
    "hit@5": "share of images with a right tag among the first 5",
    "map": "mean over tags of the average precision",
}
NEIGHBOURS = {
    "neighbours@10:all": "among all test images",
    "neighbours@10:own": "among those of the image's own part",
    "neighbours@10:other": "among those of other parts",
}
COMPARISON = f"{MIXTURE} - {CONTROL}"
NUM_VISIBLE_IMAGES = NUM_OPEN_GALLERIES = 8
"""Cards beyond this many keep the rest of their images folded away, so a page of 64 experts can still be leafed through."""
MOSAIC_SIZE = 64
MAX_INDEX_BESIDE = 16
"""An index of more experts than this takes the whole width below the chart of sizes."""

_EXPERT = re.compile(r"^(?P<family>.*?)[-/_]?expert-\d+$")


@dataclass(frozen=True)
class Headline:
    """The result in words; `verdict` is better, worse, same or unknown."""

    verdict: str
    sentence: str
    detail: str
    difference: Metric | None


def image_title(exemplar: Exemplar) -> str:
    """What the pointer shows over an image: its id, its distance and, on the border, the other expert."""
    text = f"{exemplar['example_id']} · distance {exemplar['distance']:.3g}"
    if "second" in exemplar:
        text += f" · second nearest: expert {exemplar['second']}"
    return text + (f" · ratio {exemplar['ratio']:.3f}" if "ratio" in exemplar else "")


def image_uri(exemplar: Exemplar) -> str:
    """The image's data URI.

    Raises:
        ValueError: the image is an address of another kind, so the page would not be self-contained.
    """
    if not exemplar["image"].startswith("data:image/"):
        raise ValueError(f"the image of example {exemplar['example_id']} is {exemplar['image'][:40]!r}, not a data:image/ URI")
    return exemplar["image"]


def write_headline(data: ReportData) -> Headline:
    """Word the result of the run, whichever way it went."""
    systems, metrics = data["metrics"]["systems"], data["metrics"]
    difference = metrics["differences"].get(COMPARISON, {}).get(HEADLINE_METRIC)
    mixture, control = (systems.get(name, {}).get(HEADLINE_METRIC, Metric(value=None))["value"] for name in (MIXTURE, CONTROL))
    value, low, high = (None, None, None) if difference is None else _bounds(difference)
    images = format_count(metrics["num_test_examples"])
    if value is None or low is None or high is None or mixture is None or control is None:
        right = f" The mixture's first tag is right for {format_percent(mixture)} % of {images} test images."
        achieved = "" if mixture is None else right
        detail = f"It holds no paired difference between {MIXTURE} and {CONTROL} with an interval.{achieved}"
        return Headline("unknown", "This run does not compare the mixture with a dense control.", detail, None)
    shares = f"{format_percent(mixture)}\N{NO-BREAK SPACE}% of test images, against {format_percent(control)}\N{NO-BREAK SPACE}%"
    verdict, sentence = "same", f"No difference shown between the mixture and its dense control: first tag right for {shares}."
    if low > 0:
        verdict, sentence = "better", f"The mixture does better than its dense control: first tag right for {shares}."
    elif high < 0:
        verdict, sentence = "worse", f"The mixture does worse than its dense control: first tag right for {shares}."
    contains = " and contains zero" if verdict == "same" else ""
    detail = (
        f"The difference in {HEADLINE_METRIC} is {format_points(value)} percentage points; its 95 % interval runs from "
        f"{format_points(low)} to {format_points(high)}{contains} ({images} test images, paired bootstrap). The control, "
        f"{CONTROL}, is one dense network that saw {_dense_cost(data['networks'])}, "
        "with its decoder refitted as the mixture's is."
    )
    return Headline(verdict, sentence, detail, difference)


def _dense_cost(networks: Sequence[Network]) -> str:
    """What the dense baseline saw beside the experts, who may have stopped early or repeated more images."""
    dense = sum(network["examples_seen"] for network in networks if network["name"] == DENSE)
    experts = sum(network["examples_seen"] for network in networks if is_of_the_mixture(network["name"]))
    if dense == experts:
        return "as many images in total"
    return f"{format_count(dense)} images in total where the experts together saw {format_count(experts)}"


def _bounds(metric: Metric) -> tuple[float | None, float | None, float | None]:
    return metric["value"], metric.get("low"), metric.get("high")


def _verdict(metric: Metric) -> str:
    _, low, high = _bounds(metric)
    if low is None or high is None:
        return "not known"
    return "better" if low > 0 else "worse" if high < 0 else "no difference"


def metric_table(data: ReportData) -> dict[str, Any]:
    """Rows, columns, the systems with the best value of every column, and the reasons of the values that are missing."""
    systems = data["metrics"]["systems"]
    names = ordered({name for values in systems.values() for name in values}, METRICS)
    best: dict[str, set[str]] = {}
    missing: dict[str, list[str]] = {}
    for name in names:
        found = {system: values[name]["value"] for system, values in systems.items() if name in values}
        known = {system: value for system, value in found.items() if value is not None}
        best[name] = {system for system, value in known.items() if value == max(known.values())} if len(known) > 1 else set()
        for system in found.keys() - known.keys():
            reason = systems[system][name].get("reason") or "no reason given"
            missing.setdefault(f"{name}: {reason}", []).append(system)
    rows = [(system, SYSTEMS.get(system, ""), systems[system]) for system in ordered(systems, SYSTEMS)]
    return {"names": names, "rows": rows, "best": best, "missing": {key: sorted(value) for key, value in sorted(missing.items())}}


def breakdown_rows(data: ReportData) -> tuple[list[FrequencyBand], list[tuple[str, Breakdown]]]:
    """The bands of hashtags, which are the same for all systems, and the systems with theirs."""
    found = data["metrics"].get("breakdown", {})
    bands = next(iter(found.values()))["frequency_bands"] if found else []
    return bands, [(system, found[system]) for system in ordered(found, SYSTEMS)]


def cost_rows(data: ReportData) -> list[tuple[str, Cost, float | None]]:
    """Systems with their costs, and the operations of their training as a multiple of the control's."""
    costs = data["metrics"].get("costs", {})
    control = costs.get(CONTROL)
    return [
        (system, costs[system], costs[system]["training_flops"] / control["training_flops"] if control else None)
        for system in ordered(costs, SYSTEMS)
    ]


def retrieval_rows(data: ReportData) -> list[tuple[str, Mapping[str, Metric], Mapping[str, Metric]]]:
    """Systems with the shares of right neighbours in their spaces, and what the mixture's are above them."""
    shares, differences = data["metrics"].get("retrieval", {}), data["metrics"].get("retrieval_differences", {})
    return [(name, shares[name], differences.get(f"{MIXTURE} - {name}", {})) for name in ordered(shares, SYSTEMS)]


def _system_chart(data: ReportData) -> Markup | None:
    rows = []
    for system in ordered(data["metrics"]["systems"], SYSTEMS):
        value, low, high = _bounds(data["metrics"]["systems"][system].get(HEADLINE_METRIC, Metric(value=None)))
        if value is not None:
            style = {MIXTURE: 0, CONTROL: 1}.get(system)
            low, high = value if low is None else low, value if high is None else high
            rows.append(Interval(system, 100 * value, 100 * low, 100 * high, format_percent(value), style))
    captions = Captions("chart-systems", "precision@1 of every system", f"{HEADLINE_METRIC}, %", note="In per cent.")
    return charts.interval_chart(captions, rows) if rows else None


def _difference_chart(data: ReportData) -> Markup | None:
    rows = []
    for name in sorted(data["metrics"]["differences"], key=lambda key: (key != COMPARISON, key)):
        value, low, high = _bounds(data["metrics"]["differences"][name].get(HEADLINE_METRIC, Metric(value=None)))
        if value is not None and low is not None and high is not None:
            style = 0 if name == COMPARISON else None
            rows.append(Interval(name.replace(" - ", " − "), 100 * value, 100 * low, 100 * high, format_points(value), style))
    captions = Captions("chart-differences", "Paired differences in precision@1", f"difference in {HEADLINE_METRIC}, points")
    return charts.interval_chart(captions, rows, zero=True) if rows else None


def describe_sizes(parts: Sequence[Part]) -> list[tuple[str, str]]:
    """The equal share, the largest and the smallest part, in words."""
    if not parts:
        return []
    share = sum(part["sizes"]["train"] for part in parts) / len(parts)
    facts = [("an equal share", f"{round(share):,}")]
    by_size = sorted(parts, key=lambda part: part["sizes"]["train"])
    for word, part in (("largest part", by_size[-1]), ("smallest part", by_size[0])):
        size = part["sizes"]["train"]
        facts.append((word, f"expert {part['expert']}: {size:,}" + (f" (×{size / share:.2f})" if share else "")))
    return facts


def pick_mosaic(parts: Sequence[Part]) -> list[Exemplar]:
    """Typical images for the page's head, at most `MOSAIC_SIZE`, the same number of every expert, expert by expert."""
    each = max(1, MOSAIC_SIZE // max(len(parts), 1))
    return [exemplar for part in parts for exemplar in part["typical"][:each]][:MOSAIC_SIZE]


def _size_chart(parts: Sequence[Part]) -> Markup | None:
    if not parts:
        return None
    columns = [Bar(str(part["expert"]), part["sizes"]["train"], format_count(part["sizes"]["train"])) for part in parts]
    captions = Captions("chart-sizes", "Training images of every part", "expert", "training images")
    return charts.column_chart(captions, columns, (sum(column.value for column in columns) / len(columns), "an equal share"))


def _lines(curves: Mapping[str, Sequence[CurvePoint]], names: Sequence[str], key: str, factor: float) -> list[Series]:
    """One series per network; beyond eight all are quiet but the two that end lowest and highest."""
    values = {
        name: [(float(point["examples"]), factor * point[key]) for point in curves[name] if point.get(key) is not None]  # type: ignore[literal-required]
        for name in names
    }
    named = [name for name in names if values[name]]
    if len(named) <= charts.NUM_STYLES:
        return [Series(name, values[name], style) for style, name in enumerate(named)]
    by_end = sorted(named, key=lambda name: values[name][-1][1])
    ends = {by_end[0]: (f"{by_end[0]}, ends lowest", 0), by_end[-1]: (f"{by_end[-1]}, ends highest", 1)}
    return [Series(ends.get(name, (name, None))[0], values[name], ends.get(name, (name, None))[1]) for name in named]


def curve_charts(data: ReportData) -> list[tuple[str, Markup]]:
    """Captions and charts of the training curves; those without points are left out."""
    curves = data["curves"]
    experts = sorted(name for name in curves if _EXPERT.match(name))
    networks = {curve_name(network["name"]) for network in data["networks"]} - set(experts)
    shown: list[str] = [name for name in ordered({"trunk", "dense", *networks}, SYSTEMS) if name in curves]
    others = sorted(set(curves) - set(experts) - set(shown))
    groups: list[tuple[str, str, list[str]]] = [
        ("networks", " and ".join(shown).capitalize() if len(shown) < 3 else "Networks of all images", shown),
        ("experts", f"The {len(experts)} experts", experts),
        ("decoders", "Decoder" if others == ["decoder"] else "Decoders", others),
    ]
    found: list[tuple[str, Markup | None]] = []
    for group, caption, names in groups:
        loss = Captions(f"chart-{group}-loss", f"{caption}: training loss", "images seen", "loss")
        found.append((loss.title, charts.line_chart(loss, _lines(curves, names, "loss", 1.0))))
        where = " on their own parts" if group == "experts" else ""
        title = f"{caption}: validation {HEADLINE_METRIC}{where}"
        precision = Captions(f"chart-{group}-precision", title, "images seen", f"{HEADLINE_METRIC}, %")
        found.append((title, charts.line_chart(precision, _lines(curves, names, f"validation_{HEADLINE_METRIC}", 100.0))))
    return [(caption, chart) for caption, chart in found if chart is not None]


def _family(name: str) -> str:
    """The line of a table that an artifact or a network belongs to: all experts of a family share one."""
    match = _EXPERT.match(name)
    return name if match is None else (match["family"] or "experts")


def group_stages(stages: Sequence[StageTime]) -> list[dict[str, Any]]:
    """Stages in their order, all experts' times summed into one entry, with the number of artifacts in it."""
    grouped: dict[str, dict[str, Any]] = {}
    for stage in stages:
        empty = {"seconds": 0.0, "units": 0, "members": [], "started": stage["started"]}
        entry = grouped.setdefault(_family(stage["artifact"]), empty)
        entry["seconds"] += stage["seconds"]
        entry["units"] += stage["units"]
        entry["members"].append(stage)
        entry["started"] = min(entry["started"], stage["started"])
    counts = {name: len(entry["members"]) for name, entry in grouped.items()}
    return [{"name": name if counts[name] == 1 else f"{name} ({counts[name]})", **entry} for name, entry in grouped.items()]


def group_networks(networks: Sequence[Network]) -> list[dict[str, Any]]:
    """Networks in their order; experts of one shape share an entry that sums what they saw."""
    grouped: dict[tuple[str, str, int, int], list[Network]] = {}
    for network in networks:
        key = (_family(network["name"]), network["backbone"], network["parameters"], network["features"])
        grouped.setdefault(key, []).append(network)
    return [
        {
            "name": members[0]["name"] if len(members) == 1 else name,
            "count": len(members),
            "backbone": backbone,
            "parameters": parameters,
            "features": features,
            "unique_examples": sum(member["unique_examples"] for member in members),
            "samples_per_epoch": round(sum(member["samples_per_epoch"] for member in members)),
            "examples_seen": sum(member["examples_seen"] for member in members),
        }
        for (name, backbone, parameters, features), members in grouped.items()
    ]


def _time_chart(stages: Sequence[Mapping[str, Any]]) -> Markup | None:
    bars = [Bar(stage["name"], stage["seconds"], format_duration(stage["seconds"])) for stage in stages]
    return charts.bar_chart(Captions("chart-times", "Time per stage"), bars) if bars else None


def _tag_chart(data: ReportData) -> Markup | None:
    bars = [Bar(entry["tag"], entry["count"], format_count(entry["count"])) for entry in data["dataset"]["top_tags"]]
    return charts.bar_chart(Captions("chart-tags", "The most frequent hashtags"), bars) if bars else None


def page_environment() -> Environment:
    """Jinja2 with the package's templates, and the formats above as filters."""
    environment = Environment(
        loader=PackageLoader("hardmoe.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    numbers = (format_percent, format_points, format_count, format_large, format_duration, format_time)
    formats = (*numbers, expert_name, image_title, image_uri)
    environment.filters.update({function.__name__.removeprefix("format_"): function for function in formats})
    environment.tests["known"] = lambda metric: metric is not None and metric["value"] is not None
    return environment


def render_report(data: ReportData, provenance: ReportProvenance) -> str:
    """Render the page.

    Args:
        data: what the artifacts decide; an absent system, curve or value is left out or shown as missing.
        provenance: who ran what, where and for how long.

    Returns:
        A complete HTML document that refers to nothing outside itself, the same for the same arguments.

    Raises:
        ValueError: an image is not a `data:image/` URI.
    """
    stages, largest = group_stages(provenance["stages"]), max((part["sizes"]["train"] for part in data["parts"]), default=0)
    return (
        page_environment()
        .get_template("page.html")
        .render(
            data=data,
            provenance=provenance,
            headline=write_headline(data),
            table=metric_table(data),
            metric_meanings=METRICS,
            breakdown=breakdown_rows(data),
            costs=cost_rows(data),
            retrieval=retrieval_rows(data),
            neighbours=NEIGHBOURS,
            probes=probe_tables(data),
            probe_names=PROBE_NAMES,
            abstention=data["metrics"].get("abstention"),
            abstention_chart=abstention_chart(data),
            abstention_rows=abstention_rows(data),
            rules=RULES,
            comparisons=sorted(data["metrics"]["differences"].items(), key=lambda item: (item[0] != COMPARISON, item[0])),
            verdict=_verdict,
            forest=[chart for chart in (_system_chart(data), _difference_chart(data)) if chart],
            mosaic=pick_mosaic(data["parts"]),
            size_chart=_size_chart(data["parts"]),
            size_facts=describe_sizes(data["parts"]),
            partition_facts=describe_partition(data),
            fit_chart=fit_chart(data),
            distance_charts=[distance_chart(part, data["partition"]["distances"]) for part in data["parts"]],
            index_beside=len(data["parts"]) <= MAX_INDEX_BESIDE,
            num_in_parts=sum(part["sizes"]["train"] for part in data["parts"]),
            largest_part=largest,
            num_visible=NUM_VISIBLE_IMAGES,
            num_open=NUM_OPEN_GALLERIES,
            curves=curve_charts(data),
            networks=group_networks(data["networks"]),
            stages=stages,
            time_chart=_time_chart(stages),
            tag_chart=_tag_chart(data),
            recipe=yaml.safe_dump(data["recipe"], sort_keys=False, allow_unicode=True),
        )
    )
