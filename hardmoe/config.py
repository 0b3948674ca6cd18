"""The base of every section of a recipe.

A field is part of the *identity* of what is computed unless it is declared with `operational(...)`: identity fields enter
fingerprints, operational ones (paths, parallelism, threads) never do. Marking the exception, not the rule, means that a
forgotten mark costs a rebuild and never a stale result. A field that came later is declared with `added(...)`: while it has
its default, finished runs know nothing of it and are still the same. Rejected: a list of hashed fields kept beside the
stages, which drifts from the fields themselves.
"""

from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Json: TypeAlias = Any
"""A value made of None, bool, int, float, str, list and dict with string keys."""

_OPERATIONAL, _ADDED = "operational", "added"


def operational(default: Any = ..., **kwargs: Any) -> Any:
    """Declare a field that says where or how to compute, never what; it stays out of every fingerprint."""
    return Field(default, json_schema_extra={_OPERATIONAL: True}, **kwargs)


def added(default: Any, **kwargs: Any) -> Any:
    """Declare a field that came after the first runs: it bears identity unless it has its default, which must never change."""
    return Field(default, json_schema_extra={_ADDED: True}, **kwargs)


class Config(BaseModel):
    """A strict, frozen section of the recipe: unknown keys are refused, every field has a docstring."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @classmethod
    def operational_fields(cls) -> set[str]:
        """Names of the fields that bear no identity."""
        return cls._marked(_OPERATIONAL)

    @classmethod
    def added_fields(cls) -> set[str]:
        """Names of the fields that bear identity only where they differ from their default."""
        return cls._marked(_ADDED)

    @classmethod
    def _marked(cls, mark: str) -> set[str]:
        fields = cls.model_fields.items()
        return {n for n, field in fields if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get(mark)}

    def identity(self) -> dict[str, Json]:
        """The fields that decide what is computed, as plain JSON values; of a section within the section, its identity."""
        unused = {name for name in self.added_fields() if getattr(self, name) == type(self).model_fields[name].default}
        values = self.model_dump(mode="json", exclude=self.operational_fields() | unused)
        return {name: _identity_of(getattr(self, name), value) for name, value in values.items()}

    def operational_values(self) -> dict[str, Json]:
        """The other fields: places, threads, intervals."""
        return self.model_dump(mode="json", include=self.operational_fields())


def _identity_of(value: Any, dumped: Json) -> Json:
    """Of a field's value, as it is when dumped; of sections within it, their identities."""
    if isinstance(value, Config):
        return value.identity()
    if isinstance(value, dict) and any(isinstance(each, Config) for each in value.values()):
        return {key: _identity_of(each, dumped[key]) for key, each in value.items()}
    return dumped
