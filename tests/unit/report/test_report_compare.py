"""The page of a comparison: every value of every run, warnings in words, nothing of the user's trusted."""

import re

import pytest

from hardmoe.report.compare import render_comparison

ATTACK = '<script>alert("x")</script>'


def metric(value, width=0.02):
    return {"value": value, "low": value - width, "high": value + width}


def make_run(name, systems=("trunk", "mixture"), value=0.5, difference=None, **changes):
    told = {}
    for number, system in enumerate(systems):
        told[system] = {
            "metrics": {"precision@1": metric(value + 0.01 * number), "map": metric(0.2)},
            "cost": {
                "parameters": 2_500_000,
                "active_parameters": 1_500_000,
                "flops": 4_000_000 * (number + 1),
                "images_seen": 12_400,
                "training_flops": 3 * 10**12,
                "rho": 0.385,
            },
            "examples_per_second": 1234.0,
            "training_seconds": 75.0,
        }
        if difference is not None:
            told[system]["difference"] = difference
    facts = {"root": f"runs/{name}", "num_test_examples": 640, "dataset": "d" * 64, "vocabulary": "v" * 64}
    recorded = {"commits": ["0123456789abcdef"], "machines": ["16 x Example"], "training_seconds": 3700.0}
    return {"name": name, **facts, **recorded, "num_experts": 4, "gain": metric(0.012), "systems": told, **changes}


def paired(value=0.03):
    return {"is_paired": True, "metrics": {"precision@1": metric(value, 0.01)}}


def unpaired(value=0.03):
    return {"is_paired": False, "metrics": {"precision@1": {"value": value, "low": None, "high": None, "reason": "unpaired"}}}


def make_comparison(*runs, same=True, sentence="All runs were judged on the same 640 test examples."):
    chosen = {"run": runs[0]["name"], "system": "mixture"}
    return {"runs": list(runs), "against": chosen, "test_sets": {"is_same": same, "groups": [], "sentence": sentence}}


def cells(page):
    return [re.sub(r"<[^>]+>", " ", cell).split() for cell in re.findall(r"<td[^>]*>(.*?)</td>", page)]


def test_page_has_every_value_cost_and_origin() -> None:
    page = render_comparison(make_comparison(make_run("a"), make_run("b", value=0.6, difference=paired())))
    found = cells(page)
    for expected in (["50.0", "48.0", "to", "52.0"], ["61.0", "59.0", "to", "63.0"], ["+3.00", "+2.00", "to", "+4.00"]):
        assert expected in found
    for expected in (["2.50", "M"], ["1.50", "M"], ["8.00", "M"], ["38.5"], ["3.00", "T"], ["12,400"], ["1.23", "k"]):
        assert expected in found
    assert ["1", "min", "15", "s"] in found
    for text in ("0123456789", "16 x Example", "1 h 01 min", "runs/a", "2 runs, 4 systems", "Differences to a: mixture"):
        assert text in page
    assert "//" not in page and "<script" not in page


def test_gains_are_drawn_for_every_number_of_experts_where_there_are_two() -> None:
    runs = [make_run("a"), make_run("b", num_experts=8, gain=metric(-0.012)), make_run("c", gain=None)]
    page = render_comparison(make_comparison(*runs))
    for text in ("4 experts, a: +1.20 after 12,400 images", "8 experts, b: −1.20 after 12,400 images"):
        assert text in page
    assert "c: +" not in page
    unknown = {"value": None, "low": None, "high": None, "reason": "no draws"}
    alone = render_comparison(make_comparison(runs[0], runs[2], make_run("d", gain=unknown)))
    assert "mixture − dense_refit of the same run" in page and "mixture − dense_refit of the same run" not in alone


def test_unpaired_difference_has_a_warning_and_no_interval() -> None:
    sentence = "The runs were judged on different datasets."
    page = render_comparison(make_comparison(make_run("a"), make_run("b", difference=unpaired()), same=False, sentence=sentence))
    assert f'<p class="lead warning">{sentence}</p>' in page
    assert ["+3.00", "unpaired"] in cells(page)
    assert 'id="chart-differences"' not in page, "a chart of intervals shows paired differences alone"


@pytest.mark.parametrize("count", [1, 12])
def test_one_run_or_a_dozen_make_a_page_without_nan(count: int) -> None:
    page = render_comparison(make_comparison(*(make_run(f"run-{number}", value=0.4) for number in range(count))))
    assert "nan" not in page.lower().replace("provenance", "") and "None" not in page
    assert page.count("precision@1 of ") == (1 if count == 1 else 2)


def test_what_is_not_known_is_a_dash_and_not_a_zero() -> None:
    run = make_run("old", commits=[], machines=[], training_seconds=None)
    run["systems"]["oracle_expert"] = {
        "metrics": {"precision@1": {"value": None, "low": None, "high": None}},
        "cost": None,
        "examples_per_second": None,
        "training_seconds": None,
    }
    page = render_comparison(make_comparison(run))
    assert page.count("not recorded") == 3
    assert "counted with the system it chooses from" in page
    assert page.count(">–<") >= 3


def test_names_and_places_are_text_and_never_markup() -> None:
    run = make_run(ATTACK, systems=("mixture", ATTACK), root=ATTACK, machines=[ATTACK], commits=[ATTACK])
    page = render_comparison(make_comparison(run, sentence=ATTACK))
    assert "<script" not in page and "&lt;script" in page


def test_page_is_the_same_for_the_same_runs() -> None:
    made = [render_comparison(make_comparison(make_run("a"), make_run("b", difference=paired()))) for _ in range(2)]
    assert made[0] == made[1]


def test_what_cost_nothing_has_no_place_on_a_logarithmic_axis() -> None:
    runs = [make_run(name, gain=metric(0.01), num_experts=4) for name in ("a", "b")]
    for run, seen in zip(runs, (0, 1000), strict=True):
        run["systems"]["mixture"]["cost"] |= {"images_seen": seen, "training_flops": 0}
        run["systems"]["trunk"]["cost"] |= {"training_flops": seen}
    page = render_comparison(make_comparison(*runs))
    assert "chart-gains" not in page, "one point is no line"
    assert "chart-training-flops" in page
    for run in runs:
        run["systems"]["trunk"]["cost"] |= {"training_flops": 0}
    assert "chart-training-flops" not in render_comparison(make_comparison(*runs))
