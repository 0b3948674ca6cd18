"""Charts as inline SVG: lines, columns, bars, strips and intervals, drawn without JavaScript and without a plotting library.

Every chart is 380 units wide, so its lettering is readable one-to-one on a telephone and in a grid on a desk;
colours are CSS classes (`s0` to `s7`, `quiet`), so the page's light and dark styles and its print style apply. Each has a
`<title>` and a `<desc>` that states its numbers for those who do not see it. Rejected: Matplotlib, a heavy dependency whose
images know neither dark mode nor a screen reader.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH = 380
NUM_STYLES = 8
MAX_POINTS = 240
_CHARACTER = 6.2
"""Mean width of a character at the charts' 11 px, measured in DejaVu Sans, the widest of the usual system fonts."""


@dataclass(frozen=True)
class Captions:
    """The words of a chart; `chart_id` must be unique on the page."""

    chart_id: str
    title: str
    x_label: str = ""
    y_label: str = ""
    note: str = ""


@dataclass(frozen=True)
class Series:
    """A line; `style` is its colour, or None for a quiet line without a legend entry."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int | None


@dataclass(frozen=True)
class Bar:
    """A bar or column from zero to `value`, with `text` as its label."""

    name: str
    value: float
    text: str


@dataclass(frozen=True)
class Interval:
    """A value between its bounds; `style` None draws it quietly."""

    name: str
    value: float
    low: float
    high: float
    text: str
    style: int | None = None


@dataclass(frozen=True)
class Profile:
    """A measure at several numbers above zero, each value with its range, in ascending order of the numbers."""

    name: str
    points: Sequence[tuple[float, Interval]]
    style: int


@dataclass(frozen=True)
class Scale:
    """The affine map from a value to a coordinate."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """The coordinate of `value`."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def nice_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Round numbers, multiples of 1, 2 or 5 times a power of ten, that enclose [low, high] in about `target` steps."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / target
    magnitude: float = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def inner_ticks(low: float, high: float, target: int = 7) -> list[float]:
    """The round numbers within [low, high], at least two of them, for an axis that ends where its data end."""
    slack = 1e-9 * (high - low)
    return [tick for tick in nice_ticks(low, high, target) if low - slack <= tick <= high + slack]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """The ticks as text: k, M or G for large ones, and as many decimals as their distance asks for."""
    largest = max(abs(tick) for tick in ticks)
    divisor, suffix = next(((d, s) for d, s in ((1e9, "G"), (1e6, "M"), (1e4, "k")) if largest >= d), (1.0, ""))
    divisor = 1e3 if suffix == "k" else divisor
    step = (ticks[1] - ticks[0]) / divisor
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return ["0" if abs(tick) < 1e-12 else f"{tick / divisor:.{decimals}f}{suffix}".replace("-", "−") for tick in ticks]


def thin(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` of the points, evenly spaced by position, the first and the last among them; none is altered."""
    if len(points) <= limit:
        return list(points)
    last = len(points) - 1
    return [points[round(index * last / (limit - 1))] for index in range(limit)]


def _text(x: float, y: float, content: str, classes: str, anchor: str = "start") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>').format(x, y, classes, anchor, content)


def _line(x1: float, y1: float, x2: float, y2: float, classes: str) -> Markup:
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>').format(x1, y1, x2, y2, classes)


def _bar(x: float, y: float, width: float, height: float, hint: str) -> Markup:
    template = Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="1.5" class="bar"><title>{}</title></rect>')
    return template.format(x, y, width, height, hint)


def _shorten(name: str, limit: int) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _class(style: int | None) -> str:
    return "quiet" if style is None else f"s{style % NUM_STYLES}"


def _svg(captions: Captions, height: float, pieces: Iterable[Markup], description: str) -> Markup:
    """The frame of a chart. No xmlns: inside HTML it is implied, and the page then holds no address at all."""
    return Markup(
        '<svg id="{0}" class="chart" viewBox="0 0 {1} {2:.0f}" role="img" aria-labelledby="{0}-title {0}-desc">'
        '<title id="{0}-title">{3}</title><desc id="{0}-desc">{4}</desc>{5}</svg>'
    ).format(captions.chart_id, WIDTH, height, captions.title, description, Markup("").join(pieces))


def _vertical_axis(scale: Scale, ticks: Sequence[float], left: float, right: float) -> list[Markup]:
    pieces = []
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        y = scale(tick)
        pieces += [_line(left, y, right, y, "grid"), _text(left - 6, y + 3.7, label, "tick tick-y", "end")]
    return pieces


def _horizontal_axis(scale: Scale, ticks: Sequence[float], bottom: float) -> list[Markup]:
    pieces = [_line(scale.start, bottom, scale.stop, bottom, "axis")]
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        x = scale(tick)
        pieces += [_line(x, bottom, x, bottom + 4, "axis"), _text(x, bottom + 16, label, "tick tick-x", "middle")]
    return pieces


def _legend(series: Sequence[Series], top: float, left: float, right: float) -> tuple[list[Markup], float]:
    """A swatch and a name for each coloured line, in as many columns as fit; returns the height it takes too.

    A line alone has none: the chart's title names it.
    """
    named = [line for line in series if line.style is not None]
    if len(series) < 2:
        return [], 0.0
    entry = 30 + _CHARACTER * max(len(line.name) for line in named)
    columns = max(1, int((right - left) // entry))
    pieces = []
    for index, line in enumerate(named):
        x, y = left + (index % columns) * entry, top + (index // columns) * 17
        pieces += [_line(x, y, x + 18, y, f"line {_class(line.style)}"), _text(x + 23, y + 3.7, line.name, "label")]
    return pieces, math.ceil(len(named) / columns) * 17


def _path(line: Series, x: Scale, y: Scale) -> Markup:
    points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in thin(line.points))
    drawn = Markup('<polyline points="{}" class="line {}"><title>{}</title></polyline>').format(
        points, _class(line.style), line.name
    )
    if line.style is None:
        return drawn
    a, b = line.points[-1]
    return drawn + Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.6" class="dot {}"/>').format(x(a), y(b), _class(line.style))


def line_chart(captions: Captions, series: Sequence[Series]) -> Markup | None:
    """Lines over a common horizontal axis from zero, or None where no line has a finite point.

    Args:
        captions: the words; both axis labels should name a unit.
        series: the lines, over values not below zero; what is not finite is left out, more than `MAX_POINTS` are thinned.
    """
    finite = [Series(s.name, [p for p in s.points if math.isfinite(p[0]) and math.isfinite(p[1])], s.style) for s in series]
    drawn = sorted((s for s in finite if s.points), key=lambda s: s.style is not None)
    if not drawn:
        return None
    left, right, top, bottom = 46.0, WIDTH - 14.0, 26.0, 196.0
    all_x, all_y = ([point[axis] for s in drawn for point in s.points] for axis in (0, 1))
    y_ticks, end = nice_ticks(min(all_y), max(all_y), 4), max(all_x) or 1.0
    x, y = Scale(0.0, end, left, right), Scale(y_ticks[0], y_ticks[-1], bottom, top)
    legend, legend_height = _legend([s for s in finite if s.points], bottom + 54, left, right)
    pieces = [
        *_vertical_axis(y, y_ticks, left, right),
        *_horizontal_axis(x, inner_ticks(0.0, end), bottom),
        _text(left - 40, 12, captions.y_label, "label axis-label"),
        _text(right, bottom + 33, captions.x_label, "label axis-label", "end"),
        *(_path(line, x, y) for line in drawn),
        *legend,
    ]
    told = [s for s in drawn if s.style is not None] or drawn[:NUM_STYLES]
    ends = "; ".join(f"{s.name} from {s.points[0][1]:.4g} to {s.points[-1][1]:.4g}" for s in told)
    return _svg(captions, bottom + 42 + legend_height, pieces, f"{captions.note} {captions.y_label}: {ends}.".strip())


def column_chart(captions: Captions, columns: Sequence[Bar], reference: tuple[float, str] | None = None) -> Markup:
    """Columns from zero, with an optional dashed reference line and its name; up to 64 columns stay apart."""
    left, right, top, bottom = 46.0, WIDTH - 6.0, 26.0, 186.0
    ticks = nice_ticks(0.0, max([column.value for column in columns] + [reference[0] if reference else 0.0, 1.0]), 4)
    y, slot = Scale(ticks[0], ticks[-1], bottom, top), (right - left) / max(len(columns), 1)
    pieces = _vertical_axis(y, ticks, left, right)
    every = math.ceil(len(columns) / 16)
    for index, column in enumerate(columns):
        x, height = left + index * slot, bottom - y(column.value)
        pieces.append(_bar(x + slot * 0.12, bottom - height, slot * 0.76, height, f"{column.name}: {column.text}"))
        if index % every == 0:
            pieces.append(_text(x + slot / 2, bottom + 16, column.name, "tick tick-x", "middle"))
    pieces += [_line(left, bottom, right, bottom, "axis"), _text(left - 40, 12, captions.y_label, "label axis-label")]
    pieces.append(_text(right, bottom + 33, captions.x_label, "label axis-label", "end"))
    if reference:
        height = y(reference[0])
        pieces += [_line(left, height, right, height, "reference"), _text(right, 12, f"- - {reference[1]}", "label", "end")]
    values = "; ".join(f"{column.name}: {column.text}" for column in columns)
    return _svg(captions, bottom + 42, pieces, f"{captions.note} {values}.".strip())


def bar_chart(captions: Captions, bars: Sequence[Bar]) -> Markup:
    """Horizontal bars from zero, each with its name before it and its value behind it."""
    row, name_limit = 22.0, 24
    longest = max((min(len(bar.name), name_limit) for bar in bars), default=0)
    left = 10 + _CHARACTER * longest
    right = WIDTH - 12 - _CHARACTER * max((len(bar.text) for bar in bars), default=0)
    scale = Scale(0.0, max([bar.value for bar in bars] + [1e-9]), left, right)
    pieces = []
    for index, bar in enumerate(bars):
        y = 4 + index * row
        end = max(scale(bar.value), left + 1)
        pieces.append(_text(left - 8, y + 13, _shorten(bar.name, name_limit), "label", "end"))
        pieces.append(_bar(left, y + 2, end - left, row - 7, f"{bar.name}: {bar.text}"))
        pieces.append(_text(end + 6, y + 13, bar.text, "tick value"))
    pieces.append(_line(left, 2, left, 4 + len(bars) * row, "axis"))
    values = "; ".join(f"{bar.name}: {bar.text}" for bar in bars)
    return _svg(captions, 8 + len(bars) * row, pieces, f"{captions.note} {values}.".strip())


def interval_chart(captions: Captions, rows: Sequence[Interval], zero: bool = False) -> Markup:
    """A forest plot: one row per value, its interval as a line and the value as a dot; `zero` draws the line of no effect."""
    longest = max(len(r.name) for r in rows)
    above = longest > 20  # a long name takes the line above its interval instead of half the chart's width
    row, left = (40.0, 4.0) if above else (30.0, 14 + _CHARACTER * longest)
    right = WIDTH - 14 - _CHARACTER * max(len(r.text) for r in rows)
    bounds = [bound for r in rows for bound in (r.low, r.high)] + ([0.0] if zero else [])
    margin = 0.06 * (max(bounds) - min(bounds)) or 0.1
    scale, bottom = Scale(min(bounds) - margin, max(bounds) + margin, left, right), 6 + row * len(rows)
    ticks = inner_ticks(scale.low, scale.high)
    pieces = [_line(scale(tick), 4, scale(tick), bottom, "grid") for tick in ticks]
    pieces += _horizontal_axis(scale, ticks, bottom)
    if zero:
        pieces.append(_line(scale(0.0), 4, scale(0.0), bottom, "zero"))
    for index, r in enumerate(rows):
        y, css = 6 + row * (index + (0.68 if above else 0.5)), _class(r.style)
        if above:
            name = _shorten(r.name, 52)
            backdrop = Markup('<rect x="0" y="{:.1f}" width="{:.1f}" height="15" class="backdrop"/>')
            pieces += [backdrop.format(y - 24, left + 6 + _CHARACTER * len(name)), _text(left, y - 13, name, f"label {css}")]
        else:
            pieces.append(_text(left - 10, y + 4, r.name, f"label {css}", "end"))
        pieces.append(_line(scale(r.low), y, scale(r.high), y, f"interval {css}"))
        dot = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4.2" class="dot {}"><title>{}: {}</title></circle>')
        pieces.append(dot.format(scale(r.value), y, css, r.name, r.text))
        pieces.append(_text(WIDTH - 4, y + 4, r.text, f"tick value {css}", "end"))
    pieces.append(_text(right, bottom + 33, captions.x_label, "label axis-label", "end"))
    values = "; ".join(f"{r.name} {r.value:.4g}, interval {r.low:.4g} to {r.high:.4g}" for r in rows)
    return _svg(captions, bottom + 42, pieces, f"{captions.note} {values}.".strip())


def profile_chart(captions: Captions, profiles: Sequence[Profile], joined: bool = True) -> Markup:
    """Values over numbers on a logarithmic axis, each with its range as a stroke.

    Joined by lines where the numbers are steps of one thing, and then the other axis has zero; else points of their own.
    """
    left, right, top, bottom = 46.0, WIDTH - 14.0, 26.0, 196.0
    numbers = sorted({number for profile in profiles for number, _ in profile.points})
    bounds = [bound for profile in profiles for _, point in profile.points for bound in (point.low, point.high)]
    start = [0.0] if joined else []
    ticks = nice_ticks(min([*start, *bounds]), max([*start, *bounds]), 4)
    y = Scale(ticks[0], ticks[-1], bottom, top)
    margin = 0.06 * math.log(numbers[-1] / numbers[0]) or 1.0
    x = Scale(math.log(numbers[0]) - margin, math.log(numbers[-1]) + margin, left, right)
    pieces = [*_vertical_axis(y, ticks, left, right), _line(left, bottom, right, bottom, "axis")]
    free = left - 20
    for number in numbers:
        at = x(math.log(number))
        pieces.append(_line(at, bottom, at, bottom + 4, "axis"))
        if at - free > 10 + _CHARACTER * len(f"{number:g}"):  # numbers close together share the room of one label
            pieces.append(_text(at, bottom + 16, f"{number:g}", "tick tick-x", "middle"))
            free = at
    for profile in profiles:
        css = _class(profile.style)
        places = [(x(math.log(number)), point) for number, point in profile.points]
        drawn = " ".join(f"{at:.1f},{y(point.value):.1f}" for at, point in places)
        line = Markup('<polyline points="{}" class="line thin {}"><title>{}</title></polyline>')
        if joined:
            pieces.append(line.format(drawn, css, profile.name))
        for at, point in places:
            pieces.append(_line(at, y(point.low), at, y(point.high), f"interval {css}"))
            dot = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3.2" class="dot {}"><title>{}: {}</title></circle>')
            pieces.append(dot.format(at, y(point.value), css, point.name, point.text))
    pieces += [_text(left - 40, 12, captions.y_label, "label axis-label")]
    pieces.append(_text(right, bottom + 33, captions.x_label, "label axis-label", "end"))
    legend, legend_height = _legend([Series(profile.name, (), profile.style) for profile in profiles], bottom + 54, left, right)
    values = "; ".join(f"{p.name}, {point.name}: {point.text}" for p in profiles for _, point in p.points)
    return _svg(captions, bottom + 42 + legend_height, [*pieces, *legend], f"{captions.note} {values}.".strip())


def strip_chart(captions: Captions, rows: Sequence[tuple[str, Sequence[Bar]]]) -> Markup:
    """A row per name, cut in the proportions of its bars; the bars' texts are hints, not labels."""
    left, right, row, height = 16 + _CHARACTER * max(len(name) for name, _ in rows), WIDTH - 4.0, 27.0, 19.0
    pieces = []
    for index, (name, bars) in enumerate(rows):
        y, scale = 22 + index * row, Scale(0.0, math.fsum(bar.value for bar in bars) or 1.0, left, right)
        pieces.append(_text(left - 8, y + 14, name, "label", "end"))
        before = 0.0
        for bar in bars:
            start, end = scale(before), scale(before + bar.value)
            pieces.append(_bar(start, y, max(0.3, end - start - 0.8), height, f"{bar.name}: {bar.text}"))
            before += bar.value
    pieces.append(_text(0, 12, captions.y_label, "label axis-label"))
    told = "; ".join(f"{name}: {', '.join(bar.text for bar in bars[:3])}" for name, bars in rows)
    return _svg(captions, 24 + len(rows) * row, pieces, f"{captions.note} The largest of each: {told}.".strip())


def density_chart(captions: Captions, counts: Sequence[int], others: Sequence[int], low: float, high: float) -> Markup:
    """A part's histogram over [low, high] as a filled step, with the outline of all parts'; each is as high as the chart."""
    left, right, top, bottom = 2.0, WIDTH - 2.0, 4.0, 46.0
    x = Scale(0.0, float(len(counts)), left, right)
    pieces = []
    for values, css, hint in ((counts, "area", "this part"), (others, "line quiet outline", "all parts together")):
        y = Scale(0.0, float(max(1, *values)), bottom, top)
        steps = [(x(index + side), y(value)) for index, value in enumerate(values) for side in (0, 1)]
        points = " ".join(f"{a:.0f},{b:.1f}" for a, b in [(left, bottom), *steps, (right, bottom)])
        pieces.append(Markup('<polyline points="{}" class="{}"><title>{}</title></polyline>').format(points, css, hint))
    pieces.append(_line(left, bottom, right, bottom, "axis"))
    ends = ((left, low, "start"), ((left + right) / 2, (low + high) / 2, "middle"), (right, high, "end"))
    pieces += [_text(at, bottom + 13, f"{value:.3g}", "tick", anchor) for at, value, anchor in ends]
    return _svg(captions, bottom + 16, pieces, captions.note)
