"""The page of a sweep: complete, self-contained, never trusting the user's hashtags, and without a recommendation."""

import re
from html.parser import HTMLParser

import pytest

from hardmoe.partitioning.sweep_summary import summarise, variation
from hardmoe.report.sweep import NUM_SHOWN, render_sweep

SAMPLE = {"rows": 1000, "of": 5000, "dim": 8, "distinct": 990, "occurrences": 3000, "variance": 0.8}


def make_payload(parts, seeds=3, tag="arrow"):
    fits = [
        {
            "objective": 0.8 / parts**0.2 + 0.001 * seed,
            "sizes": [1000 // parts + (1000 % parts if part == 0 else 0) for part in range(parts)],
            "passes": 9 + seed,
            "converged": seed != 1,
            "tag_bits": 0.3 * parts**0.5,
            "tag_chance_bits": 0.02 * parts,
            "tag_entropy_bits": 6.0,
        }
        for seed in range(seeds)
    ]
    agreement = [0.5, 0.6, 0.9][: seeds * (seeds - 1) // 2]
    return {"parts": parts, "fits": fits, "agreement": agreement, "tags": [[tag, f"tag-{part}"] for part in range(parts)]}


def make_sweep(*numbers, seeds=3, **options):
    summary = summarise(SAMPLE, [make_payload(number, seeds, **options) for number in numbers])
    return {"seeds": seeds, "partition": {"transform": "l2", "max_passes": 50}, **summary}


class Page(HTMLParser):
    """Collects elements and text, and refuses unbalanced tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["title"], ["desc"]):
            self.text += data


def test_page_is_balanced_self_contained_and_has_unique_ids():
    text = render_sweep(make_sweep(2, 4, 8), "runs/demo")
    page = Page(text)
    assert "://" not in text
    assert re.search(r"url\(|@import|<script|<iframe", text) is None
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [attributes["href"][1:] for tag, attributes in page.elements if tag == "a"]
    assert targets and set(targets) <= set(ids)
    assert len([1 for tag, _ in page.elements if tag == "svg"]) == 5


def test_every_measure_of_every_number_is_on_the_page_with_its_range():
    page = Page(render_sweep(make_sweep(2, 4), "runs/demo"))
    for said in ("1,000 of 5,000", "3 seeds", "0.67", "0.50 to 0.90", "2 of 3", "9 to 11 passes", "tag-3", "runs/demo"):
        assert said in page.text, said
    assert f"{0.3 * 2**0.5 - 0.04:.3f}" in page.text
    assert "recommend" in page.text and "best" not in page.text


def test_hashtags_are_escaped():
    attack = "<script>alert(1)</script>\"'>"
    text = render_sweep(make_sweep(2, tag=attack), attack)
    page = Page(text)
    assert [tag for tag, _ in page.elements if tag == "script"] == []
    assert attack in page.text


def test_many_parts_are_folded_and_the_smallest_are_counted():
    text = render_sweep(make_sweep(2, 500), "runs/demo")
    page = Page(text)
    details = [attributes for tag, attributes in page.elements if tag == "details"]
    assert [("open" in attributes) for attributes in details] == [True, False]
    assert f"and {500 - NUM_SHOWN} smaller ones" in page.text
    assert len(text) < 120_000


def test_one_number_from_one_seed_is_a_page_without_agreement():
    page = Page(render_sweep(make_sweep(1, seeds=1), "runs/demo"))
    assert "1 seed for each" in page.text
    assert "chart-agreement" not in [attributes.get("id") for _, attributes in page.elements]


def test_same_sweep_gives_the_same_page():
    assert render_sweep(make_sweep(2, 4), "a") == render_sweep(make_sweep(2, 4), "a")


def test_sample_without_any_variance_or_hashtag_has_no_shares():
    payload = make_payload(1)
    for fit in payload["fits"]:
        fit.update(tag_bits=0.0, tag_chance_bits=0.0, tag_entropy_bits=0.0)
    summary = summarise({**SAMPLE, "variance": 0.0}, [payload])
    (row,) = summary["sweep"]
    assert (row["variance_share"], row["tag_share"]) == (None, None)
    Page(render_sweep({"seeds": 3, "partition": {}, **summary}, "runs/demo"))


@pytest.mark.parametrize(("sizes", "expected"), [([5, 5, 5], 0.0), ([10, 0], 1.0), ([7], 0.0), ([3, 1], 0.5)])
def test_variation_is_the_population_s_standard_deviation_by_the_mean(sizes, expected):
    assert variation(sizes) == pytest.approx(expected)
