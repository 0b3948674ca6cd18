"""`hardmoe init`: a commented recipe and its JSON Schema, both made from the sections' own fields and docstrings."""

import json
import textwrap
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hardmoe.errors import RecipeError
from hardmoe.recipe import Recipe

_WIDTH = 110
_HEADER = """\
# A hardmoe recipe. Every key is shown with its default; delete what you do not change.
# Begin:   hardmoe run -f {name}          Look first:   hardmoe run -f {name} --dry-run
"""
_EXAMPLE = {"root": "runs/photos", "dataset.path": "photos/*.parquet"}


def json_schema() -> str:
    """JSON Schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    schema["title"] = "hardmoe recipe"
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "Another recipe, of which this one states only what differs.",
    }
    return json.dumps(schema, indent=2)


def write_recipe(path: Path, force: bool) -> str:
    """Write a commented recipe; returns what to say.

    Raises:
        RecipeError: the file exists, or cannot be written.
    """
    text = _HEADER.format(name=path.name) + "\n".join(_lines(Recipe, Recipe(), ""))
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text + "\n")
    except FileExistsError as error:
        raise RecipeError(f"{path} exists already; give another path, or --force to replace it") from error
    except OSError as error:
        raise RecipeError(f"cannot write {path}: {error.strerror}; give a writable path") from error
    return f"wrote {path}; set dataset.path, then: hardmoe run -f {path}"


def _lines(section: type[BaseModel], defaults: BaseModel, prefix: str) -> list[str]:
    lines: list[str] = []
    indent = "  " * prefix.count(".")
    for name, field in section.model_fields.items():
        value = getattr(defaults, name)
        if isinstance(value, BaseModel):
            lines += [*([] if prefix else [""]), *_comment(field, indent), f"{indent}{name}:"]
            lines += _lines(type(value), value, f"{prefix}{name}.")
        else:
            lines += [*_comment(field, indent), f"{indent}{name}: {_yaml(_EXAMPLE.get(prefix + name, value))}"]
    return lines


def _comment(field: FieldInfo, indent: str) -> list[str]:
    text = " ".join((field.description or "").split())
    return [f"{indent}# {line}" for line in textwrap.wrap(text, _WIDTH - len(indent))]


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
