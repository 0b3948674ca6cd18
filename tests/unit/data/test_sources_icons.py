"""The icon fonts as a source, on a few glyphs of the fonts that qtawesome ships."""

import json
import pickle
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from hardmoe.data.config import DatasetConfig
from hardmoe.data.images import decode
from hardmoe.data.sources import icons
from hardmoe.data.sources.base import BadExample, RawExample
from hardmoe.data.sources.icons import IconsSource, tags_of
from hardmoe.errors import DataError

FONTS = Path(find_spec("qtawesome").submodule_search_locations[0]) / "fonts"
ELUSIVE = next(FONTS.glob("elusiveicons*.ttf"))
CODES = json.loads(next(FONTS.glob("elusiveicons*.json")).read_text())


def add_font(folder, stem, charmap, suffix="", font=ELUSIVE):
    shutil.copy(font, folder / f"{stem}{suffix}.ttf")
    (folder / f"{stem}-charmap{suffix}.json").write_text(json.dumps(charmap))


def read_all(source):
    return [row for shard in source.shards() for row in source.read(shard)]


def drawn(folder, **charmap):
    add_font(folder, "one", charmap)
    return read_all(IconsSource(DatasetConfig(source="icons", path=str(folder))))


def test_packaged_fonts_are_listed_without_their_older_majors():
    source = IconsSource(DatasetConfig(source="icons"))
    names = [shard.name for shard in source.shards()]
    assert {"ei", "fa6", "fa6b", "fa6s", "mdi6", "ph", "ri"} <= set(names)
    assert not {"fa5", "fa5b", "fa5s", "mdi5"} & set(names)
    assert sum(len(json.loads((FONTS / shard.items["charmap"]).read_bytes())) for shard in source.shards()) > 15_000
    assert "qtawesome" not in sys.modules  # it needs Qt


def test_files_are_the_fonts_and_charmaps_of_the_shards():
    source = IconsSource(DatasetConfig(source="icons"))
    expected = {name for shard in source.shards() for name in (shard.items["font"], shard.items["charmap"])}
    files = source.files()
    assert {file.name for file in files} == expected and files == sorted(files, key=lambda file: file.name)
    assert all(Path(file.path).stat().st_size == file.size > 0 for file in files)


def test_newest_version_wins_and_styles_keep_their_own_shard(tmp_path):
    for stem, suffix in [
        ("fontawesome4.7-webfont", ""),
        ("fontawesome5-solid-webfont", "-5.15.4"),
        ("fontawesome10-solid-webfont", "-10.2.0"),
        ("fontawesome10-solid-webfont", "-10.10.0"),
        ("fontawesome10-sharp-webfont", "-10.2.0"),
        ("fontawesome10-regular-webfont", "-10.2.0"),
        ("mine", ""),
    ]:
        add_font(tmp_path, stem, {}, suffix)
    shutil.copy(ELUSIVE, tmp_path / "without-charmap.ttf")
    shards = IconsSource(DatasetConfig(source="icons", path=str(tmp_path))).shards()
    assert [shard.name for shard in shards] == ["fa10", "fa10-sharp", "fa10s", "mine"]
    assert shards[2].items["font"] == "fontawesome10-solid-webfont-10.10.0.ttf"


def test_every_glyph_of_a_packaged_font_is_drawn_once_and_the_same_each_time():
    source = IconsSource(DatasetConfig(source="icons"))
    shard = next(shard for shard in source.shards() if shard.name == "ei")
    rows = list(source.read(shard))
    assert len(rows) == len(set(CODES.values())) == len({row.source_uri for row in rows})
    again = IconsSource(DatasetConfig(source="icons")).read(pickle.loads(pickle.dumps(shard)))
    assert [next(again) for _ in range(40)] == rows[:40]


@pytest.mark.parametrize("size", [16, 32, 48])
def test_glyph_is_black_on_white_centred_and_fills_the_square_but_for_a_margin(tmp_path, size):
    names = ["arrow-up", "address-book", "minus", "resize-vertical"]
    add_font(tmp_path, "one", {name: CODES[name] for name in names})
    rows = read_all(IconsSource(DatasetConfig(source="icons", path=str(tmp_path), icon_size=size)))
    assert len(rows) == len(names)
    for row in rows:
        pixels = decode(row.image, 10_000)
        assert pixels.shape == (size, size, 3) and (pixels == pixels[..., :1]).all()
        ink = pixels[..., 0] < 255
        assert pixels.min() < 60 and not ink[[0, -1]].any() and not ink[:, [0, -1]].any()
        (top, bottom), (left, right) = ((np.flatnonzero(ink.any(axis))[[0, -1]]) for axis in (1, 0))
        margin = max(1, size // 16)
        assert max(bottom - top, right - left) + 1 == size - 2 * margin
        assert abs(top - (size - 1 - bottom)) <= 1 and abs(left - (size - 1 - right)) <= 1


def test_tags_are_the_words_of_all_names_of_a_glyph(tmp_path):
    code = CODES["arrow-up"]
    (row,) = drawn(tmp_path, **{"go-up_2": code, "arrow-x-4k": code})
    assert isinstance(row, RawExample)
    assert row.tags == ("4k", "arrow", "go", "up")
    assert row.source_uri == "icons:one/arrow-x-4k"


def test_numbers_and_single_letters_are_no_tags():
    assert tags_of(["numeric-5-b", "500px", "a_z-5"]) == ("500px", "numeric")


def test_blank_and_missing_glyphs_are_bad_examples(tmp_path):
    codes = json.loads(next(FONTS.glob("codicon*.json")).read_text())
    charmap = {"blank": codes["blank"], "absent": "0x4e00", "add": codes["add"]}
    add_font(tmp_path, "one", charmap, font=next(FONTS.glob("codicon*.ttf")))
    rows = {row.source_uri: row for row in read_all(IconsSource(DatasetConfig(source="icons", path=str(tmp_path))))}
    assert rows["icons:one/blank"] == BadExample("icons:one/blank", "blank glyph")
    assert isinstance(rows["icons:one/add"], RawExample) and len(rows) == 3
    # A font draws its own sign for a missing glyph, or nothing.
    assert rows["icons:one/absent"].reason in {"blank glyph", "glyph missing from the font"}
    assert drawn(tmp_path, absent="0x4e00") == [BadExample("icons:one/absent", "glyph missing from the font")]


def test_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr(icons, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'hardmoe\[demo\]'"):
        IconsSource(DatasetConfig(source="icons"))


def test_folder_without_fonts_and_list_of_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no icon fonts .*dataset\.path"):
        IconsSource(DatasetConfig(source="icons", path=str(tmp_path)))
    with pytest.raises(DataError, match="is a list"):
        IconsSource(DatasetConfig(source="icons", path=[str(tmp_path)]))


@pytest.mark.parametrize("content", ["not json", "[1, 2]", '{"name": "xyz"}', '{"name": 7}'])
def test_broken_charmap_is_refused_naming_it(tmp_path, content):
    add_font(tmp_path, "one", {})
    (tmp_path / "one-charmap.json").write_text(content)
    with pytest.raises(DataError, match=r"one-charmap\.json is not"):
        read_all(IconsSource(DatasetConfig(source="icons", path=str(tmp_path))))


def test_broken_font_is_refused_naming_it(tmp_path):
    add_font(tmp_path, "one", {})
    (tmp_path / "one.ttf").write_bytes(b"no font")
    with pytest.raises(DataError, match=r"one\.ttf is not a font"):
        read_all(IconsSource(DatasetConfig(source="icons", path=str(tmp_path))))
