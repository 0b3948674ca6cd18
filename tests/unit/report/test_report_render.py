"""The page: complete, honest, self-contained, valid, and never trusting the user's tags."""

import base64
import copy
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hardmoe.report import render
from hardmoe.report.parts import describe_partition
from hardmoe.report.render import render_report

SYSTEM_NAMES = ["trunk", "dense", "dense_refit", "experts_own_decoder", "mixture", "random_partition"]
METRIC_NAMES = ["precision@1", "precision@5", "precision@10", "recall@10", "hit@1", "hit@5", "map"]
WORDS = ["arrow", "circle", "outline", "box", "heart", "user", "cloud", "file", "chart", "phone"]
WORDS += ["lock", "star", "sun", "map", "play", "moon", "bell", "car", "home", "tree"]
VOID = {"meta", "link", "img"}
SELF_CLOSING = {"line", "circle", "rect"}


def make_image(generator):
    """A small PNG with a coloured shape on it, as a data URI."""
    image = Image.new("RGB", (32, 32), "white")
    draw, (left, top) = ImageDraw.Draw(image), generator.integers(3, 10, 2).tolist()
    draw_shape = (draw.ellipse, draw.rectangle)[int(generator.integers(2))]
    draw_shape((left, top, left + 18, top + 16), fill=tuple(generator.integers(0, 200, 3).tolist()))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def make_exemplar(generator, images):
    return {
        "example_id": generator.bytes(16).hex(),
        "tags": [str(word) for word in generator.choice(WORDS, 3, replace=False)],
        "image": images[int(generator.integers(len(images)))],
        "distance": float(generator.uniform(0.2, 0.9)),
    }


def make_part(generator, expert, num_experts, images):
    train = int(300_000 / num_experts * generator.uniform(0.5, 1.6))
    words = [str(word) for word in generator.choice(WORDS, 12, replace=False)]
    lifts = sorted(generator.uniform(1.2, 14.0, 12).tolist(), reverse=True)
    borderline = [
        {**make_exemplar(generator, images), "second": (expert + 1) % num_experts, "ratio": float(generator.uniform(0.97, 1))}
        for _ in range(12)
    ]
    return {
        "expert": expert,
        "sizes": {"train": train, "validation": train // 20, "test": train // 20},
        "mean_distance": 0.61,
        "distances": {"counts": [expert + 1, 40, 9, 0], "quantiles": {"5": 0.3, "50": 0.59, "95": 0.8, "99": 0.9}},
        "tags": [{"tag": tag, "count": 40 * int(lift * 10), "lift": lift} for tag, lift in zip(words, lifts, strict=True)],
        "typical": [make_exemplar(generator, images) for _ in range(24)],
        "borderline": borderline,
    }


def make_curve(generator, num_points, final, scale):
    return [
        {
            "step": 50 * index,
            "examples": 50 * 256 * index,
            "loss": final + scale * math.exp(-4 * index / num_points) + float(generator.normal(0, 0.03)),
            "validation_precision@1": 0.6 - 0.4 * math.exp(-4 * index / num_points) if index % 10 == 9 else None,
        }
        for index in range(1, num_points + 1)
    ]


def make_metrics(generator):
    systems = {}
    for name, base in zip(SYSTEM_NAMES, (0.547, 0.576, 0.579, 0.619, 0.613, 0.543), strict=True):
        values = {metric: base * (0.5 if "5" in metric or metric == "precision@10" else 1.05) for metric in METRIC_NAMES}
        values["precision@1"] = base
        systems[name] = {key: {"value": value, "low": value - 0.0074, "high": value + 0.0075} for key, value in values.items()}
    systems["trunk"]["map"] = {"value": None, "reason": "the class scores were not kept"}
    difference = {"value": 0.0341, "low": 0.0264, "high": 0.0418}
    random_difference = {"value": 0.07, "low": 0.0612, "high": 0.0791}
    return {
        "systems": systems,
        "num_test_examples": 16285,
        "differences": {
            "mixture - dense_refit": {"precision@1": difference, "recall@10": {"value": 0.041, "low": 0.0343, "high": 0.0476}},
            "mixture - experts_own_decoder": {"precision@1": {"value": -0.006, "low": -0.0114, "high": -0.0003}},
            "mixture - random_partition": {"precision@1": random_difference},
        },
    }


def make_data(num_experts=8, num_points=120):
    """A run like the ones users have; every number is drawn from one seeded generator."""
    generator = np.random.default_rng(5)
    images = [make_image(generator) for _ in range(24)]
    networks = [
        {
            "name": name,
            "backbone": "quicknet_w12",
            "parameters": 371_204,
            "unique_examples": 304_000,
            "samples_per_epoch": 304_610.5,
            "examples_seen": 2_436_880,
            "features": 96,
        }
        for name in ["trunk", "dense", *(f"expert-{index:04d}" for index in range(num_experts))]
    ]
    curves = {"trunk": make_curve(generator, num_points, 4.1, 3.0), "dense": make_curve(generator, 2 * num_points, 3.8, 3.2)}
    for index in range(num_experts):
        curves[f"expert-{index:04d}"] = make_curve(generator, num_points // 2, 3.2 + 0.05 * index, 1.0)
    curves["decoder"] = make_curve(generator, 30, 3.6, 0.4)
    return {
        "recipe": {"dataset": {"source": "icons"}, "partition": {"experts": num_experts, "method": "kmeans"}, "seed": 0},
        "dataset": {
            "sizes": {"train": 304_610, "validation": 16_102, "test": 16_285},
            "source": "icons",
            "quarantined": 15,
            "quarantine_reasons": {"blank glyph": 12, "truncated file": 3},
            "without_tags": 811,
            "copies_merged": 2_904,
            "near_duplicates_removed": 77,
            "num_tags": 2000,
            "top_tags": [{"tag": word, "count": 40_000 // (index + 2)} for index, word in enumerate(WORDS)],
            "dropped_tags": 9_204,
            "dropped_reasons": {"fewer than min_count": 9_000, "on the deny list": 204},
        },
        "metrics": make_metrics(generator),
        "router": {
            "objective": [0.3 + 0.5 * math.exp(-index / 4) for index in range(18)],
            "converged": True,
            "reseeded": [{"pass": 2, "expert": 5}],
            "experts": num_experts,
            "zero_vectors": 6,
        },
        "partition": {
            "looked_at": 200_000,
            "variation": 0.316,
            "bordering": 0.4304,
            "tag_bits": 1.31,
            "tag_chance_bits": 0.06,
            "tag_entropy_bits": 6.25,
            "distances": {"low": 0.2, "high": 1.0, "counts": [9, 400, 90, 1], "quantiles": {"50": 0.55}},
        },
        "parts": [make_part(generator, expert, num_experts, images) for expert in range(num_experts)],
        "curves": curves,
        "networks": networks,
    }


def make_provenance(num_experts=8):
    stages = [("dataset", 212.0, 16), ("vocabulary", 4.1, 16), ("trunk", 1804.0, 1), ("features", 95.0, 16), ("router", 31.0, 1)]
    stages += [("partition", 48.0, 16), *((f"experts/expert-{index:04d}", 410.5, 1) for index in range(num_experts))]
    stages += [("embeddings", 88.0, 16), ("decoder", 61.0, 1), ("evaluation", 40.0, 4)]
    return {
        "title": "runs/icons",
        "command": "hardmoe run -f icons.yaml --root runs/icons",
        "commit": "3f1c9d27aa01",
        "host": "atlas",
        "versions": {"python": "3.11.9", "torch": "2.9.0", "hardmoe": "0.1.0"},
        "finished": "2026-03-01T14:05:31+00:00",
        "stages": [
            {"artifact": name, "seconds": seconds, "units": units, "started": "2026-03-01T12:00:00+00:00"}
            for name, seconds, units in stages
        ],
        "total_seconds": 4931.2,
    }


class Page(HTMLParser):
    """Collects the elements and refuses unbalanced tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute of <{tag}> is given twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in SELF_CLOSING
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["title"], ["desc"]):
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def classed(self, css):
        return [attributes for _, attributes in self.elements if css in (attributes.get("class") or "").split()]


@pytest.fixture(scope="module")
def full_page():
    return render_report(make_data(), make_provenance())


def with_difference(value, low, high):
    data = make_data(num_experts=1, num_points=20)
    data["metrics"]["differences"]["mixture - dense_refit"]["precision@1"] = {"value": value, "low": low, "high": high}
    return data


def test_page_is_balanced_with_unique_ids_and_every_reference_resolves(full_page):
    page = Page(full_page)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = [link["href"][1:] for link in page.all("a")]
    references += [name for _, attributes in page.elements for name in (attributes.get("aria-labelledby") or "").split()]
    assert len(references) > 50
    assert set(references) <= set(ids)


def test_page_refers_to_nothing_outside_itself(full_page):
    page = Page(full_page)
    assert "://" not in full_page
    assert re.search(r"url\(|@import|<script|<iframe|<object|srcset", full_page) is None
    for _, attributes in page.elements:
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith(("#", "data:,"))
        assert not [name for name in attributes if name.startswith("on")]
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")


def test_every_system_metric_expert_stage_and_tag_appears(full_page):
    text = Page(full_page).text
    for name in [*SYSTEM_NAMES, *METRIC_NAMES, *WORDS, "blank glyph", "truncated file", "3f1c9d27aa01", "torch 2.9.0"]:
        assert name in text, name
    for stage in make_provenance()["stages"]:
        assert stage["artifact"] in text
    ids = {attributes.get("id") for _, attributes in Page(full_page).elements}
    assert {f"expert-{index:04d}" for index in range(8)} <= ids


def test_values_and_intervals_are_shown_in_per_cent_and_the_best_is_marked(full_page):
    assert re.search(r"<td><b>61\.3</b><small>60\.6 to 62\.0</small></td>", full_page)
    assert re.search(r'<td class="best"><b>61\.9</b><span class="hidden"> \(best\)</span>', full_page)
    assert len(Page(full_page).classed("best")) == len(METRIC_NAMES)


def test_ties_for_the_best_are_all_marked():
    data = make_data(1, 20)
    data["metrics"]["systems"] = {name: {"hit@1": {"value": 0.5, "low": 0.4, "high": 0.6}} for name in ("trunk", "mixture")}
    assert render.metric_table(data)["best"] == {"hit@1": {"trunk", "mixture"}}


@pytest.mark.parametrize(
    ("bounds", "verdict", "opening", "numbers"),
    [
        ((0.0341, 0.0264, 0.0418), "better", "The mixture does better than its dense control", ["+3.41", "+2.64", "+4.18"]),
        ((-0.021, -0.03, -0.012), "worse", "The mixture does worse than its dense control", ["−2.10", "−3.00", "−1.20"]),
        ((0.004, -0.003, 0.011), "same", "No difference shown", ["+0.40", "−0.30", "+1.10", "contains zero"]),
        ((0.004, 0.0, 0.011), "same", "No difference shown", ["+0.00", "contains zero"]),
    ],
)
def test_headline_follows_the_paired_interval(bounds, verdict, opening, numbers):
    data = with_difference(*bounds)
    headline = render.write_headline(data)
    assert headline.verdict == verdict
    assert headline.sentence.startswith(opening)
    assert all(number in headline.detail for number in [*numbers, "16,285"])
    page = render_report(data, make_provenance(1))
    assert f'class="hero {verdict}"' in page
    assert headline.sentence in page


@pytest.mark.parametrize("missing", ["difference", "interval", "control"])
def test_headline_claims_nothing_without_a_paired_interval(missing):
    data = with_difference(0.03, 0.02, 0.04)
    if missing == "difference":
        data["metrics"]["differences"] = {}
    elif missing == "interval":
        data["metrics"]["differences"]["mixture - dense_refit"]["precision@1"] = {"value": 0.03}
    else:
        del data["metrics"]["systems"]["dense_refit"]
    headline = render.write_headline(data)
    assert headline.verdict == "unknown"
    assert "does not compare" in headline.sentence
    assert "better" not in headline.sentence + headline.detail
    Page(render_report(data, make_provenance(1)))


def test_user_data_is_escaped_wherever_it_appears():
    attack = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}"
    data, provenance = make_data(1, 20), make_provenance(1)
    data["parts"][0]["tags"][0]["tag"] = attack
    data["parts"][0]["typical"][0]["tags"] = [attack]
    data["parts"][0]["borderline"][0]["example_id"] = attack
    data["dataset"]["top_tags"][0]["tag"] = attack
    data["dataset"]["quarantine_reasons"] = {attack: 1}
    data["dataset"]["source"] = data["recipe"]["root"] = attack
    data["networks"][0]["name"] = data["networks"][0]["backbone"] = attack
    data["curves"][attack] = data["curves"]["decoder"]
    data["metrics"]["systems"][attack] = data["metrics"]["systems"]["trunk"]
    data["metrics"]["differences"][attack] = data["metrics"]["differences"]["mixture - dense_refit"]
    provenance.update(title=attack, command=attack, host=attack, commit=attack, versions={attack: attack})
    provenance["stages"][0]["artifact"] = attack
    text = render_report(data, provenance)
    page = Page(text)
    assert page.all("script") == []
    assert all(image["src"].startswith("data:image/png") and "onerror" not in image for image in page.all("img"))
    assert attack in [image["alt"] for image in page.all("img")]
    assert text.count("{{ 7*7 }}") >= 14


def test_image_outside_the_page_is_refused():
    data = make_data(1, 20)
    data["parts"][0]["typical"][0]["image"] = "https://example.org/cat.png"
    with pytest.raises(ValueError, match="not a data:image/ URI"):
        render_report(data, make_provenance(1))


def test_every_image_has_its_tags_as_alternative_text_and_its_id_as_title(full_page):
    images = Page(full_page).all("img")
    assert len(images) == 8 * (24 + 12) + render.MOSAIC_SIZE
    exemplar = make_data()["parts"][3]["typical"][20]
    match = [image for image in images if image["title"].startswith(exemplar["example_id"])]
    assert [(image["alt"], image["src"]) for image in match] == [(", ".join(exemplar["tags"]), exemplar["image"])]


def test_many_experts_fold_their_galleries_and_stay_small():
    text = render_report(make_data(num_experts=64, num_points=4000), make_provenance(64))
    page = Page(text)
    assert len(page.classed("card")) == 64
    assert len([details for details in page.all("details") if "open" in details]) == 8
    assert "experts (64)" in page.text
    without_images = re.sub(r'src="data:[^"]*"', "", text)
    assert len(without_images) < 1_500_000
    assert max(len(line["points"].split()) for line in page.all("polyline")) == 240


def test_images_of_other_parts_that_an_expert_sees_are_told_only_where_there_are_any(full_page):
    data = make_data(2)
    data["parts"][1]["extra"] = 1234
    page = render_report(data, make_provenance(2))
    assert [int(count.replace(",", "")) for count in re.findall(r"and ([\d,]+) of other parts", page)] == [1234]
    assert "of other parts" not in full_page


def test_page_says_whether_the_nearest_centroid_or_a_column_decided(full_page):
    data = make_data(2)
    data["recipe"]["partition"]["method"] = "given"
    page = render_report(data, make_provenance(2))
    assert "A column of the dataset says which part an image is in" in page
    assert "sends every image to the expert with the nearest centroid" in full_page
    assert "sends every image" not in page


def test_a_bare_run_renders_without_the_missing_pieces():
    data, provenance = make_data(2, 20), make_provenance(2)
    data["metrics"]["systems"] = {name: {"precision@1": {"value": 0.5}} for name in ("trunk", "mixture")}
    data["metrics"]["systems"]["mixture"]["map"] = {"value": None, "reason": "too large to rank"}
    data["metrics"]["differences"] = {}
    data["router"].update(objective=[], reseeded=[], converged=False, zero_vectors=None)
    data["partition"].update(variation=None, bordering=None, tag_entropy_bits=0.0, distances=None)
    data["dataset"].update(top_tags=[], quarantined=0, quarantine_reasons={}, near_duplicates_removed=None)
    for points in data["curves"].values():
        for point in points:
            del point["validation_precision@1"]
    data["parts"][1]["sizes"] = {"train": 0, "validation": 0, "test": 0}
    data["parts"][1].update(tags=[], typical=[], borderline=[], mean_distance=None, distances=None)
    provenance.update(commit=None, stages=[], versions={})
    page = Page(render_report(data, provenance))
    assert "No map: too large to rank (mixture)." in page.text
    ids = {attributes.get("id") for attributes in page.all("svg")}
    assert ids == {"chart-systems", "chart-sizes", "chart-networks-loss", "chart-experts-loss", "chart-decoders-loss"}


def test_an_empty_run_renders():
    data, provenance = make_data(1, 20), make_provenance(1)
    data["router"]["objective"] = []
    data.update(parts=[], curves={}, networks=[], metrics={"systems": {}, "num_test_examples": 0, "differences": {}})
    page = Page(render_report(data, provenance))
    assert "No training curve was recorded." in page.text
    assert "No part was recorded." in page.text


def test_rendering_changes_nothing_and_repeats_itself():
    data, provenance = make_data(2, 20), make_provenance(2)
    before = copy.deepcopy((data, provenance))
    first = render_report(data, provenance)
    assert (data, provenance) == before
    assert render_report(json.loads(json.dumps(data)), provenance) == first


def test_experts_beyond_eight_leave_two_coloured_curves():
    data = make_data(num_experts=9, num_points=20)
    names = sorted(name for name in data["curves"] if name.startswith("expert"))
    series = render._lines(data["curves"], names, "loss", 1.0)
    ends = {line.name: line.points[-1][1] for line in series}
    coloured = {line.name: line.style for line in series if line.style is not None}
    assert coloured == {f"{min(ends, key=ends.get)}": 0, f"{max(ends, key=ends.get)}": 1}
    assert sorted(name.split(",")[0] for name in ends) == names


@pytest.mark.parametrize(("num_experts", "each"), [(1, 24), (3, 21), (8, 8), (64, 1)])
def test_mosaic_shows_every_expert_alike(num_experts, each):
    parts = make_data(num_experts, 20)["parts"]
    expected = [exemplar["example_id"] for part in parts for exemplar in part["typical"][:each]]
    assert [exemplar["example_id"] for exemplar in render.pick_mosaic(parts)] == expected


def test_sizes_are_told_against_an_equal_share():
    parts = make_data(3, 20)["parts"]
    for part, size in zip(parts, (100, 400, 1000), strict=True):
        part["sizes"]["train"] = size
    assert render.describe_sizes(parts) == [
        ("an equal share", "500"),
        ("largest part", "expert 2: 1,000 (×2.00)"),
        ("smallest part", "expert 0: 100 (×0.20)"),
    ]


def test_balance_is_told_against_nearest_centroids_and_the_least_possible(full_page):
    data = make_data(3, 20)
    data["dataset"]["sizes"]["train"] = 3000
    data["balance"] = {
        "capacity": 1050,
        "cost": 120.0,
        "unconstrained_cost": 96.0,
        "lower_bound": 119.94,
        "serve_elsewhere": [0, 42, 1008],
    }
    text = Page(render_report(data, make_provenance(3))).text.replace("\N{NO-BREAK SPACE}", " ")
    for said in (
        "1,050 images, 35.0 %",
        "as a part takes 1,050 at most",
        "25.0 %",
        "and 0.050 % at most more than there must be",
    ):
        assert said in text, said
    assert "trained elsewhere" not in Page(full_page).text
    # As many parts as distinct images: every one lies on its centroid, and nothing can be compared.
    data["balance"] |= {"cost": 0.0, "unconstrained_cost": 0.0, "lower_bound": 0.0, "serve_elsewhere": [0]}
    words = [word for word, _, _ in describe_partition(data)]
    assert "trained elsewhere than served" in words
    assert "cost of the balance" not in words


def test_partition_is_told_with_what_every_number_means():
    text = Page(render_report(make_data(3, 20), make_provenance(3))).text.replace("\N{NO-BREAK SPACE}", " ")
    for said in (
        "0.32",
        "43.0 %",
        "1.25 bits, 20.0 %",
        "features of length zero",
        "expert 5 in pass 2",
        "near-duplicates removed",
    ):
        assert said in text, said
    assert "The fit converged after 18 passes." in text
    projected = make_data(3, 20)
    projected["router"]["transform"] = {"kind": "whiten", "components": 64, "of": 256, "explained": 0.9312}
    assert ("principal directions", "64 of 256, 93.1\N{NO-BREAK SPACE}% of the variance") in [
        fact[:2] for fact in describe_partition(projected)
    ]
    assert "with the same variance along each, after scaling" in Page(render_report(projected, make_provenance(3))).text
    unknown = make_data(3, 20)
    unknown["router"].update(zero_vectors=None, reseeded=[{"pass": 0, "expert": expert} for expert in range(40)])
    assert describe_partition(unknown)[-1][1].endswith("expert 5 in pass 0 and 34 more")
    unknown["router"]["reseeded"] = []
    assert [word for word, _, _ in describe_partition(unknown)] == ["unevenness", "on a border", "tag information"]


def test_partition_of_fine_clusters_says_how_many_make_how_many_parts():
    data = make_data(3, 20)
    assert "two levels" not in [word for word, _, _ in describe_partition(data)]
    data["router"].update(fine_clusters=[1_000, 7, 1], reseeded=[{"pass": 2, "fine_cluster": 1_003}])
    told = {word: found for word, found, _ in describe_partition(data)}
    assert told["two levels"] == "1,008 fine clusters in 3 parts"
    assert told["clusters that ran empty"] == "fine cluster 1003 in pass 2"
    assert "the expert that has the nearest of their centroids" in render_report(data, make_provenance(3))


def test_every_part_shows_its_distances_beside_those_of_all(full_page):
    page = Page(full_page)
    assert {f"distances-{expert}" for expert in range(8)} <= {attributes.get("id") for attributes in page.all("svg")}
    assert len(page.classed("area")) == len(page.classed("outline")) == 8
    assert "Quantiles: 0.3 (5 %), 0.59 (50 %), 0.8 (95 %), 0.9 (99 %)." in full_page


def test_groups_sum_the_experts():
    stages = render.group_stages(make_provenance(8)["stages"])
    experts = next(stage for stage in stages if stage["name"] == "experts (8)")
    assert (experts["seconds"], experts["units"], len(experts["members"])) == (8 * 410.5, 8, 8)
    assert [stage["name"] for stage in stages][-4:] == ["experts (8)", "embeddings", "decoder", "evaluation"]
    networks = render.group_networks(make_data(8, 20)["networks"])
    assert [(entry["name"], entry["count"]) for entry in networks] == [("trunk", 1), ("dense", 1), ("experts", 8)]
    assert networks[-1]["examples_seen"] == 8 * 2_436_880
    assert (networks[-1]["unique_examples"], networks[-1]["samples_per_epoch"]) == (8 * 304_000, 8 * 304_610 + 4)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (59.96, "1 min 00 s"), (252, "4 min 12 s"), (3599.6, "1 h 00 min"), (90_000, "25 h 00 min")],
)
def test_durations_are_said_as_people_say_them(seconds, text):
    assert render.format_duration(seconds) == text
