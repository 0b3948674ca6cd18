"""Hashtags: their normal form, and strings of several."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardmoe.data.hashtags import _normalise_once, normalise, split_tags


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("#Sunset", "sunset"),
        ("##sunset", "sunset"),
        ("  # Golden_Hour! ", "golden-hour"),
        ("golden -_ hour", "golden-hour"),
        ("golden–hour", "golden-hour"),
        ("golden hour", "golden-hour"),
        ("＃ｆｕｌｌｗｉｄｔｈ", "fullwidth"),
        ("STRASSE", "strasse"),
        ("straße", "strasse"),
        ("cafe\u0301", "café"),
        ("rock'n'roll", "rock'n'roll"),
        ("c++", "c++"),
        ("日本語", "日本語"),
        ("zero\u200bwidth", "zerowidth"),
        ("❤\ufe0f", "❤"),
        ("...", ""),
        ("#", ""),
        (" _-_ ", ""),
        ("", ""),
    ],
)
def test_normalise(raw, expected):
    assert normalise(raw) == expected


@given(st.text(max_size=20))
def test_normalise_is_idempotent_and_free_of_separators(raw):
    tag = normalise(raw)
    assert normalise(tag) == tag
    assert tag == tag.strip("#-_ ") and "--" not in tag and "_" not in tag
    assert not any(character.isspace() for character in tag)


@given(st.text(st.characters(max_codepoint=127), max_size=20))
def test_normalise_ignores_hash_and_ascii_case(raw):
    assert normalise("#" + raw.upper()) == normalise(raw)


@given(st.text(st.characters(max_codepoint=127, categories=["L", "N"]), max_size=20))
def test_normalise_of_plain_words_is_what_the_general_way_comes_to(raw):
    assert normalise(raw) == _normalise_once(_normalise_once(raw))


def test_split_tags_at_whitespace_commas_and_semicolons():
    assert split_tags(" #sun #sea,beach;\tgolden-hour ,, ") == ["#sun", "#sea", "beach", "golden-hour"]
    assert split_tags("") == []
