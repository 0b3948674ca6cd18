"""Hashtags: normal form, aliases, vocabulary."""

import pickle
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer

from hardmoe.data.hashtags import Vocabulary, canonical_tags, load_aliases, normalise, split_tags
from hardmoe.errors import DataError


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


def test_split_tags_at_whitespace_commas_and_semicolons():
    assert split_tags(" #sun #sea,beach;\tgolden-hour ,, ") == ["#sun", "#sea", "beach", "golden-hour"]
    assert split_tags("") == []


def write_aliases(tmp_path, *lines, encoding="utf-8"):
    path = tmp_path / "aliases.csv"
    path.write_bytes("\n".join(lines).encode(encoding))
    return path


def test_aliases_are_normalised_and_chains_followed_to_the_end(tmp_path):
    path = write_aliases(tmp_path, "alias,tag", "#Sundown,Sun Set", "", "sun_set,#sunset", '"abend,rot",sundown', "Sea,sea")
    assert load_aliases(path) == {"sundown": "sunset", "sun-set": "sunset", "abend,rot": "sunset"}


def test_aliases_saved_by_a_spreadsheet_with_a_byte_order_mark_are_read(tmp_path):
    assert load_aliases(write_aliases(tmp_path, "alias,tag", "a1,b1", encoding="utf-8-sig")) == {"a1": "b1"}


def test_alias_cycle_is_refused_naming_it(tmp_path):
    path = write_aliases(tmp_path, "alias,tag", "start,one", "one,two", "two,three", "three,one")
    with pytest.raises(DataError, match="one -> two -> three -> one"):
        load_aliases(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["from,to", "a,b"], "must begin with the line 'alias,tag', not 'from,to'"),
        ([], "must begin with the line 'alias,tag', not ''"),
        (["alias,tag", "a,b", "c"], "line 3: 'c' is not an alias and a tag"),
        (["alias,tag", "a,b,c"], "line 2: 'a,b,c' is not"),
        (["alias,tag", "#,b"], "line 2: '#,b' is not"),
        (["alias,tag", "a,b", "A,c"], "line 3: 'a' stands for 'c' here and for 'b' above"),
        (["alias,tag", '"a,b'], "not a CSV file in UTF-8"),
    ],
)
def test_malformed_aliases_are_refused_naming_file_and_line(tmp_path, lines, message):
    path = write_aliases(tmp_path, *lines)
    with pytest.raises(DataError, match=message) as caught:
        load_aliases(path)
    assert str(path) in str(caught.value)


def test_aliases_in_another_encoding_or_missing_are_refused(tmp_path):
    with pytest.raises(DataError, match="not a CSV file in UTF-8"):
        load_aliases(write_aliases(tmp_path, "alias,tag", "é,b", encoding="latin-1"))
    with pytest.raises(DataError, match=r"absent\.csv cannot be read .*correct hashtags\.aliases"):
        load_aliases(tmp_path / "absent.csv")


def test_canonical_tags_are_sorted_unique_and_follow_aliases():
    assert canonical_tags(["#Sundown", "sea", "SUNSET", "#", "Sea "], {"sundown": "sunset"}) == ["sea", "sunset"]


def test_vocabulary_orders_by_count_then_name_and_says_what_it_dropped():
    counts = {"b": 5, "a": 5, "c": 9, "rare": 1, "rarer": 1, "d": 3}
    vocabulary = Vocabulary.from_counts(counts, min_count=2, max_tags=3, aliases={})
    assert (vocabulary.tags, vocabulary.counts) == (("c", "a", "b"), (9, 5, 5))
    assert (vocabulary.num_below_min_count, vocabulary.num_beyond_max_tags) == (2, 1)
    assert len(vocabulary) == 3


@given(st.lists(st.lists(st.sampled_from(["sun", "sea", "sky", "sand", "surf"]), max_size=4), min_size=1))
def test_encode_agrees_with_scikit_learn(documents):
    counts = Counter(tag for document in documents for tag in set(document))
    if not counts:
        return
    vocabulary = Vocabulary.from_counts(counts, min_count=1, max_tags=3, aliases={})
    oracle = CountVectorizer(analyzer=lambda document: document, vocabulary=list(vocabulary.tags), binary=True)
    expected = [row.nonzero()[0].tolist() for row in oracle.transform(documents).toarray()]
    assert [vocabulary.encode(document) for document in documents] == expected


def test_encode_applies_normal_form_and_aliases_and_drops_the_unknown():
    vocabulary = Vocabulary.from_counts({"sunset": 3, "sea": 2}, 1, 10, {"sundown": "sunset"})
    assert vocabulary.encode(["#SEA", "sundown", "Sunset", "mountain"]) == [0, 1]
    assert vocabulary.encode([]) == []


def test_vocabulary_survives_pickling_after_use():
    vocabulary = Vocabulary.from_counts({"sunset": 3}, 1, 10, {})
    vocabulary.encode(["sunset"])
    assert pickle.loads(pickle.dumps(vocabulary)) == vocabulary


def test_nothing_frequent_enough_names_min_count_the_largest_count_and_the_remedy():
    with pytest.raises(DataError, match=r"min_count=20 .*'sea', is on 7; set hashtags\.min_count to 7 or less"):
        Vocabulary.from_counts({"sea": 7, "sun": 2}, min_count=20, max_tags=10, aliases={})


def test_no_hashtags_at_all_points_to_the_column():
    with pytest.raises(DataError, match=r"dataset\.tags_column"):
        Vocabulary.from_counts({}, min_count=1, max_tags=10, aliases={})


def test_counts_of_an_alias_are_a_programming_mistake():
    with pytest.raises(ValueError, match="'sundown' is an alias of 'sunset'"):
        Vocabulary.from_counts({"sundown": 3}, 1, 10, {"sundown": "sunset"})
