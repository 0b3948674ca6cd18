"""The base of every section of a recipe.

A field is part of the *identity* of what is computed unless it is declared with `operational(...)`: identity fields enter
fingerprints, operational ones (paths, parallelism, threads) never do. Marking the exception, not the rule, means that a
forgotten mark costs a rebuild and never a stale result. Rejected: a list of hashed fields kept beside the stages, which
drifts from the fields themselves.
"""

from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Json: TypeAlias = Any
"""A value made of None, bool, int, float, str, list and dict with string keys."""

_OPERATIONAL = "operational"


def operational(default: Any = ..., **kwargs: Any) -> Any:
    """Declare a field that says where or how to compute, never what; it stays out of every fingerprint."""
    return Field(default, json_schema_extra={_OPERATIONAL: True}, **kwargs)


class Config(BaseModel):
    """A strict, frozen section of the recipe: unknown keys are refused, every field has a docstring."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @classmethod
    def operational_fields(cls) -> set[str]:
        """Names of the fields that bear no identity."""
        return {
            name
            for name, field in cls.model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get(_OPERATIONAL)
        }

    def identity(self) -> dict[str, Json]:
        """The fields that decide what is computed, as plain JSON values."""
        return self.model_dump(mode="json", exclude=self.operational_fields())

    def operational_values(self) -> dict[str, Json]:
        """The other fields: places, threads, intervals."""
        return self.model_dump(mode="json", include=self.operational_fields())
