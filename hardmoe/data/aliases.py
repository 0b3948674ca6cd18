"""The user's own words on hashtags: which are others' aliases, which are allowed, which are denied.

An alias table is CSV (what a spreadsheet saves) or Parquet, told apart by the first bytes. Lists are plain text, one hashtag
a line: since a hashtag may begin with `#`, there are no comments. All of them are normalised, and aliases are followed in the
lists too, so that allowing an alias allows its tag. Rejected: patterns and wildcards in lists, which drop what nobody saw.
"""

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from hardmoe.config import Json
from hardmoe.data.encodings import check_utf8
from hardmoe.data.hashtags import normalise
from hardmoe.data.places import read_place
from hardmoe.errors import DataError

_PARQUET = b"PAR1"


@dataclass(frozen=True)
class TagRules:
    """What a recipe says of single hashtags."""

    aliases: Mapping[str, str] = field(default_factory=dict)
    """Alias to canonical tag, as `parse_aliases` returns it."""
    allow: frozenset[str] | None = None
    """Canonical tags of which alone the vocabulary may consist; None for any."""
    deny: frozenset[str] = frozenset()
    """Canonical tags that the vocabulary must not hold."""

    def canonical(self, raw: str) -> str:
        """The canonical tag of a raw hashtag, `""` where nothing is left of it."""
        tag = normalise(raw)
        return self.aliases.get(tag, tag)

    def body(self) -> dict[str, Json]:
        """As plain JSON."""
        allow = None if self.allow is None else sorted(self.allow)
        return {"aliases": dict(sorted(self.aliases.items())), "allow": allow, "deny": sorted(self.deny)}

    @classmethod
    def from_body(cls, body: Json) -> "TagRules":
        """The reverse of `body`."""
        return cls(body["aliases"], None if body["allow"] is None else frozenset(body["allow"]), frozenset(body["deny"]))


def read_aliases(place: str) -> bytes:
    """The content of the alias table at a path or URI; raises DataError if it cannot be read."""
    return read_place(place, "the aliases", "hashtags.aliases")


def read_list(place: str, key: str) -> bytes:
    """The content of the list that `hashtags.allow` or `hashtags.deny` names; raises DataError if it cannot be read."""
    return read_place(place, "the list", f"hashtags.{key}")


def parse_rules(contents: Mapping[str, bytes | None], places: Mapping[str, str | None]) -> TagRules:
    """The rules in the files of `hashtags.aliases`, `hashtags.allow` and `hashtags.deny`.

    Args:
        contents: content by `aliases`, `allow` and `deny`; None where the recipe names no file.
        places: their paths or URIs, for messages.

    Raises:
        DataError: a file is malformed, aliases form a cycle, or a tag is both allowed and denied.
    """
    aliases = contents["aliases"]
    rules = TagRules({} if aliases is None else parse_aliases(aliases, str(places["aliases"])))
    lists = {
        key: None if (content := contents[key]) is None else parse_list(content, str(places[key]), rules)
        for key in ("allow", "deny")
    }
    rules = TagRules(rules.aliases, lists["allow"], lists["deny"] or frozenset())
    if rules.allow is not None and (both := sorted(rules.allow & rules.deny)):
        raise DataError(
            f"the hashtag {both[0]!r} is in {places['allow']} (hashtags.allow) and in {places['deny']} (hashtags.deny); "
            "take it out of one of them"
        )
    return rules


def parse_list(content: bytes, place: str, rules: TagRules) -> frozenset[str]:
    """The canonical tags of a list with one hashtag per line; blank lines say nothing.

    Raises:
        DataError: it is not text in UTF-8, or a line is no hashtag; names the line.
    """
    check_utf8(content, place)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not text in UTF-8 ({error}); save it as one hashtag per line in UTF-8") from error
    tags = set()
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if not line.strip():
            continue
        if not (tag := rules.canonical(line)):
            raise DataError(f"{place} line {number}: {line.strip()!r} is no hashtag; correct the line or delete it")
        tags.add(tag)
    return frozenset(tags)


def parse_aliases(content: bytes, place: str) -> dict[str, str]:
    """Read a table with the columns `alias` and `tag`, CSV or Parquet.

    Returns:
        Normalised alias to the normalised tag at the end of its chain; rows whose two sides have the same normal form
        say nothing and are left out.

    Raises:
        DataError: the table is malformed or not in UTF-8, an alias has two meanings, or aliases form a cycle.
    """
    rows = _parquet_rows(content, place) if content.startswith(_PARQUET) else _csv_rows(content, place)
    pairs: dict[str, str] = {}
    for where, raw in rows:
        alias, tag = (normalise(raw[0] or ""), normalise(raw[1] or "")) if len(raw) == 2 else ("", "")
        if not alias or not tag:
            shown = ",".join("" if value is None else value for value in raw)
            raise DataError(f"{place} {where}: {shown!r} is not an alias and a tag; give both")
        if pairs.setdefault(alias, tag) != tag:
            raise DataError(f"{place} {where}: {alias!r} stands for {tag!r} here and for {pairs[alias]!r} above; keep one")
    pairs = {alias: tag for alias, tag in pairs.items() if alias != tag}
    return {alias: _follow(alias, pairs, place) for alias in pairs}


def _csv_rows(content: bytes, place: str) -> Iterator[tuple[str, list[str | None]]]:
    """Where every row is, and its cells."""
    check_utf8(content, place)
    try:
        rows = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        header = [name.strip() for name in next(rows, [])]
        if header != ["alias", "tag"]:
            raise DataError(f"{place} must begin with the line 'alias,tag', not {','.join(header)!r}; add that header")
        for row in rows:
            if row:
                yield f"line {rows.line_num}", list(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"the aliases {place} are not a CSV file in UTF-8 ({error}); save them as one") from error


def _parquet_rows(content: bytes, place: str) -> Iterator[tuple[str, list[str | None]]]:
    try:
        table = pq.read_table(pa.BufferReader(content), use_threads=False, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"the aliases {place} are not a whole Parquet file ({reason}); write it again") from error
    columns = []
    for name in ("alias", "tag"):
        if table.column_names.count(name) != 1:
            raise DataError(f"{place} must have the columns alias and tag, not {', '.join(table.column_names)}; rename them")
        column = table.column(name)
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{place}: column '{name}' is {kind}, not strings; convert it")
        columns.append(column.to_pylist())
    for number, row in enumerate(zip(*columns, strict=True), start=1):
        yield f"row {number}", list(row)


def _follow(alias: str, pairs: Mapping[str, str], place: str) -> str:
    """The tag at the end of the chain that begins with `alias`."""
    chain = [alias]
    while (tag := pairs.get(chain[-1])) is not None:
        if tag in chain:
            cycle = [*chain[chain.index(tag) :], tag]
            raise DataError(f"{place}: the aliases {' -> '.join(cycle)} go round in a circle; remove one of these lines")
        chain.append(tag)
    return chain[-1]
