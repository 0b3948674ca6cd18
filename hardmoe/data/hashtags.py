"""Hashtags: from what people typed to the indices that the networks learn.

Raw hashtags are kept as they came; their normal form, the aliases and the vocabulary are applied when labels are made, so
an edited alias never rewrites an image. The normal form is repeated until nothing changes, which makes it idempotent by
construction: NFKC, case folding and stripping each can undo what another has done. Rejected: stemming and translation,
which merge tags that mean different things and belong into the user's alias file.
"""

import csv
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Self

from hardmoe.errors import DataError

_BETWEEN_TAGS = re.compile(r"[\s,;，、；]+")
_INVISIBLE = frozenset({"Cc", "Cf", "Cs"})
_SEPARATORS = frozenset({"Pd", "Pc", "Zs", "Zl", "Zp"})


def _visible_or_separator(character: str) -> str:
    category = unicodedata.category(character)
    if category in _SEPARATORS or character.isspace():
        return "-"
    # Variation selectors choose the drawing of an emoji, not its meaning.
    if category in _INVISIBLE or "\ufe00" <= character <= "\ufe0f":
        return ""
    return character


def _normalise_once(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    if not text.isalnum():
        text = re.sub("-+", "-", "".join(map(_visible_or_separator, text)))
    start, end = 0, len(text)
    while start < end and unicodedata.category(text[start])[0] == "P":
        start += 1
    while end > start and unicodedata.category(text[end - 1])[0] == "P":
        end -= 1
    return unicodedata.normalize("NFKC", text[start:end])


# A collection repeats its hashtags, so most calls are answered from here; the bound keeps a worker's memory small.
@lru_cache(maxsize=1 << 16)
def normalise(raw: str) -> str:
    """The normal form of one hashtag: `" #Golden_Hour! "` becomes `golden-hour`; idempotent.

    Compatibility forms are unified (NFKC), case is folded, invisible characters go, every run of spaces, dashes and
    underscores becomes one `-`, and punctuation around the tag, such as `#`, is stripped.

    Returns:
        The normal form, `""` when nothing is left.
    """
    while (text := _normalise_once(raw)) != raw:
        raw = text
    return text


def split_tags(text: str) -> list[str]:
    """The raw hashtags in one string, in order: split at whitespace, commas and semicolons."""
    return [part for part in _BETWEEN_TAGS.split(text) if part]


def _read_alias_rows(path: Path) -> dict[str, str]:
    """The file's rows, normalised, before chains are followed."""
    pairs: dict[str, str] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        header = [name.strip() for name in next(rows, [])]
        if header != ["alias", "tag"]:
            raise DataError(f"{path} must begin with the line 'alias,tag', not {','.join(header)!r}; add that header")
        for row in rows:
            if not row:
                continue
            alias, tag = (normalise(row[0]), normalise(row[1])) if len(row) == 2 else ("", "")
            if not alias or not tag:
                raise DataError(f"{path} line {rows.line_num}: {','.join(row)!r} is not an alias and a tag; give both")
            if pairs.setdefault(alias, tag) != tag:
                raise DataError(
                    f"{path} line {rows.line_num}: {alias!r} stands for {tag!r} here and for {pairs[alias]!r} above; keep one"
                )
    return pairs


def _follow(alias: str, pairs: Mapping[str, str], path: Path) -> str:
    """The tag at the end of the chain that begins with `alias`."""
    chain = [alias]
    while (tag := pairs.get(chain[-1])) is not None:
        if tag in chain:
            cycle = [*chain[chain.index(tag) :], tag]
            raise DataError(f"{path}: the aliases {' -> '.join(cycle)} go round in a circle; remove one of these lines")
        chain.append(tag)
    return chain[-1]


def load_aliases(path: Path) -> dict[str, str]:
    """Read a CSV file with the columns `alias,tag`.

    Returns:
        Normalised alias to the normalised tag at the end of its chain; lines whose two sides have the same normal form
        say nothing and are left out.

    Raises:
        DataError: the file is missing or malformed, an alias has two meanings, or aliases form a cycle.
    """
    try:
        pairs = _read_alias_rows(path)
    except OSError as error:
        raise DataError(f"the aliases {path} cannot be read ({error.strerror}); correct hashtags.aliases") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"the aliases {path} are not a CSV file in UTF-8 ({error}); save them as one") from error
    pairs = {alias: tag for alias, tag in pairs.items() if alias != tag}
    return {alias: _follow(alias, pairs, path) for alias in pairs}


def canonical_tags(raw: Iterable[str], aliases: Mapping[str, str]) -> list[str]:
    """Normal forms of raw hashtags with aliases replaced, sorted, each once.

    Args:
        raw: hashtags as they came.
        aliases: what `load_aliases` returned, or an empty mapping.
    """
    normal = {normalise(tag) for tag in raw} - {""}
    return sorted({aliases.get(tag, tag) for tag in normal})


@dataclass(frozen=True)
class Vocabulary:
    """The hashtags that the networks learn; an index is a tag's place in `tags`."""

    tags: tuple[str, ...]
    """Canonical tags, the commonest first; equally common ones in alphabetical order."""
    counts: tuple[int, ...]
    """On how many examples each tag was seen."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Alias to canonical tag, as `load_aliases` returns it."""
    num_below_min_count: int = 0
    """How many distinct tags were dropped for being rarer than `min_count`."""
    num_beyond_max_tags: int = 0
    """How many distinct tags were common enough but beyond `max_tags`."""

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], min_count: int, max_tags: int, aliases: Mapping[str, str]) -> Self:
        """Choose the vocabulary.

        Args:
            counts: canonical tag (see `canonical_tags`) to the number of examples that carry it.
            min_count: rarer tags are dropped.
            max_tags: at most so many are kept.
            aliases: the aliases that the counts were made with.

        Raises:
            DataError: no tag is left.
            ValueError: a counted tag is an alias, so the counts are not of canonical tags.
        """
        if mistaken := sorted(tag for tag in counts if tag in aliases):
            raise ValueError(f"counts must be of canonical tags; {mistaken[0]!r} is an alias of {aliases[mistaken[0]]!r}")
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if not ranked:
            raise DataError("no example has a hashtag; correct dataset.tags_column")
        frequent = [item for item in ranked if item[1] >= min_count]
        if not frequent:
            commonest, largest = ranked[0]
            raise DataError(
                f"no hashtag is on hashtags.min_count={min_count} examples: the commonest, {commonest!r}, is on {largest}; "
                f"set hashtags.min_count to {largest} or less, or add data"
            )
        kept = frequent[:max_tags]
        return cls(
            tags=tuple(tag for tag, _ in kept),
            counts=tuple(count for _, count in kept),
            aliases=dict(aliases),
            num_below_min_count=len(ranked) - len(frequent),
            num_beyond_max_tags=len(frequent) - len(kept),
        )

    @cached_property
    def _index_of(self) -> dict[str, int]:
        return {tag: index for index, tag in enumerate(self.tags)}

    def encode(self, raw_tags: Sequence[str]) -> list[int]:
        """Indices of raw hashtags, ascending, each once; tags outside the vocabulary are left out."""
        index_of = self._index_of
        return sorted(index_of[tag] for tag in canonical_tags(raw_tags, self.aliases) if tag in index_of)

    def __len__(self) -> int:
        return len(self.tags)
