"""Text that is not UTF-8: refused by its first bytes, whatever the encoding, in every file of the user's that is text."""

from collections.abc import Callable

import pytest

from hardmoe.data.aliases import TagRules, parse_aliases, parse_list
from hardmoe.data.encodings import check_utf8
from hardmoe.errors import DataError

READERS: dict[str, Callable[[bytes], object]] = {
    "aliases": lambda content: parse_aliases(content, "words.csv"),
    "list": lambda content: parse_list(content, "words.csv", TagRules()),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
        ("utf-32", "UTF-32"),
        ("utf-32-le", "UTF-32LE"),
        ("utf-32-be", "UTF-32BE"),
    ],
)
def test_text_of_two_bytes_a_character_is_refused_with_the_command_that_converts_it(
    reader: str, encoding: str, named: str
) -> None:
    """What a spreadsheet saves as "Unicode text" was refused for a NUL in its header, or read as hashtags with NULs in them."""
    content = "alias,tag\nsundown,sunset\n".encode(encoding)
    with pytest.raises(DataError) as caught:
        READERS[reader](content)
    assert str(caught.value) == (
        f"words.csv is text in {named}, not in UTF-8; save it as UTF-8, or convert it with "
        f"'iconv -f {named} -t UTF-8 words.csv > words-utf8.csv' and name that file"
    )


def test_mark_of_the_other_byte_order_is_known_and_a_place_may_be_a_uri() -> None:
    with pytest.raises(DataError, match=r"^s3://b/x/words\.txt is text in UTF-16, .* UTF-8 words\.txt > words-utf8\.txt'"):
        check_utf8(b"\xfe\xff" + "é".encode("utf-16-be"), "s3://b/x/words.txt")


@pytest.mark.parametrize(
    "content", [b"", b"a", b"ab", b"alias,tag", "éß".encode(), "日本".encode(), b"\xef\xbb\xbfa,b", b"a\n\nb"]
)
def test_utf8_is_let_through(content: bytes) -> None:
    check_utf8(content, "words.csv")
