"""The vocabulary of a collection: counting, choosing and labelling on columns, against the same written out row by row."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer

from hardmoe.data.aliases import TagRules
from hardmoe.data.hashtags import normalise
from hardmoe.data.vocabulary import BUCKETS, COUNTS, buckets_of, choose_tags, count_tags, encode_tags, lists_of, merge_counts
from hardmoe.tables import build_table

RULES = TagRules({"sundown": "sunset", "see": "sea"})
RAW = st.lists(
    st.none() | st.lists(st.sampled_from(["#Sundown", "SUNSET", "sea", " See", "#", "sky", "Sky_", "s k y"]), max_size=6)
)


def canonical(tags: Sequence[str] | None, rules: TagRules) -> set[str]:
    """The slow way: every hashtag of a row by itself."""
    normal = {normalise(tag) for tag in tags or ()} - {""}
    return {rules.aliases.get(tag, tag) for tag in normal}


def column(rows: Sequence[Sequence[str] | None]) -> pa.ChunkedArray:
    """Rows as a column in several pieces that are slices of larger ones, as readers hand them out."""
    whole = pa.array([["padding"], *rows, ["padding"]], pa.list_(pa.string())).slice(1, len(rows))
    half = len(rows) // 2
    return pa.chunked_array([whole.slice(0, half), whole.slice(half)], pa.list_(pa.string()))


def counts_of(table: pa.Table) -> dict[str, int]:
    return dict(zip(table.column("tag").to_pylist(), table.column("count").to_pylist(), strict=True))


def counts_table(counts: dict[str, int]) -> pa.Table:
    return build_table(COUNTS, {"tag": list(counts), "count": list(counts.values())})


@given(RAW)
def test_counts_are_those_of_a_count_row_by_row(rows: list[list[str] | None]) -> None:
    expected = Counter(tag for row in rows for tag in canonical(row, RULES))
    table = count_tags(column(rows), RULES)
    assert counts_of(table) == expected
    assert table.column("tag").to_pylist() == sorted(expected)


@given(RAW, st.permutations(["sunset", "sea", "sky", "s-k-y"]), st.integers(0, 4))
def test_labels_are_those_of_a_look_up_row_by_row(rows: list[list[str] | None], names: list[str], size: int) -> None:
    index_of = {tag: index for index, tag in enumerate(names[:size])}
    labels = lists_of(encode_tags(column(rows), RULES, index_of), len(rows))
    assert labels.type == pa.list_(pa.int32())
    assert labels.to_pylist() == [sorted(index_of[tag] for tag in canonical(row, RULES) if tag in index_of) for row in rows]


@given(st.lists(st.lists(st.sampled_from(["sun", "sea", "sky", "sand", "surf"]), max_size=4), min_size=1))
def test_labels_agree_with_scikit_learn(documents: list[list[str]]) -> None:
    names = (
        choose_tags(merge_counts([count_tags(column(documents), TagRules())]), TagRules(), 1, 3).kept.column("tag").to_pylist()
    )
    if not names:
        return
    oracle = CountVectorizer(analyzer=lambda document: document, vocabulary=names, binary=True)
    expected = [row.nonzero()[0].tolist() for row in oracle.transform(documents).toarray()]
    found = encode_tags(column(documents), TagRules(), {tag: index for index, tag in enumerate(names)})
    assert lists_of(found, len(documents)).to_pylist() == expected


def test_column_without_rows_has_no_counts_and_no_labels() -> None:
    nothing = pa.chunked_array([], pa.list_(pa.string()))
    assert count_tags(nothing, RULES).num_rows == 0
    assert lists_of(encode_tags(nothing, RULES, {"sea": 0}), 0).to_pylist() == []


def test_merged_counts_are_the_sum_whatever_the_buckets() -> None:
    parts = [{f"t{number}": number + modulus for number in range(modulus)} for modulus in (30, 1, 70, 2, 50)]
    expected: Counter[str] = Counter()
    for part in parts:
        expected.update(part)
    together = pa.concat_tables([counts_table(part) for part in parts])
    bucket = buckets_of(together.column("tag"))
    assert len(np.unique(bucket)) > BUCKETS // 2
    assert bucket.max() < BUCKETS
    merged = merge_counts(together.filter(pa.array(bucket == number)) for number in range(BUCKETS))
    assert counts_of(merged) == expected
    assert merge_counts([]).num_rows == 0


def choose(counts: dict[str, int], rules: TagRules, min_count: int = 2, max_tags: int = 3):  # type: ignore[no-untyped-def]
    return choose_tags(merge_counts([counts_table(counts)]), rules, min_count, max_tags)


def test_chosen_tags_are_ordered_by_count_then_name_and_the_dropped_say_why() -> None:
    counts = {"b": 5, "a": 5, "c": 9, "rare": 1, "denied": 7, "stranger": 6, "d": 3, "é": 3, "rarer": 1, "hidden": 1}
    allow = frozenset(counts) - {"stranger"} | {"never-seen"}
    choice = choose(counts, TagRules(allow=allow, deny=frozenset({"denied", "hidden"})))
    assert choice.kept.to_pylist() == [
        {"index": 0, "tag": "c", "count": 9},
        {"index": 1, "tag": "a", "count": 5},
        {"index": 2, "tag": "b", "count": 5},
    ]
    assert [(row["tag"], row["count"], row["reason"]) for row in choice.dropped.to_pylist()] == [
        ("denied", 7, "on the deny list"),
        ("stranger", 6, "not on the allow list"),
        ("d", 3, "beyond max_tags"),
        ("é", 3, "beyond max_tags"),
        ("hidden", 1, "on the deny list"),
        ("rare", 1, "fewer than min_count"),
        ("rarer", 1, "fewer than min_count"),
    ]
    assert choice.num_dropped() == {
        "on the deny list": 2,
        "not on the allow list": 1,
        "fewer than min_count": 2,
        "beyond max_tags": 2,
    }
    assert choice.commonest == ("c", 9)


def test_commonest_tag_of_a_refusal_is_one_that_the_lists_leave() -> None:
    choice = choose({"sea": 7, "sun": 2}, TagRules(deny=frozenset({"sea"})), min_count=20)
    assert (choice.kept.num_rows, choice.commonest) == (0, ("sun", 2))
    assert choose({"sea": 7}, TagRules(allow=frozenset()), min_count=1).commonest is None


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4), st.integers(1, 4)))
def test_every_counted_tag_is_kept_or_dropped_in_python_s_own_order(counts: dict[str, int]) -> None:
    choice = choose(counts, TagRules(), 2, 2)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    pairs = [(row["tag"], row["count"]) for row in choice.kept.to_pylist()]
    assert pairs == [item for item in ranked if item[1] >= 2][:2]
    assert [(row["tag"], row["count"]) for row in choice.dropped.to_pylist()] == [item for item in ranked if item not in pairs]
