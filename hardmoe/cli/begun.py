"""A run that was begun, as the commands find it that look at runs: of a recipe, or of a file of `hardmoe detection`.

Which of the two it is, the file in its root says. Rejected: to list what artifacts lie there, which knows nothing of
those that are still to come.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hardmoe.cli.common import DETECTION_FILE, RECIPE_FILE, described_in, existing_run
from hardmoe.detection.config import DetectionConfig
from hardmoe.detection.stages import detection_stages
from hardmoe.partitioning.advice_stages import CHECKS, SWEEP
from hardmoe.pipeline import ExternalInputs, build_stages
from hardmoe.recipe import Recipe
from hardmoe.storage import Storage, join, open_storage


@dataclass(frozen=True)
class BegunRun:
    """Where it is, what it was asked for, and what it has or will have."""

    storage: Storage
    config: Recipe | DetectionConfig
    names: list[str]
    """Of its artifacts, inputs first."""

    @property
    def recipe(self) -> Recipe | None:
        """None of a detection."""
        return self.config if isinstance(self.config, Recipe) else None


def begun_run(options: Mapping[str, Any]) -> BegunRun:
    """The run that a command's options name.

    Raises:
        RecipeError: there is none.
        CorruptFileError: what it was begun with is damaged.
    """
    if options["root"] is not None and options["recipe_path"] is None:
        storage = open_storage(options["root"])
        if not storage.exists(RECIPE_FILE) and storage.exists(DETECTION_FILE):
            config = DetectionConfig.model_validate(described_in(storage, DETECTION_FILE))
            return BegunRun(storage, config, [stage.name for stage in detection_stages(config, "")])
    storage, recipe = existing_run(options)
    return BegunRun(storage, recipe, _artifact_names(storage, recipe))


def _artifact_names(storage: Storage, recipe: Recipe) -> list[str]:
    """The recipe's artifacts, then those of sweeps and checks that were begun in this root."""
    names = [stage.name for stage in build_stages(recipe, ExternalInputs(""))]
    for directory, depth in ((SWEEP, 1), (CHECKS, 2)):
        paths = [path.split("/") for path in storage.list(directory)]
        names += sorted({join(directory, *parts[:depth]) for parts in paths if len(parts) > depth})
    return names
