"""The charts: what is drawn stands where the axis says, checked against the tick labels alone."""

import itertools
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardmoe.report.charts import (
    Bar,
    Captions,
    Interval,
    Profile,
    Series,
    bar_chart,
    column_chart,
    density_chart,
    interval_chart,
    line_chart,
    nice_ticks,
    profile_chart,
    strip_chart,
    thin,
    tick_labels,
)

CAPTIONS = Captions("c", "A title", "images seen", "loss", "A note.")


def read_number(text):
    text = text.replace("−", "-")
    factor = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1], 1.0)
    return float(text.rstrip("kMG")) * factor


def read_axis(svg, css, coordinate):
    """The axis's map from a value to a coordinate, fitted to the labels as a reader would."""
    found = [element for element in svg.iter("text") if css in element.get("class", "").split()]
    values = [read_number(element.text) for element in found]
    positions = [float(element.get(coordinate)) for element in found]
    slope, offset = np.polyfit(values, positions, 1)
    np.testing.assert_allclose(np.multiply(slope, values) + offset, positions, atol=0.1)
    return lambda value: slope * value + offset


def read_points(element):
    return [tuple(map(float, pair.split(","))) for pair in element.get("points").split()]


def test_line_points_stand_where_the_axes_say():
    points = [(12_800.0, 6.91), (400_000.0, 4.4), (1_210_000.0, 3.625)]
    svg = ElementTree.fromstring(line_chart(CAPTIONS, [Series("trunk", points, 0), Series("dense", [(0.0, 7.0), (9e5, 5.0)], 1)]))
    x, y = read_axis(svg, "tick-x", "x"), read_axis(svg, "tick-y", "y")
    drawn = read_points(svg.find("polyline"))
    # Labels stand 3.7 units below their tick, so that the line runs through the middle of the digits.
    np.testing.assert_allclose(drawn, [(x(a), y(b) - 3.7) for a, b in points], atol=0.15)
    last = svg.find("circle")
    np.testing.assert_allclose([float(last.get("cx")), float(last.get("cy"))], drawn[-1], atol=0.01)


def test_chart_is_named_described_and_labelled():
    lines = [Series("trunk", [(1.0, 6.5), (2.0, 3.5)], 0), Series("dense", [(1.0, 6.25), (4.0, 3.0)], 1)]
    svg = ElementTree.fromstring(line_chart(CAPTIONS, lines))
    assert svg.get("role") == "img"
    assert svg.get("aria-labelledby") == "c-title c-desc"
    assert (svg.find("title").get("id"), svg.find("title").text) == ("c-title", "A title")
    assert svg.find("desc").text == "A note. loss: trunk from 6.5 to 3.5; dense from 6.25 to 3."
    assert {"images seen", "loss", "trunk", "dense"} <= {element.text for element in svg.iter("text")}


def test_lines_that_cannot_be_drawn_are_left_out():
    assert line_chart(CAPTIONS, [Series("trunk", [], 0), Series("dense", [(1.0, math.nan)], 1)]) is None
    svg = ElementTree.fromstring(line_chart(CAPTIONS, [Series("trunk", [(1.0, 2.0), (2.0, math.inf), (3.0, 2.5)], 0)]))
    assert len(read_points(svg.find("polyline"))) == 2
    assert line_chart(CAPTIONS, [Series("trunk", [(5.0, 2.0)], 0)]) is not None


def test_columns_rise_from_zero_to_their_value():
    values = [38_120.0, 0.0, 61_000.0, 12_345.0]
    columns = [Bar(str(index), value, f"{value:.0f}") for index, value in enumerate(values)]
    svg = ElementTree.fromstring(column_chart(CAPTIONS, columns, (27_866.25, "mean")))
    y = read_axis(svg, "tick-y", "y")
    tops = [float(bar.get("y")) + 3.7 for bar in svg.iter("rect")]
    feet = [float(bar.get("y")) + float(bar.get("height")) + 3.7 for bar in svg.iter("rect")]
    np.testing.assert_allclose(tops, [y(value) for value in values], atol=0.15)
    np.testing.assert_allclose(feet, [y(0.0)] * 4, atol=0.15)
    reference = next(line for line in svg.iter("line") if line.get("class") == "reference")
    assert float(reference.get("y1")) + 3.7 == pytest.approx(y(27_866.25), abs=0.15)


def test_sixty_four_columns_stay_apart_with_readable_labels():
    svg = ElementTree.fromstring(column_chart(CAPTIONS, [Bar(str(index), 5.0, "5") for index in range(64)]))
    bars = [(float(bar.get("x")), float(bar.get("width"))) for bar in svg.iter("rect")]
    assert all(left + width < right for (left, width), (right, _) in itertools.pairwise(bars))
    labels = [float(text.get("x")) for text in svg.iter("text") if "tick-x" in text.get("class")]
    assert np.diff(labels).min() > 15


def test_bars_are_as_long_as_their_values():
    values = [1804.0, 902.0, 451.0]
    svg = ElementTree.fromstring(bar_chart(CAPTIONS, [Bar(f"stage {value}", value, "text") for value in values]))
    widths = np.array([float(bar.get("width")) for bar in svg.iter("rect")])
    np.testing.assert_allclose(widths / widths[0], np.array(values) / values[0], atol=1e-3)
    assert bar_chart(CAPTIONS, [Bar("nothing", 0.0, "0")])


def test_intervals_stand_where_the_axis_says():
    rows = [Interval("mixture", 61.3, 60.56, 62.05, "61.3", 0), Interval("trunk", 54.7, 53.96, 55.45, "54.7")]
    svg = ElementTree.fromstring(interval_chart(CAPTIONS, rows))
    x = read_axis(svg, "tick-x", "x")
    lines = [line for line in svg.iter("line") if "interval" in line.get("class").split()]
    ends = [(float(line.get("x1")), float(line.get("x2"))) for line in lines]
    np.testing.assert_allclose(ends, [(x(row.low), x(row.high)) for row in rows], atol=0.15)
    dots = [float(dot.get("cx")) for dot in svg.iter("circle")]
    np.testing.assert_allclose(dots, [x(row.value) for row in rows], atol=0.15)


def test_difference_chart_draws_the_line_of_no_effect():
    svg = ElementTree.fromstring(interval_chart(CAPTIONS, [Interval("a − b", 3.4, 2.6, 4.2, "+3.40", 0)], zero=True))
    zero = next(line for line in svg.iter("line") if line.get("class") == "zero")
    assert float(zero.get("x1")) == pytest.approx(read_axis(svg, "tick-x", "x")(0.0), abs=0.15)


def test_profile_stands_over_its_numbers_on_a_logarithmic_axis_with_its_range():
    values = {2: (0.56, 0.35, 0.98), 8: (0.68, 0.58, 0.84), 64: (-0.01, -0.02, 0.0)}
    points = [(float(number), Interval(f"{number} parts", *spread, "text")) for number, spread in values.items()]
    svg = ElementTree.fromstring(profile_chart(CAPTIONS, [Profile("two seeds", points, 2)]))
    y = read_axis(svg, "tick-y", "y")
    labels = {float(text.text): float(text.get("x")) for text in svg.iter("text") if "tick-x" in text.get("class")}
    assert set(labels) == {2.0, 8.0, 64.0}
    assert (labels[64.0] - labels[8.0]) == pytest.approx(1.5 * (labels[8.0] - labels[2.0]), abs=0.2)
    dots = [(float(dot.get("cx")), float(dot.get("cy")) + 3.7) for dot in svg.iter("circle")]
    np.testing.assert_allclose(dots, [(labels[n], y(value)) for n, (value, _, _) in values.items()], atol=0.15)
    strokes = [line for line in svg.iter("line") if "interval" in line.get("class")]
    ends = [(float(line.get("y1")) + 3.7, float(line.get("y2")) + 3.7) for line in strokes]
    np.testing.assert_allclose(ends, [(y(low), y(high)) for _, low, high in values.values()], atol=0.15)
    assert "two seeds, 8 parts: text" in svg.find("desc").text


def test_profile_of_one_number_and_of_numbers_close_together_is_drawn():
    one = profile_chart(CAPTIONS, [Profile("a", [(8.0, Interval("8", 0.0, 0.0, 0.0, "0"))], 0)])
    assert len(list(ElementTree.fromstring(one).iter("circle"))) == 1
    many = [(float(number), Interval(f"{number}", 1.0, 1.0, 1.0, "1")) for number in range(100, 160)]
    svg = ElementTree.fromstring(profile_chart(CAPTIONS, [Profile("a", many, 0), Profile("b", many, 7)]))
    places = sorted(float(text.get("x")) for text in svg.iter("text") if "tick-x" in text.get("class"))
    assert np.diff(places).min() > 18
    assert {"a", "b"} <= {text.text for text in svg.iter("text")}


def test_strips_are_cut_in_the_proportions_of_their_bars():
    rows = [("2", [Bar("x", 60.0, "60 %"), Bar("y", 40.0, "40 %")]), ("3", [Bar(name, 5.0, "a third") for name in "xyz"])]
    svg = ElementTree.fromstring(strip_chart(CAPTIONS, rows))
    bars = [(float(bar.get("y")), float(bar.get("x")), float(bar.get("width")) + 0.8) for bar in svg.iter("rect")]
    whole = bars[0][2] + bars[1][2]
    np.testing.assert_allclose([width / whole for _, _, width in bars], [0.6, 0.4, 1 / 3, 1 / 3, 1 / 3], atol=2e-3)
    assert bars[0][1] + bars[0][2] == pytest.approx(bars[1][1], abs=0.15)
    assert len({top for top, _, _ in bars}) == 2
    assert [bar.find("title").text for bar in svg.iter("rect")][:2] == ["x: 60 %", "y: 40 %"]


def test_density_is_as_high_as_its_counts_over_its_range():
    svg = ElementTree.fromstring(density_chart(CAPTIONS, [2, 8, 0, 4], [1, 1, 1, 4], 0.5, 1.5))
    area, outline = (read_points(line) for line in svg.iter("polyline"))
    feet = area[0][1]
    heights = [feet - y for _, y in area[1:-1]]
    np.testing.assert_allclose(np.array(heights) / max(heights), np.repeat([0.25, 1.0, 0.0, 0.5], 2), atol=0.01)
    np.testing.assert_allclose([feet - y for _, y in outline[1:-1]], np.repeat([10.5, 10.5, 10.5, 42.0], 2), atol=0.06)
    assert (area[1][0], area[-2][0]) == (area[0][0], area[-1][0]) == (2.0, 378.0)
    assert [text.text for text in svg.iter("text")] == ["0.5", "1", "1.5"]


def test_names_are_escaped():
    name = "<b>&\"'</b>"
    captions = Captions("c", name, name, name, name)
    for chart in (
        line_chart(captions, [Series(name, [(0.0, 1.0), (1.0, 2.0)], 0)]),
        column_chart(captions, [Bar(name, 1.0, name)], (1.0, name)),
        bar_chart(captions, [Bar(name, 1.0, name)]),
        interval_chart(captions, [Interval(name, 1.0, 0.5, 2.0, name)]),
        profile_chart(captions, [Profile(name, [(2.0, Interval(name, 1.0, 0.5, 2.0, name))], 0)]),
        strip_chart(captions, [(name, [Bar(name, 1.0, name)])]),
        density_chart(captions, [1], [2], 0.0, 1.0),
    ):
        assert ElementTree.fromstring(chart).find("title").text == name


def test_thinning_keeps_the_ends_and_alters_nothing():
    points = [(float(index), math.sin(index)) for index in range(10_001)]
    kept = thin(points)
    assert (len(kept), kept[0], kept[-1]) == (240, points[0], points[-1])
    assert kept == sorted(set(kept) & set(points))
    assert thin(points[:240]) == points[:240]


@given(st.floats(-1e9, 1e9), st.floats(1e-2, 1e9), st.integers(3, 6))
def test_ticks_enclose_the_range_in_equal_round_steps(low, width, target):
    high = low + width * max(1.0, abs(low) * 1e-3)
    ticks = nice_ticks(low, high, target)
    steps = np.diff(ticks)
    assert ticks[0] <= low + 1e-6 * steps[0]
    assert ticks[-1] >= high - 1e-6 * steps[0]
    assert 2 <= len(ticks) <= target + 2
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    mantissa = steps[0] / 10.0 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - nice) for nice in (1, 2, 5)) < 1e-5


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 1_200_000, ["0", "0.5M"]),
        (54.0, 62.0, ["54", "56"]),
        (0.0, 0.4, ["0", "0.1"]),
        (-1.2, 4.0, ["−2", "0"]),
        (0, 38_000, ["0", "10k"]),
    ],
)
def test_tick_labels_are_short_and_exact(low, high, labels):
    found = tick_labels(nice_ticks(low, high))
    assert len(set(found)) == len(found)
    assert found[:2] == labels
