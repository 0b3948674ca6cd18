"""`hardmoe distil`: the evaluation of a recipe that has a network learn from its mixture."""

from collections.abc import Mapping
from typing import Any

from hardmoe.cli.build import build, print_metrics
from hardmoe.cli.common import recipe_of
from hardmoe.errors import RecipeError


def show_distilled(options: Mapping[str, Any]) -> None:
    """Build up to the row `distilled`, and print the table.

    Raises:
        RecipeError: the recipe does not say what network that is to be. A default would not do: the evaluation with its row is
            another one than `hardmoe evaluate` builds of the same recipe.
    """
    if recipe_of(options).distil is None:
        raise RecipeError(
            "the recipe distils nothing (distil is null); write `distil: {}` into it for one network like the trunk, or give "
            "--set distil={}"
        )
    print_metrics(build(options, ["evaluation"]))
