"""The page's answers to further questions: probes of the spaces, and what the mixture is worth if it may refuse."""

from test_report_render import Page, make_data, make_provenance

from hardmoe.report.questions import abstention_chart, abstention_rows, probe_tables
from hardmoe.report.render import render_report


def metric(value):
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def fitted(dim, **changes):
    return {"dim": dim, "penalty": 0.01, "neighbours": 20, "converged": True, **changes}


def asked():
    """A run that was asked both; the trunk's fit was cut off, and one number is missing."""
    data = make_data()
    unknown = {"value": None, "low": None, "high": None, "reason": "precision@10 needs at least 10 tags"}
    systems = {
        "mixture": {"fitted": fitted(384), "linear": {"precision@1": metric(0.612)}, "knn": {"precision@1": metric(0.583)}},
        "trunk": {
            "fitted": fitted(192, converged=False),
            "linear": {"precision@1": metric(0.5)},
            "knn": {"precision@1": unknown},
        },
    }
    difference = {"linear": {"precision@1": metric(0.112)}, "knn": {"precision@1": unknown}}
    own = {"images": {"train": 300, "validation": 20, "test": 30}, "tags": 40, "systems": systems}
    second = {**own, "dataset": {"source": "folder", "sizes": {}, "quarantined": 7, "quarantine_reasons": {"<b>bad</b>": 7}}}
    found = {"own_images": own, "second_dataset": second}
    for each in found.values():
        each["differences"] = {"mixture - trunk": difference}
    data["metrics"]["transfer"] = found
    curve = [
        {
            "coverage": coverage,
            "distance": {"answered": metric(coverage - 0.02), "precision@1": metric(0.7 - 0.1 * coverage)},
            "probability": {"answered": metric(coverage), "precision@1": metric(0.9 - 0.3 * coverage)},
            "difference": metric(-0.2 + 0.2 * coverage),
        }
        for coverage in (0.05, 0.5, 0.9, 1.0)
    ]
    area = {"distance": metric(0.35), "probability": metric(0.2512), "difference": metric(0.0988)}
    data["metrics"]["abstention"] = {"examples": 30, "curve": curve, "area": area}
    return data


def test_tables_have_the_columns_that_there_are_and_the_mixtures_differences() -> None:
    own, second = probe_tables(asked())
    assert own["title"] != second["title"]
    assert own["columns"][:3] == [("linear", "precision@1"), ("linear", "recall@10"), ("knn", "precision@1")]
    assert all(probe != "neighbours" for probe, _ in own["columns"])
    names = [row[0] for row in own["rows"]]
    assert names == ["trunk", "mixture"]
    trunk = own["rows"][0]
    assert trunk[2][0]["value"] == 0.5 and trunk[3][0]["value"] == 0.112
    assert probe_tables(make_data()) == []


def test_chart_and_rows_are_those_of_the_curve() -> None:
    data = asked()
    assert [point["coverage"] for point in abstention_rows(data)] == [0.5, 0.9, 1.0]
    chart = abstention_chart(data)
    assert chart is not None and "refusing the farthest from every centroid from 69.5 to 60" in chart
    assert abstention_chart(make_data()) is None


def test_page_is_balanced_tells_all_of_it_and_escapes_the_users_words() -> None:
    html = render_report(asked(), make_provenance())
    Page(html)
    assert html.count("What others can read off each space") == 2
    assert "7 rows could not be used: &lt;b&gt;bad&lt;/b&gt; (7)" in html
    for shown in ("61.2", "+11.2", "fit cut off", "384 dimensions", "25.1", "+9.88"):
        assert shown in html, shown
    plain = render_report(make_data(), make_provenance())
    assert "What others can read off" not in plain and "If the mixture may refuse" not in plain


def test_a_probe_that_could_not_be_fitted_says_why() -> None:
    data = asked()
    nothing = {"precision@1": {"value": None, "reason": "no validation image to fit a probe by"}}
    told = {"fitted": {"reason": "no validation image to fit a probe by"}, "linear": nothing, "knn": nothing}
    data["metrics"]["transfer"]["own_images"]["systems"]["mixture"] = told
    data["metrics"]["abstention"] = {"area": dict.fromkeys(("distance", "probability", "difference"), nothing["precision@1"])}
    html = render_report(data, make_provenance())
    assert "no validation image to fit a probe by" in html
    assert "If the mixture may refuse" in html
