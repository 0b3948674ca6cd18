"""The user's alias table and lists: what they say, and how they are refused."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hardmoe.data.aliases import TagRules, parse_aliases, parse_list, parse_rules, read_aliases, read_list
from hardmoe.errors import DataError

PLACE = "words.txt"


def csv_file(*lines: str, encoding: str = "utf-8") -> bytes:
    return "\n".join(lines).encode(encoding)


def parquet_file(**columns: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


TABLE = {"alias": ["#Sundown", "sun_set", "abend,rot", "Sea"], "tag": ["Sun Set", "#sunset", "sundown", "sea"]}
MEANING = {"sundown": "sunset", "sun-set": "sunset", "abend,rot": "sunset"}


def test_aliases_are_normalised_and_chains_followed_to_the_end() -> None:
    rows = ["alias,tag", "#Sundown,Sun Set", "", "sun_set,#sunset", '"abend,rot",sundown', "Sea,sea"]
    assert parse_aliases(csv_file(*rows), PLACE) == MEANING


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_aliases_in_parquet_say_the_same_as_in_csv(kind: pa.DataType) -> None:
    columns = {name: pa.array(values).cast(kind) for name, values in TABLE.items()}
    assert parse_aliases(parquet_file(remark=["", "", "", ""], **columns), PLACE) == MEANING


def test_aliases_saved_by_a_spreadsheet_with_a_byte_order_mark_are_read() -> None:
    assert parse_aliases(csv_file("alias,tag", "a1,b1", encoding="utf-8-sig"), PLACE) == {"a1": "b1"}


@pytest.mark.parametrize(
    "content",
    [
        csv_file("alias,tag", "start,one", "one,two", "two,three", "three,one"),
        parquet_file(alias=["start", "one", "two", "three"], tag=["one", "two", "three", "one"]),
    ],
    ids=["csv", "parquet"],
)
def test_alias_cycle_is_refused_naming_it(content: bytes) -> None:
    with pytest.raises(DataError, match="one -> two -> three -> one"):
        parse_aliases(content, PLACE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (csv_file("from,to", "a,b"), "must begin with the line 'alias,tag', not 'from,to'"),
        (b"", "must begin with the line 'alias,tag', not ''"),
        (csv_file("alias,tag", "a,b", "c"), "line 3: 'c' is not an alias and a tag"),
        (csv_file("alias,tag", "a,b,c"), "line 2: 'a,b,c' is not"),
        (csv_file("alias,tag", "#,b"), "line 2: '#,b' is not"),
        (csv_file("alias,tag", "a,b", "A,c"), "line 3: 'a' stands for 'c' here and for 'b' above"),
        (csv_file("alias,tag", '"a,b'), "not a CSV file in UTF-8"),
        (csv_file("alias,tag", "é,b", encoding="latin-1"), "not a CSV file in UTF-8"),
        (parquet_file(alias=["a"], tags=["b"]), "must have the columns alias and tag, not alias, tags"),
        (parquet_file(alias=[1], tag=["b"]), "column 'alias' is int64, not strings"),
        (parquet_file(alias=["a", None], tag=["b", "c"]), "row 2: ',c' is not an alias and a tag"),
        (parquet_file(alias=["a"], tag=["b"])[:-30], "are not a whole Parquet file"),
    ],
)
def test_malformed_aliases_are_refused_naming_file_and_line(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        parse_aliases(content, PLACE)
    assert PLACE in str(caught.value)


def test_files_that_are_not_there_are_refused_naming_the_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the aliases .*absent\.csv cannot be read .*correct hashtags\.aliases"):
        read_aliases(str(tmp_path / "absent.csv"))
    with pytest.raises(DataError, match=r"the list .*absent\.txt cannot be read .*correct hashtags\.deny"):
        read_list(str(tmp_path / "absent.txt"), "deny")
    with pytest.raises(DataError, match=r"the list gopher://there/absent\.txt cannot be read .*correct hashtags\.allow"):
        read_list("gopher://there/absent.txt", "allow")


def test_list_is_one_hashtag_a_line_normalised_with_aliases_applied() -> None:
    content = "\ufeff#Golden_Hour\r\n\n  \nsundown\rSUNSET\n#c".encode()
    assert parse_list(content, PLACE, TagRules({"sundown": "sunset"})) == {"golden-hour", "sunset", "c"}
    assert parse_list(b"", PLACE, TagRules()) == frozenset()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a\n\n#\n", "words.txt line 3: '#' is no hashtag"), ("é".encode("latin-1"), "words.txt is not text in UTF-8")],
)
def test_malformed_list_is_refused_naming_the_line(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_list(content, PLACE, TagRules())


def test_rules_of_three_files_survive_the_way_through_json() -> None:
    contents = {"aliases": csv_file("alias,tag", "sundown,sunset"), "allow": b"sundown\nsea\n", "deny": b"sky\n"}
    rules = parse_rules(contents, dict.fromkeys(contents, PLACE))
    assert rules == TagRules({"sundown": "sunset"}, frozenset({"sunset", "sea"}), frozenset({"sky"}))
    assert TagRules.from_body(rules.body()) == rules
    assert (rules.canonical("#SunDown"), rules.canonical("..."), rules.canonical("Sky")) == ("sunset", "", "sky")


def test_no_files_are_no_rules_and_an_empty_allow_list_allows_nothing() -> None:
    nothing = dict.fromkeys(("aliases", "allow", "deny"))
    assert parse_rules(nothing, nothing) == TagRules({}, None, frozenset())
    assert parse_rules({**nothing, "allow": b""}, nothing).allow == frozenset()


def test_tag_that_is_allowed_and_denied_is_refused_even_under_an_alias() -> None:
    contents = {"aliases": csv_file("alias,tag", "sundown,sunset"), "allow": b"sundown\n", "deny": b"Sunset\nsea\n"}
    places = {"aliases": "a.csv", "allow": "yes.txt", "deny": "no.txt"}
    with pytest.raises(DataError, match=r"'sunset' is in yes\.txt \(hashtags\.allow\) and in no\.txt \(hashtags\.deny\)"):
        parse_rules(contents, places)
