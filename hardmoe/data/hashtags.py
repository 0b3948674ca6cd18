"""Hashtags: from what people typed to a normal form.

Raw hashtags are kept as they came; their normal form, the aliases and the vocabulary (modules of those names) are applied
when labels are made, so an edited alias never rewrites an image. The normal form is repeated until nothing changes, which
makes it idempotent by construction: NFKC, case folding and stripping each can undo what another has done. Rejected: stemming
and translation, which merge tags that mean different things and belong into the user's alias file.
"""

import re
import unicodedata
from functools import lru_cache

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
    if raw.isascii() and raw.isalnum():
        return raw.lower()  # what the general way comes to for most hashtags, in a tenth of its time
    while (text := _normalise_once(raw)) != raw:
        raw = text
    return text


def split_tags(text: str) -> list[str]:
    """The raw hashtags in one string, in order: split at whitespace, commas and semicolons."""
    return [part for part in _BETWEEN_TAGS.split(text) if part]
