"""The recipe: all sections together, from a YAML file and the command line to one strict, typed object.

A recipe may say `extends: other.yaml` and state only what differs; `--set a.b=c` comes last. Every mistake is one sentence
that names the key and the nearest valid one. Rejected: Hydra and OmegaConf, whose composition and interpolation are a
language of their own, and defaults spread over several files.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from hardmoe.config import Config, added, operational
from hardmoe.data.config import DatasetConfig, HashtagsConfig
from hardmoe.decoder.config import DecoderConfig
from hardmoe.distil.config import StudentConfig
from hardmoe.errors import RecipeError
from hardmoe.evaluation.config import EvaluationConfig
from hardmoe.execution.config import ExecutionConfig
from hardmoe.experts.config import ExpertsConfig
from hardmoe.features.config import FeaturesConfig
from hardmoe.partitioning.config import PartitionConfig
from hardmoe.trunk.config import TrunkConfig
from hardmoe.yaml_files import parse_yaml, read_yaml, yaml_problem

DEFAULT_PATH = "hardmoe.yaml"


class Recipe(Config):
    """What to build, and separately where and how."""

    root: str = operational("runs/hardmoe", min_length=1)
    """Directory (path or URI) of the run; relative to the current directory."""
    reuse: list[str] = operational(default_factory=list)
    """Roots of other runs, to take an artifact from when its fingerprint is the same."""
    dataset: DatasetConfig = Field(default_factory=DatasetConfig)
    """Which examples there are, and which of them are held out."""
    hashtags: HashtagsConfig = Field(default_factory=HashtagsConfig)
    """Which hashtags the networks learn."""
    trunk: TrunkConfig = Field(default_factory=TrunkConfig)
    """The network whose features decide the partition."""
    features: FeaturesConfig = Field(default_factory=FeaturesConfig)
    """What the partition goes by."""
    partition: PartitionConfig = Field(default_factory=PartitionConfig)
    """How the images are divided among the experts."""
    experts: ExpertsConfig = Field(default_factory=ExpertsConfig)
    """How every expert, and the dense baseline, is trained."""
    decoder: DecoderConfig = Field(default_factory=DecoderConfig)
    """How alignment and shared decoder are fitted."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """What is measured, against which controls."""
    distil: StudentConfig | None = added(None)
    """One dense network that learns from the finished mixture, such as `{weight: 0.5}`; `{}` for its defaults, null for none."""
    seed: int = Field(0, ge=0)
    """Every random choice of the run derives from it."""
    execution: ExecutionConfig = operational(default_factory=ExecutionConfig)
    """Where units run; never part of a fingerprint."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.experts.init == "trunk" and self.experts.backbone is not None:
            for key in ("backbone", "stem"):
                own, trunk = getattr(self.experts, key), getattr(self.trunk, key)
                if own != trunk:
                    raise ValueError(
                        f"experts.init is 'trunk' but experts.{key} '{own}' is not the trunk's '{trunk}'; "
                        "set experts.init: random, or leave experts.backbone out"
                    )
            if self.experts.moe != self.trunk.moe:
                raise ValueError(
                    "experts.init is 'trunk' but experts.moe is not the trunk's; set experts.init: random, or leave "
                    "experts.backbone "
                    "and experts.moe out"
                )
        if self.experts.budget == "examples" and self.partition.has_extra_copies:
            raise ValueError(
                "experts.budget: examples gives every expert as many images, where partition.overlap and "
                "partition.out_of_part_fraction let some train on more; take those out, or set experts.budget: epochs"
            )
        self.evaluation.check_can_route(self.partition.is_routed, self.partition.experts, bool(self.features.path))
        if self.decoder.rounds and self.experts.epochs <= (epochs := self.decoder.rounds * self.decoder.round_epochs):
            raise ValueError(
                f"decoder.rounds: {self.decoder.rounds} takes the last {epochs} epochs of experts.epochs: {self.experts.epochs}, "
                f"which leaves none before; set experts.epochs to {epochs + 1} or more"
            )
        if self.decoder.rounds and self.experts.loss != self.decoder.loss:
            raise ValueError(
                f"decoder.rounds: {self.decoder.rounds} trains experts against the decoder, whose loss '{self.decoder.loss}' is "
                f"not their '{self.experts.loss}'; set decoder.loss: {self.experts.loss}, or decoder.rounds: 0"
            )
        if self.partition.method == "given" and self.dataset.part_column is None:
            raise ValueError(
                "partition.method is 'given' but dataset.part_column names no column; set it, or set partition.method: kmeans"
            )
        return self

    @model_validator(mode="after")
    def _losses_go_together(self) -> Self:
        experts, trunk = self.experts, self.trunk
        if self.distil is not None:
            self.distil.check_fits(trunk, experts, {"backbone": trunk.backbone, "stem": trunk.stem}, self.decoder.loss)
        uses = {
            "start from": ("experts.init: random", experts.init == "trunk"),
            "decode with": ("experts.decoder: own", experts.decoder == "fixed"),
            "learn from": ("experts.distill.weight: 0", experts.distill.weight > 0),
        }
        for verb, (remedy, asked) in uses.items():
            if asked and experts.loss == "sigmoid" != trunk.loss:
                raise ValueError(
                    f"experts.loss is 'sigmoid' but the experts {verb} a trunk trained with '{trunk.loss}', whose outputs "
                    f"are no log odds; set trunk.loss: sigmoid, or {remedy}"
                )
        if experts.distill.weight > 0 and trunk.loss == "sigmoid" != experts.loss:
            raise ValueError(
                f"experts.loss is '{experts.loss}' but the experts learn from a trunk trained with 'sigmoid', whose outputs are "
                "log odds of each hashtag; set experts.loss: sigmoid, or experts.distill.weight: 0"
            )
        return self

    @model_validator(mode="after")
    def _has_images_to_choose_by(self) -> Self:
        if self.dataset.validation_fraction > 0 or self.dataset.split_column is not None:
            return self
        if self.evaluation.probe:
            raise ValueError(
                "evaluation.probe: true chooses its penalty on validation images, of which dataset.validation_fraction: 0 leaves "
                "none; set that to 0.05, or take evaluation.probe out"
            )
        for name, section in (("trunk", self.trunk), ("experts", self.experts)):
            for key, off in (("early_stop", None), ("keep", "last")):
                if getattr(section, key) != off:
                    raise ValueError(
                        f"{name}.{key} is decided on validation images, of which dataset.validation_fraction: 0 leaves none; "
                        f"set that to 0.05, or take {name}.{key} out"
                    )
        return self

    def what(self) -> dict[str, Any]:
        """The identity of all sections, nested as in the file."""
        return self.identity()


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, extend, override and check a recipe.

    Args:
        path: the YAML file.
        overrides: `a.b=c` each, the value in YAML.

    Raises:
        RecipeError: anything about it is wrong; says what and how to mend it.
    """
    return _from_here(parse_recipe(read_body(path, overrides), str(path)))


def read_body(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read, extend and override a recipe, or another file of sections, without a look at what its keys mean.

    Raises:
        RecipeError: a file cannot be read, or an override is none.
    """
    body = _read_extended(path, ())
    for text in overrides:
        _override(body, text)
    return body


def parse_recipe(body: Mapping[str, Any], where: str) -> Recipe:
    """Check a recipe given as nested dictionaries.

    Raises:
        RecipeError: the first mistake found, with the key and the remedy.
    """
    try:
        return Recipe.model_validate(body)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error)}") from error


_PLACES = {"dataset": ("path", "image_root", "tags_path"), "hashtags": ("aliases", "allow", "deny"), "features": ("path",)}
"""Keys that name files or folders."""


def _from_here(recipe: Recipe) -> Recipe:
    """The recipe with absolute places of the data: a worker of a cluster has another current directory."""
    sections: dict[str, Config] = {name: _section_from_here(getattr(recipe, name), keys) for name, keys in _PLACES.items()}
    if (transfer := recipe.evaluation.transfer) is not None:
        second = _section_from_here(transfer, _PLACES["dataset"])
        sections["evaluation"] = recipe.evaluation.model_copy(update={"transfer": second})
    if recipe.experts.init_path is not None:
        sections["experts"] = recipe.experts.model_copy(update={"init": absolute_place(recipe.experts.init_path)})
    if recipe.experts.init_root is not None:
        sections["experts"] = recipe.experts.model_copy(update={"init": f"run:{absolute_place(recipe.experts.init_root)}"})
    return recipe.model_copy(update=sections)


def _section_from_here(section: Config, keys: Sequence[str]) -> Config:
    places = {key: getattr(section, key) for key in keys if not _is_on_a_hub(section, key)}
    absolute = {
        key: [absolute_place(each) for each in place] if isinstance(place, list) else place and absolute_place(place)
        for key, place in places.items()
    }
    return section.model_copy(update=absolute)


def _is_on_a_hub(section: Config, key: str) -> bool:
    """Whether a key is the name of a dataset on a hub, and no path."""
    return key == "path" and getattr(section, "source", None) == "huggingface" and not _is_there(getattr(section, key))


def places_of(recipe: Recipe) -> dict[str, list[str]]:
    """Where a recipe's root and data are, by key: paths and URIs, not the name of a dataset on a hub."""
    places = {"root": [recipe.root], "reuse": list(recipe.reuse)}
    sections: dict[str, tuple[Config, Sequence[str]]] = {name: (getattr(recipe, name), keys) for name, keys in _PLACES.items()}
    if (transfer := recipe.evaluation.transfer) is not None:
        sections["evaluation.transfer"] = transfer, _PLACES["dataset"]
    for name, (section, keys) in sections.items():
        for key in keys:
            place = None if _is_on_a_hub(section, key) else getattr(section, key)
            places[f"{name}.{key}"] = place if isinstance(place, list) else [place] if place else []
    places["experts.init"] = [place for place in (recipe.experts.init_path, recipe.experts.init_root) if place]
    return places


def _is_there(place: str | list[str] | None) -> bool:
    return isinstance(place, str) and Path(place).expanduser().exists()


def absolute_place(place: str) -> str:
    """A path from the root on; a URI as it is."""
    if "://" in place:
        return place
    # A slash at the end says that a folder is meant; Path would drop it.
    return str(Path(place).expanduser().absolute()) + ("/" if place.endswith("/") else "")


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
        raise RecipeError(f"{path}: 'extends' must be the path of one recipe, not {_shown(base)}")
    if not (path.parent / base).exists():
        raise RecipeError(f"{path}: 'extends' names {path.parent / base}, which does not exist; correct the path or take it out")
    return _merged(_read_extended(path.parent / base, (*seen, resolved)), body)


def _read(path: Path) -> dict[str, Any]:
    body = read_yaml(path, "recipe", "name one with -f FILE, or write one with 'hardmoe init'")
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise RecipeError(f"{path} must be a mapping of sections such as 'dataset:', not {_shown(body)}")
    if (odd := next((key for key in body if not isinstance(key, str)), None)) is not None:
        raise RecipeError(f"{path}: unknown key {_shown(odd)}; {_nearest([str(odd)])}")
    # A section whose keys are all commented out reads as null: it says nothing.
    return {key: value for key, value in body.items() if value is not None or _section(key) is None}


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
        body[last] = parse_yaml(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {text!r}: the value is not valid YAML{yaml_problem(error)}; quote it") from error


def _explain(error: ValidationError) -> str:
    """The first mistake as one sentence, and how many other keys have one."""
    problems = error.errors(include_url=False)
    first = problems[0]
    location = _location(first["loc"])
    key = ".".join(location)
    others = {".".join(_location(problem["loc"])) for problem in problems} - {key}
    more = f" (and {len(others)} more {'mistake' if len(others) == 1 else 'mistakes'})" if others else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'; {_nearest(location)}{more}"
    if first["type"] == "missing":
        return f"{'.'.join(map(str, first['loc']))} is missing; give it a value{more}"
    if first["type"] == "value_error":
        sentence = str(first["ctx"]["error"]) if "ctx" in first else first["msg"]
        return f"{key + ': ' if key else ''}{sentence}{more}"
    same = [problem for problem in problems if _location(problem["loc"]) == location]
    # A key that may be one of several kinds has a complaint of each kind; one that merely misses a bound fits best.
    bound = [problem for problem in same if problem["type"] in _BOUNDS]
    wishes = list(dict.fromkeys(_wish(problem) for problem in bound or same))
    return f"{key} must be {' or '.join(wishes)}, not {_shown(_value_at(first, same))}{more}"


_BOUNDS = {"greater_than_equal": "at least {ge}", "greater_than": "more than {gt}"}
_BOUNDS |= {"less_than_equal": "at most {le}", "less_than": "less than {lt}", "finite_number": "a finite number"}
_BOUNDS |= {"string_too_short": "at least {min_length} character long"}
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "list": "a list, as in [a, b]",
    "model": "a section with keys of its own",
    "dict": "a section with keys of its own",
    "none": "null",
    "literal": "{expected}",
}


def _wish(problem: Any) -> str:
    """What a key must be, from pydantic's complaint about it."""
    kind: str = problem["type"]
    context = {name: f"{value:g}" if isinstance(value, float) else value for name, value in problem.get("ctx", {}).items()}
    template = _BOUNDS.get(kind) or _KINDS.get(kind.partition("_")[0])
    return template.format(**context) if template else str(problem["msg"])


def _location(loc: Sequence[int | str]) -> list[str]:
    """The key that pydantic means, or the entry of a list; without the alternatives of a union."""
    location: list[str] = []
    section: type[BaseModel] | None = Recipe
    for part in loc:
        if section is None:
            if isinstance(part, int):
                location[-1] += f"[{part}]"
            break
        location.append(str(part))
        section = _model(section.model_fields[part].annotation) if part in section.model_fields else None
    return location


def _value_at(first: Any, same: Sequence[Any]) -> Any:
    """The whole value of the key, where the complaints are about pieces of it."""
    return min(same, key=lambda problem: len(problem["loc"]))["input"] if same else first["input"]


def _shown(value: Any) -> str:
    """A value as one would write it in YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True).removesuffix("\n")
    text = text.removesuffix("\n...").strip()
    if isinstance(value, str):
        text = f"'{value}'"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _nearest(location: Sequence[str]) -> str:
    section: type[BaseModel] = Recipe
    for part in location[:-1]:
        inner = _model(section.model_fields[part].annotation)
        assert inner is not None
        section = inner
    names = list(section.model_fields)
    close = difflib.get_close_matches(location[-1], names, n=1)
    elsewhere = [f"{name}.{location[-1]}" for name in Recipe.model_fields if location[-1] in _keys_of(name)]
    if close:
        return f"did you mean '{'.'.join((*location[:-1], close[0]))}'?"
    if elsewhere:
        return f"did you mean '{elsewhere[0]}'?"
    return f"the keys here are {', '.join(names)}"


def _model(annotation: Any) -> type[BaseModel] | None:
    """The section that a key is, or may be beside null."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else [annotation]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _section(key: str) -> type[BaseModel] | None:
    """The model of a section of the recipe, None if the key is no section."""
    field = Recipe.model_fields.get(key)
    return None if field is None else _model(field.annotation)


def _keys_of(key: str) -> list[str]:
    section = _section(key)
    return [] if section is None else list(section.model_fields)
