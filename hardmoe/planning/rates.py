"""How fast units are: stated, measured by a finished run, or else what a usual machine does.

A finished run's provenance holds every unit's seconds. Divided by the rows that its stage went through they give seconds per row,
which hold for more rows of the same networks on the same machines at the same concurrency. A training tells its speed as well, so
that what it takes to begin and to end, which more epochs do not make longer, is told apart. Rejected: a calibration of its own
that times every stage anew, which a small run does better, as it is one.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hardmoe.artifacts.names import TRANSFER
from hardmoe.artifacts.record import PROVENANCE_NAME
from hardmoe.artifacts.store import ArtifactStore
from hardmoe.errors import CorruptFileError, RecipeError
from hardmoe.planning.work import Shape, rows_of
from hardmoe.recipe import Recipe
from hardmoe.stage import Stage
from hardmoe.storage import Storage, read_if_there

_LEAST_RATE, _MOST_RATE = 1e-12, 1e18
_RESUMED = 1.2
"""A training that took less than its steps at its own speed, by so much, was resumed: what is known is its last try alone."""


@dataclass(frozen=True)
class Rates:
    """Of one unit on one slot."""

    gpu_tflops: float = 40.0
    """What networks reach on a GPU, forward and backward; a third of the data sheet is usual for residual networks."""
    cpu_gflops: float = 30.0
    """What networks reach on a CPU core."""
    decode: float = 400.0
    """Images per second and core: reading, decoding and resizing 500 pixels to 224."""
    ingest: float = 300.0
    """Images per second: decoding in full, hashing, writing."""
    rows: float = 50_000.0
    """Rows per second of tables without images."""
    copy: float = 5_000.0
    """Images per second that are written to their part."""
    distances: float = 2e8
    """Products of a feature's dimension with a centroid's, per second and core."""
    fit: float = 100_000.0
    """Embeddings per second that the decoder is fitted on."""
    unit_seconds: float = 0.1
    """What handing over a unit costs beside its work."""
    start_seconds: float = 10.0
    """Of the driver and of Ray, before the first unit."""
    gpu_price: float = 0.0
    """Per GPU and hour, with the CPUs that come with it."""
    cpu_price: float = 0.0
    """Per CPU and hour where no GPU is used."""
    seconds_per_row: Mapping[str, float] = field(default_factory=dict)
    """Measured, by stage and, for stages that the measured run has not, by kind of stage."""
    seconds_per_unit: Mapping[str, float] = field(default_factory=dict)
    """Likewise: what a training takes beside its steps."""

    @classmethod
    def stated(cls, values: Mapping[str, str]) -> "Rates":
        """The defaults with some of them stated.

        Raises:
            RecipeError: there is no such rate, or it is no number above zero.
        """
        known = [name for name in cls.__dataclass_fields__ if name not in ("seconds_per_row", "seconds_per_unit")]
        found: dict[str, Any] = {}
        for name, text in values.items():
            if name not in known:
                raise RecipeError(f"--rate {name}={text}: there is no such rate; state {', '.join(known)}")
            try:
                found[name] = float(text)
            except ValueError:
                found[name] = -1.0
            if not (_LEAST_RATE <= found[name] <= _MOST_RATE or (found[name] == 0 and name.endswith("price"))):
                raise RecipeError(
                    f"--rate {name}={text}: not a number above zero; state one from {_LEAST_RATE:g} to {_MOST_RATE:g}"
                )
        return replace(cls(), **found)

    def measured(self, storage: Storage, recipe: Recipe, stages: list[Stage]) -> "Rates":
        """With what a finished run took.

        Args:
            storage: its root.
            recipe: its recipe.
            stages: all of its stages.

        Raises:
            RecipeError: nothing in it is finished.
            CorruptFileError: what it says of its units is damaged.
        """
        dataset = ArtifactStore(storage).find("dataset")
        if dataset is None:
            raise RecipeError(f"--calibrate: nothing is finished in {storage.where()}; name the root of a finished run")
        shape = Shape.of_recipe(recipe, sum(dataset.payload["sizes"].values()))
        measured: dict[str, list[tuple[float, float, float]]] = {}
        for stage in stages:
            if stage.name.startswith(TRANSFER):
                continue  # of a dataset of another size
            seconds = _seconds_of(storage, stage.name)
            if seconds is not None:
                for key in (stage.name, _any(stage)):
                    measured.setdefault(key, []).append((*seconds, rows_of(stage, recipe, shape)))
        per_row, per_unit = {}, {}
        for key, each in measured.items():
            in_steps, beside, rows = map(sum, zip(*each, strict=True))
            per_row[key], per_unit[key] = in_steps / max(1.0, rows), beside / len(each)
        return replace(self, seconds_per_row=per_row, seconds_per_unit=per_unit)

    def row_seconds(self, stage: Stage) -> float | None:
        """Measured seconds per row; None where the measured run has nothing of the kind."""
        return self.seconds_per_row.get(stage.name, self.seconds_per_row.get(_any(stage)))

    def seconds_beside_rows(self, stage: Stage) -> float:
        """Of one unit: its hand-over and, of a training that was measured, its begin and its end."""
        return self.unit_seconds + self.seconds_per_unit.get(stage.name, self.seconds_per_unit.get(_any(stage), 0.0))


def _any(stage: Stage) -> str:
    """The key of all stages of its kind; the kind alone may be the name of one, as `trunk` is."""
    return f"any {stage.kind}"


def _seconds_of(storage: Storage, name: str) -> tuple[float, float] | None:
    """What all units of a stage took: in steps, which is all but for a training, and beside; None if nobody noted it.

    A stage that was taken over from another root took what it did there.

    Raises:
        CorruptFileError: the provenance is damaged.
    """
    artifact = ArtifactStore(storage).find(name)
    data = None if artifact is None else read_if_there(artifact.storage, artifact.path(PROVENANCE_NAME))
    if artifact is None or data is None:
        return None
    try:
        body = json.loads(data)
        shown = body.get("units", [])
        if not shown:
            return None
        taken = _positive(sum(unit["seconds"] for unit in shown)) * body.get("num_units", len(shown)) / len(shown)
        speed = _positive(shown[0].get("said", {}).get("examples/s") or 0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        where = artifact.storage.where(artifact.path(PROVENANCE_NAME))
        raise CorruptFileError(f"--calibrate: {where} is damaged; name the root of another finished run") from error
    seen = artifact.payload.get("examples_seen")
    if not (seen and speed):
        return taken, 0.0
    in_steps = seen / speed
    return (in_steps, 0.0) if in_steps > _RESUMED * taken else (min(taken, in_steps), taken - min(taken, in_steps))


def _positive(number: float) -> float:
    if not 0 <= number < math.inf:
        raise ValueError(f"{number} are no seconds")
    return number
