"""The recipe: all sections together, from a YAML file and the command line to one strict, typed object.

A recipe may say `extends: other.yaml` and state only what differs; `--set a.b=c` comes last. Every mistake is one sentence
that names the key and the nearest valid one. Rejected: Hydra and OmegaConf, whose composition and interpolation are a
language of their own, and defaults spread over several files.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from hardmoe.config import Config, operational
from hardmoe.data.config import DatasetConfig, HashtagsConfig
from hardmoe.decoder.config import DecoderConfig
from hardmoe.errors import RecipeError
from hardmoe.evaluation.config import EvaluationConfig
from hardmoe.execution.config import ExecutionConfig
from hardmoe.experts.config import ExpertsConfig
from hardmoe.partitioning.config import PartitionConfig
from hardmoe.trunk.config import TrunkConfig

DEFAULT_PATH = "hardmoe.yaml"


class Recipe(Config):
    """What to build, and separately where and how."""

    root: str = operational("runs/hardmoe")
    """Directory (path or URI) of the run; relative to the current directory."""
    reuse: list[str] = operational(default_factory=list)
    """Roots of other runs, to take an artifact from when its fingerprint is the same."""
    dataset: DatasetConfig = Field(default_factory=DatasetConfig)
    """Which examples there are, and which of them are held out."""
    hashtags: HashtagsConfig = Field(default_factory=HashtagsConfig)
    """Which hashtags the networks learn."""
    trunk: TrunkConfig = Field(default_factory=TrunkConfig)
    """The network whose features decide the partition."""
    partition: PartitionConfig = Field(default_factory=PartitionConfig)
    """How the images are divided among the experts."""
    experts: ExpertsConfig = Field(default_factory=ExpertsConfig)
    """How every expert, and the dense baseline, is trained."""
    decoder: DecoderConfig = Field(default_factory=DecoderConfig)
    """How alignment and shared decoder are fitted."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """What is measured, against which controls."""
    seed: int = Field(0, ge=0)
    """Every random choice of the run derives from it."""
    execution: ExecutionConfig = operational(default_factory=ExecutionConfig)
    """Where units run; never part of a fingerprint."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        own = self.experts.backbone not in (None, self.trunk.backbone)
        if own and self.experts.init == "trunk":
            raise ValueError(
                f"experts.init is 'trunk' but experts.backbone '{self.experts.backbone}' is not the trunk's "
                f"'{self.trunk.backbone}'; set experts.init: random, or leave experts.backbone out"
            )
        return self

    def what(self) -> dict[str, Any]:
        """The identity of all sections, nested as in the file."""
        sections = {name: getattr(self, name) for name in type(self).model_fields if name not in self.operational_fields()}
        return {name: value.identity() if isinstance(value, Config) else value for name, value in sections.items()}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, extend, override and check a recipe.

    Args:
        path: the YAML file.
        overrides: `a.b=c` each, the value in YAML.

    Raises:
        RecipeError: anything about it is wrong; says what and how to mend it.
    """
    body = _read_extended(path, ())
    for text in overrides:
        _override(body, text)
    return parse_recipe(body, str(path))


def parse_recipe(body: Mapping[str, Any], where: str) -> Recipe:
    """Check a recipe given as nested dictionaries.

    Raises:
        RecipeError: the first mistake found, with the key and the remedy.
    """
    try:
        return Recipe.model_validate(body)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error)}") from error


def _read_extended(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in seen:
        chain = " -> ".join(str(p) for p in (*seen, resolved))
        raise RecipeError(f"{path}: 'extends' goes round in a circle ({chain}); break it")
    body = _read(path)
    base = body.pop("extends", None)
    if base is None:
        return body
    if not isinstance(base, str):
        raise RecipeError(f"{path}: 'extends' must be the path of one recipe, not {base!r}")
    return _merged(_read_extended(path.parent / base, (*seen, resolved)), body)


def _read(path: Path) -> dict[str, Any]:
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"there is no recipe {path}; name one with -f FILE, or write one with 'hardmoe init'") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}; give a readable YAML file in UTF-8") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise RecipeError(f"{path} must be a mapping of sections such as 'dataset:', not a {type(body).__name__}")
    return body


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key; anything else is replaced."""
    merged = dict(base)
    for key, value in top.items():
        there = merged.get(key)
        merged[key] = _merged(there, value) if isinstance(there, Mapping) and isinstance(value, Mapping) else value
    return merged


def _override(body: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {text!r} is not of the form key=value, such as --set partition.experts=16")
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = body.setdefault(section, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {text!r}: '{section}' is a value, not a section")
        body = inner
    try:
        body[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {text!r}: the value is not YAML: {' '.join(str(error).split())}") from error


def _explain(error: ValidationError) -> str:
    """The first mistake as one sentence, and how many more there are."""
    problems = error.errors(include_url=False)
    first = problems[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'; {_nearest(location)}{more}"
    if first["type"] == "value_error":
        sentence = str(first["ctx"]["error"]) if "ctx" in first else first["msg"]
        return f"{key + ': ' if key else ''}{sentence}{more}"
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}{more}"


def _nearest(location: Sequence[str]) -> str:
    section: type[BaseModel] = Recipe
    for part in location[:-1]:
        inner = section.model_fields[part].annotation
        assert isinstance(inner, type) and issubclass(inner, BaseModel)
        section = inner
    names = list(section.model_fields)
    close = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
    elsewhere = [f"{name}.{location[-1]}" for name, field in Recipe.model_fields.items() if _has(field.annotation, location[-1])]
    if close:
        return f"did you mean '{'.'.join((*location[:-1], close[0]))}'?"
    if elsewhere:
        return f"did you mean '{elsewhere[0]}'?"
    return f"the keys here are {', '.join(names)}"


def _has(annotation: Any, name: str) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel) and name in annotation.model_fields
