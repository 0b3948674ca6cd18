"""YAML as people write it by hand, read without its traps, and what is wrong with it in one sentence."""

import re
from pathlib import Path
from typing import Any

import yaml

from hardmoe.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its two traps: `1e-4` is a number, and of a key given twice neither is dropped in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key_node.value}' is given twice; keep one", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """The value of a text.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    return yaml.load(text, _Loader)


def yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong and where, without YAML's excerpt of the text."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None:
        return f": {' '.join(str(error).split())}"
    mark = error.problem_mark
    where = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
    hint = "; indent with spaces, not tabs" if "'\\t'" in error.problem else ""
    return f"{where}: {error.problem}{hint}"


def read_yaml(path: Path, what: str, if_missing: str) -> Any:
    """The value of a file.

    Args:
        path: the file.
        what: what it is, for messages.
        if_missing: the remedy where there is none.

    Raises:
        RecipeError: it cannot be read, or is not YAML.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"there is no {what} {path}; {if_missing}") from error
    except OSError as error:
        raise RecipeError(f"cannot read the {what} {path}: {error.strerror}; give a readable YAML file") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"the {what} {path} is not text in UTF-8; give a YAML file") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML{yaml_problem(error)}") from error
