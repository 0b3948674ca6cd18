"""The base of every section: strict, frozen, and divided into what is computed and where or how."""

from typing import Any

import pytest
from pydantic import ValidationError

from hardmoe.config import Config, added, operational


class Section(Config):
    """A section for these tests."""

    rate: float = 0.5
    """Identity."""
    count: int = 3
    """Identity."""
    place: str | None = operational(None)
    """Operational."""
    threads: int = operational(1, ge=1)
    """Operational."""


def test_identity_holds_every_field_but_the_operational_ones() -> None:
    section = Section(rate=0.25, place="/data", threads=4)
    assert section.identity() == {"rate": 0.25, "count": 3}
    assert section.operational_values() == {"place": "/data", "threads": 4}
    assert Section(**section.identity(), **section.operational_values()) == section


def test_a_field_is_identity_unless_it_says_otherwise() -> None:
    """A forgotten mark costs a rebuild, and never a stale result."""

    class Wider(Section):
        extra: int = 1

    assert "extra" in Wider().identity()
    assert Wider.operational_fields() == {"place", "threads"}


def test_a_field_that_came_later_bears_identity_only_where_it_was_set() -> None:
    """A root built before the field existed must still be the recipe's, and one that uses it another."""

    class Later(Section):
        ratio: float | None = added(None, ge=1.0)

    assert Later().identity() == Later(ratio=None).identity() == Section().identity()
    assert Later(ratio=1.5).identity() == {**Section().identity(), "ratio": 1.5}
    assert Later.model_validate(Section().identity()) == Later()
    assert Later.added_fields() == {"ratio"}
    assert "ratio" not in Later(ratio=1.5).operational_values()


def test_a_section_within_a_section_bears_its_own_identity() -> None:
    """A key added to the inner section later must not change the outer one's fingerprints."""

    class Inner(Config):
        first: int = added(0)
        second: float = added(0.5)
        place: str | None = operational(None)

    class Outer(Section):
        inner: Inner = added(Inner())

    assert Outer().identity() == Section().identity()
    assert Outer(inner=Inner(first=1, place="/data")).identity() == {**Section().identity(), "inner": {"first": 1}}


@pytest.mark.parametrize(
    "values",
    [
        {"unknown": 1},
        {"rate": float("nan")},
        {"rate": float("inf")},
        {"threads": 0},
        {"count": True},
        {"count": 2.5},
        {"count": "3"},
        {"rate": "fast"},
        {"place": 7},
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_and_not_converted(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Section(**values)


def test_a_section_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Section().count = 4


def test_the_text_under_a_field_is_its_description() -> None:
    assert Section.model_fields["threads"].description == "Operational."
