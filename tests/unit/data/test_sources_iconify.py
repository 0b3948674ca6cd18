"""Icon sets in Iconify's format: what is drawn is compared with squares that are counted out by hand."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from iconify_layout import LEFT_HALF, TOP_LEFT, write_package
from numpy.typing import NDArray
from PIL import Image

from hardmoe.data.config import DatasetConfig
from hardmoe.data.images import decode
from hardmoe.data.sources.base import BadExample, RawExample
from hardmoe.data.sources.iconify import IconifySource
from hardmoe.errors import DataError


def source_of(folder: Path, **changes: Any) -> IconifySource:
    return IconifySource(DatasetConfig(source="iconify", path=str(folder), **changes))


def rows_of(source: IconifySource) -> dict[str, RawExample | BadExample]:
    rows = [row for shard in source.shards() for row in source.read(shard)]
    named = {row.source_uri.removeprefix("iconify:"): row for row in rows}
    assert len(named) == len(rows)
    return named


def drawn(folder: Path, icon_set: dict[str, Any]) -> dict[str, NDArray[np.uint8]]:
    """The pictures of one set by name, uint8 [16, 16, 3]."""
    pictures = {}
    for uri, row in rows_of(source_of(write_package(folder, {"s": icon_set}), icon_size=16)).items():
        assert isinstance(row, RawExample), row
        with Image.open(io.BytesIO(row.image)) as image:
            assert image.format == "PNG"
            pictures[uri.removeprefix("s/")] = np.array(image.convert("RGB"))
    return pictures


def reason_of(folder: Path, body: str, **frame: Any) -> str | None:
    """Why a drawing is bad; None if it is good."""
    (row,) = rows_of(source_of(write_package(folder, {"s": {"icons": {"x": {"body": body, **frame}}}}))).values()
    return row.reason if isinstance(row, BadExample) else None


def black(top: int, left: int, bottom: int, right: int) -> NDArray[np.uint8]:
    """A white square of 16 pixels with a black rectangle."""
    picture_HW3 = np.full((16, 16, 3), 255, np.uint8)
    picture_HW3[top:bottom, left:right] = 0
    return picture_HW3


def test_icon_is_drawn_in_black_on_white_unless_it_has_colours(tmp_path: Path) -> None:
    red = '<path fill="#f00" d="M0 0h8v16H0z"/>'
    pictures = drawn(tmp_path, {"icons": {"black": {"body": LEFT_HALF}, "red": {"body": red}}})
    np.testing.assert_array_equal(pictures["black"], black(0, 0, 16, 8))
    assert pictures["red"][:, :8].tolist() == [[[255, 0, 0]] * 8] * 16
    assert (pictures["red"][:, 8:] == 255).all()


def test_frame_is_the_icons_own_then_the_sets_then_sixteen(tmp_path: Path) -> None:
    icons = {"set": {"body": LEFT_HALF}, "own": {"body": LEFT_HALF, "width": 16, "height": 16, "left": 0, "top": 0}}
    pictures = drawn(tmp_path / "a", {"icons": icons, "width": 32, "height": 32, "left": -8, "top": -8})
    np.testing.assert_array_equal(pictures["set"], black(4, 4, 12, 8))
    np.testing.assert_array_equal(pictures["own"], black(0, 0, 16, 8))
    np.testing.assert_array_equal(drawn(tmp_path / "b", {"icons": icons})["set"], black(0, 0, 16, 8))


def test_wide_and_high_icons_are_centred_whole(tmp_path: Path) -> None:
    wide = {"body": '<path d="M0 0h32v16H0z"/>', "width": 32, "height": 16}
    high = {"body": '<path d="M0 0h16v32H0z"/>', "width": 16, "height": 32}
    pictures = drawn(tmp_path, {"icons": {"wide": wide, "high": high}})
    np.testing.assert_array_equal(pictures["wide"], black(4, 0, 12, 16))
    np.testing.assert_array_equal(pictures["high"], black(0, 4, 16, 12))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hFlip": True}, black(0, 8, 8, 16)),
        ({"vFlip": True}, black(8, 0, 16, 8)),
        ({"rotate": 1}, black(0, 8, 8, 16)),
        ({"rotate": 3}, black(8, 0, 16, 8)),
        ({"hFlip": True, "rotate": 1}, black(8, 8, 16, 16)),
        ({"left": 4, "width": 8, "height": 8}, black(0, 0, 16, 8)),
    ],
)
def test_alias_that_changes_its_parent_is_a_picture_of_its_own(
    tmp_path: Path, changes: dict[str, Any], expected: NDArray[np.uint8]
) -> None:
    """Turns are clockwise and come after the flips, as Iconify writes them into its SVG."""
    aliases = {"changed": {"parent": "corner", **changes}}
    pictures = drawn(tmp_path, {"icons": {"corner": {"body": TOP_LEFT}}, "aliases": aliases})
    np.testing.assert_array_equal(pictures["corner"], black(0, 0, 8, 8))
    np.testing.assert_array_equal(pictures["changed"], expected)


def test_aliases_of_aliases_add_their_turns_and_cancel_their_flips(tmp_path: Path) -> None:
    aliases = {
        "a": {"parent": "corner", "rotate": 1},
        "b": {"parent": "a", "rotate": 1},
        "c": {"parent": "corner", "hFlip": True},
        "d": {"parent": "c", "hFlip": True},
    }
    pictures = drawn(tmp_path, {"icons": {"corner": {"body": TOP_LEFT}}, "aliases": aliases})
    np.testing.assert_array_equal(pictures["b"], black(8, 8, 16, 16))
    np.testing.assert_array_equal(pictures["d"], pictures["corner"])


def test_tags_are_the_words_of_names_aliases_and_categories(tmp_path: Path) -> None:
    body = {"body": LEFT_HALF}
    icons = {"home-2-outline": body, "arrow-left": body, "alone": body}
    aliases = {
        "house_b": {"parent": "home-2-outline"},
        "villa": {"parent": "house_b"},
        "arrow-right": {"parent": "arrow-left", "hFlip": True},
        "next": {"parent": "arrow-right"},
    }
    categories = {"Buildings / Places": ["villa", "nobody"], "Navigation": ["arrow-left", "next"]}
    folder = write_package(tmp_path, {"s": {"icons": icons, "aliases": aliases, "categories": categories}})
    tags = {uri: row.tags for uri, row in rows_of(source_of(folder)).items() if isinstance(row, RawExample)}
    assert tags == {
        "s/home-2-outline": ("buildings", "home", "house", "outline", "places", "villa"),
        "s/arrow-left": ("arrow", "left", "navigation"),
        "s/arrow-right": ("arrow", "navigation", "next", "right"),
        "s/alone": ("alone",),
    }


def test_licence_is_the_sets_identifier_or_else_its_title(tmp_path: Path) -> None:
    icons = {"icons": {"x": {"body": LEFT_HALF}}}
    folder = write_package(
        tmp_path,
        {
            "a": {**icons, "info": {"license": {"title": "Apache 2.0", "spdx": "Apache-2.0"}}},
            "b": {**icons, "info": {"license": {"title": "Open Font License"}}},
            "c": icons,
        },
    )
    licences = {uri: row.license for uri, row in rows_of(source_of(folder)).items() if isinstance(row, RawExample)}
    assert licences == {"a/x": "Apache-2.0", "b/x": "Open Font License", "c/x": None}


@pytest.mark.parametrize("contents", [None, {"big": {"total": 25}, "small": {"total": 3}}])
def test_large_set_is_divided_into_shards_that_hold_every_icon_once(tmp_path: Path, contents: dict[str, Any] | None) -> None:
    """The package's table of contents leaves hidden icons out, so a shard may hold a few more than asked for."""
    icons = {f"icon-{number}": {"body": LEFT_HALF} for number in range(29)}
    folder = write_package(tmp_path, {"big": {"icons": icons}, "small": {"icons": dict(list(icons.items())[:3])}}, contents)
    source = source_of(folder, shard_rows=10)
    assert [shard.name for shard in source.shards()] == ["big-00-of-03", "big-01-of-03", "big-02-of-03", "small"]
    sizes = [len(list(source.read(shard))) for shard in source.shards()]
    assert sizes == [9, 10, 10, 3]
    assert len(rows_of(source)) == 32


def test_files_are_the_sets_and_the_table_of_contents(tmp_path: Path) -> None:
    folder = write_package(tmp_path, {"b": {"icons": {}}, "a": {"icons": {}}}, {"a": {"total": 0}})
    (folder / "readme.md").write_text("not read")
    assert [file.name for file in source_of(folder).files()] == ["collections.json", "json/a.json", "json/b.json"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('<image href="{}" width="16" height="16"/>', "the element 'image' is not drawn"),
        ('<filter id="f"><feImage href="{}"/></filter>', "the element 'feImage' is not drawn"),
        ('<use href="{}#x"/>', "refers to something outside of itself"),
        ('<use xlink:href="{}#x"/>', "refers to something outside of itself"),
        ('<path fill="url({}#x)" d="M0 0h9v9z"/>', "refers to something outside of itself"),
        ("<s:image xmlns:s='http://www.w3.org/2000/svg' href='{}'/>", "the element 's:image' is not drawn"),
        ("<style>@import url({})</style>", "the element 'style' is not drawn"),
        ("<script>1</script>", "the element 'script' is not drawn"),
        ("</svg><!DOCTYPE svg [<!ENTITY a SYSTEM '{}'>]><svg>&a;", "not well-formed"),
        ("<!DOCTYPE svg [<!ENTITY a SYSTEM '{}'>]><path d='&a;'/>", "not well-formed"),
    ],
)
def test_drawing_that_reaches_for_a_file_is_bad(tmp_path: Path, body: str, reason: str) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "secret.png")
    found = reason_of(tmp_path / "package", body.format(tmp_path / "secret.png"))
    assert found is not None and found.startswith(reason)


def laughs(levels: int, copies: int) -> str:
    """Groups that each show the next one several times."""
    uses = [f'<g id="g{level}">' + f'<use href="#g{level + 1}"/>' * copies + "</g>" for level in range(levels)]
    return "".join(uses) + f'<g id="g{levels}">{TOP_LEFT}</g>'


NOISE = '<filter id="f"><feTurbulence numOctaves="999999999" baseFrequency="1"/></filter><path filter="url(#f)" d="M0 0h9v9z"/>'
MASKS = "".join(
    f'<mask id="m{level}">' + f'<rect width="9" height="9" mask="url(#m{level + 1})"/>' * 10 + "</mask>" for level in range(9)
)
TILES = '<pattern id="p" width="1e6" height="1e6" patternUnits="userSpaceOnUse"/><rect width="1e6" height="1e6" fill="url(#p)"/>'


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("<g>" * 1000 + TOP_LEFT + "</g>" * 1000, "more than 24 elements within each other"),
        ("<g>" * 1_000_000, "more than 24 elements within each other"),
        (laughs(9, 10), "more than 50000 elements"),
        (laughs(40, 1), "more than 24 elements within each other"),
        ('<g id="a"><use href="#a"/></g>', "more than 24 elements within each other, or in a circle"),
        (MASKS + '<rect width="9" height="9" mask="url(#m0)"/>', "more than 50000 elements"),
        (TOP_LEFT * 50_001, "more than 50000 elements"),
        (NOISE, "the element 'feTurbulence' is not drawn"),
        (TILES, "the element 'pattern' is not drawn"),
    ],
)
def test_drawing_that_would_hang_or_kill_the_worker_is_bad(tmp_path: Path, body: str, reason: str) -> None:
    found = reason_of(tmp_path, body)
    assert found is not None and found.startswith(reason)


def test_target_that_is_named_twice_counts_twice(tmp_path: Path) -> None:
    """Which of two elements with one id is drawn is the renderer's affair."""
    twice = f'<g id="a">{TOP_LEFT * 15_000}</g><g id="a">{TOP_LEFT}</g>' + '<use href="#a"/>' * 3
    assert (reason_of(tmp_path, twice) or "").startswith("more than 50000 elements")


@pytest.mark.parametrize(
    "frame",
    [
        {"width": 0},
        {"width": -16},
        {"height": 1e9},
        {"left": float("nan")},
        {"top": float("inf")},
        {"width": "wide"},
        {"height": []},
    ],
)
def test_impossible_frame_is_bad(tmp_path: Path, frame: dict[str, Any]) -> None:
    found = reason_of(tmp_path, LEFT_HALF, **frame)
    assert found is not None and "frame" in found


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "blank drawing"),
        ('<path fill="#fff" d="M0 0h16v16H0z"/>', "blank drawing"),
        ('<path d="M99 99h9v9z"/>', "blank drawing"),
        ("<path d='M0 0h9v9z'>", "not well-formed (mismatched tag)"),
        (None, "no body"),
        (5, "no body"),
    ],
)
def test_broken_or_blank_drawing_is_bad(tmp_path: Path, body: Any, reason: str) -> None:
    assert reason_of(tmp_path, body) == reason


def test_gradient_mask_and_copies_within_the_drawing_are_drawn(tmp_path: Path) -> None:
    body = (
        '<defs><linearGradient id="g"><stop stop-color="#f00"/></linearGradient><path id="p" d="M0 0h8v8H0z"/></defs>'
        '<mask id="m"><path fill="#fff" d="M0 0h16v8H0z"/></mask>'
        '<g mask="url(#m)"><path fill="url(\'#g\')" d="M8 0h8v16H8z"/><use xlink:href="#p"/></g>'
    )
    picture = drawn(tmp_path, {"icons": {"x": {"body": body}}})["x"]
    expected = black(0, 0, 8, 8)
    expected[:8, 8:] = (255, 0, 0)
    np.testing.assert_array_equal(picture, expected)


def test_alias_of_nothing_is_counted_as_bad(tmp_path: Path) -> None:
    aliases = {"lost": {"parent": "gone"}, "a": {"parent": "b"}, "b": {"parent": "a"}, "odd": 5, "list": {"parent": [1]}}
    categories = {"Of nothing": ["lost", 5, [1]], "No list": 7, "Half a pair \ud83d": ["x"]}
    folder = write_package(tmp_path, {"s": {"icons": {"x": {"body": LEFT_HALF}}, "aliases": aliases, "categories": categories}})
    rows = rows_of(source_of(folder))
    assert isinstance(rows.pop("s/x"), RawExample)
    assert rows.keys() == {"s/lost", "s/a", "s/b", "s/odd", "s/list"}
    assert {row.reason for row in rows.values() if isinstance(row, BadExample)} == {"no drawing of that name"}


def test_same_icon_gives_the_same_bytes_again(tmp_path: Path) -> None:
    folder = write_package(tmp_path, {"s": {"icons": {"x": {"body": TOP_LEFT}}}})
    assert rows_of(source_of(folder)) == rows_of(source_of(folder))


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (None, "npm pack @iconify/json"),
        (["a", "b"], "npm pack @iconify/json"),
        ("s3://bucket/package", "npm pack @iconify/json"),
        ("nowhere", "is not there"),
        ("archive.tgz", "tar xf archive.tgz"),
        ("empty", "has no json"),
        ("strange", "is not named like an icon set"),
    ],
)
def test_path_that_is_no_package_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Any, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "archive.tgz").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    write_package(tmp_path / "strange", {"-x y": {"icons": {}}})
    with pytest.raises(DataError, match=sentence):
        IconifySource(DatasetConfig(source="iconify", path=path))


@pytest.mark.parametrize(("text", "sentence"), [("{", "is not JSON"), ("[]", "no object 'icons'"), ('{"icons": 1}', "no object")])
def test_file_that_is_no_set_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    folder = write_package(tmp_path, {"s": {"icons": {}}}, {"s": {"total": 5}})
    (folder / "json" / "s.json").write_text(text)
    source = source_of(folder)
    with pytest.raises(DataError, match=sentence):
        list(source.read(source.shards()[0]))


def test_the_pixels_that_come_along_are_those_of_the_file(tmp_path: Path) -> None:
    """The dataset stage takes them for what the file decodes to; turned and mirrored ones are no views by then."""
    icons = {"a": {"body": LEFT_HALF}, "b": {"body": TOP_LEFT}}
    aliases = {"c": {"parent": "b", "hFlip": True}, "d": {"parent": "b", "rotate": 1}}
    write_package(tmp_path, {"s": {"prefix": "s", "icons": icons, "aliases": aliases}})
    rows = [row for row in rows_of(source_of(tmp_path)).values() if isinstance(row, RawExample)]
    assert len(rows) == 4
    for row in rows:
        np.testing.assert_array_equal(row.pixels, decode(row.image, 10**6))
