"""A finished run as other runs are held against it: what its evaluation found, and what its trainings say of themselves.

It is read through records and provenance alone, so a root is only looked at and needs neither recipe nor images: an artifact that
was taken over from another root tells of the commit and the machine that built it there. Rejected: reading `report/data.json`,
which a run that stops at `hardmoe evaluate` has not.

Shape letters: R rows of the bootstrap (the point estimate first).
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hardmoe.artifacts.names import DENSE, is_of_the_mixture
from hardmoe.artifacts.record import PROVENANCE_NAME
from hardmoe.artifacts.store import Artifact, ArtifactStore
from hardmoe.config import Json
from hardmoe.errors import DataError, RecipeError
from hardmoe.report.publish import busy_seconds
from hardmoe.storage import open_storage, read_if_there

EVALUATION, VOCABULARY, DATASET = "evaluation", "vocabulary", "dataset"
MIXTURE, CONTROL = "mixture", "dense_refit"
"""What a run is about, and what that is held against in the run itself."""
_TRAINED = (":network-", ":start-")
"""Roles of the evaluation's inputs that are trainings, behind the name of a system."""


@dataclass(frozen=True)
class Training:
    """One network's training, as its artifact tells of it."""

    examples_seen: int
    seconds: float | None
    """That it takes at the speed it noted last, so without what an interrupted one did twice; None where nobody noted any."""
    span: tuple[str, float] | None
    """When its artifact was begun, and the seconds it took."""


@dataclass(frozen=True)
class FinishedRun:
    """See the module."""

    store: ArtifactStore
    evaluation: Artifact

    @classmethod
    def open(cls, root: str) -> "FinishedRun":
        """The run in a root.

        Raises:
            RecipeError: there is none, or it is not finished.
            StorageError: the root cannot be read.
        """
        store = ArtifactStore(open_storage(root))
        evaluation = store.find(EVALUATION)
        if evaluation is None:
            where = store.storage.where()
            raise RecipeError(f"{where} has no finished evaluation; finish it with 'hardmoe evaluate', or leave it out")
        return cls(store, evaluation)

    @property
    def where(self) -> str:
        """The root, for people to read."""
        return self.store.storage.where()

    @cached_property
    def results(self) -> Mapping[str, Json]:
        """What the evaluation wrote."""
        body: Mapping[str, Json] = json.loads(self.evaluation.storage.read_bytes(self.evaluation.path("metrics.json")))
        return body

    @property
    def test_set(self) -> tuple[str, str]:
        """Digests of the records of dataset and vocabulary: where both are equal, so are test examples and their hashtags.

        Raises:
            DataError: the vocabulary that the evaluation stood on is gone.
        """
        reference = self.evaluation.record.inputs[VOCABULARY]
        vocabulary = self.store.find(reference.artifact)
        if vocabulary is None or vocabulary.record_digest != reference.record:
            raise DataError(f"{self.where}: the vocabulary that was evaluated with is gone; build it again with 'hardmoe run'")
        return vocabulary.record.inputs[DATASET].record, reference.record

    def replicates(self, metric: str) -> dict[str, NDArray[np.float64]]:
        """A metric of every system in every row of the bootstrap, float64 [R].

        Raises:
            RecipeError: the metric is none of those that have replicates.
        """
        told = self.results["replicates"]
        if metric not in told["metrics"]:
            raise RecipeError(f"metric: '{metric}' is none of {', '.join(told['metrics'])}; choose one of those")
        return {system: self._values[index, told["metrics"].index(metric)] for index, system in enumerate(told["systems"])}

    @cached_property
    def _values(self) -> NDArray[np.float64]:
        stored = io.BytesIO(self.evaluation.storage.read_bytes(self.evaluation.path("replicates.npy")))
        values: NDArray[np.float64] = np.load(stored, allow_pickle=False)
        return values

    def trainings(self, system: str | None = None) -> list[Training]:
        """All of a system's, those that its networks start from included; of all systems without a name."""
        return [self._training(artifact) for artifact in self._trained(system)]

    def images_shown(self) -> tuple[int, int | None]:
        """To all experts together, and to the dense baseline."""
        seen = {artifact.name: int(artifact.payload["examples_seen"]) for artifact in self._trained()}
        return sum(count for name, count in seen.items() if is_of_the_mixture(name)), seen.get(DENSE)

    def num_experts(self) -> int:
        """Of the recipe's own mixture, as many as were trained."""
        return sum(artifact.name.startswith("experts/") for artifact in self._trained())

    def built_by(self) -> dict[str, list[str]]:
        """Commits and machines that trained and evaluated, each once; a machine nobody described by its host's name."""
        bodies = [self._provenance(artifact) for artifact in [*self._trained(), self.evaluation]]
        commits = [body["commit"] for body in bodies if body.get("commit")]
        machines = [name for body in bodies for name in (body.get("machines") or {0: body.get("host")}).values() if name]
        return {"commits": list(dict.fromkeys(commits)), "machines": list(dict.fromkeys(machines))}

    def _trained(self, system: str | None = None) -> list[Artifact]:
        wanted = [
            reference.artifact
            for role, reference in self.evaluation.record.inputs.items()
            if any(part in role for part in _TRAINED) and (system is None or role.startswith(f"{system}:"))
        ]
        found = (self.store.find(name) for name in dict.fromkeys(wanted))
        return [artifact for artifact in found if artifact is not None and artifact.payload["examples_seen"]]

    def _training(self, artifact: Artifact) -> Training:
        body, seen = self._provenance(artifact), int(artifact.payload["examples_seen"])
        units = body.get("units", [])
        speeds = [unit["said"]["examples/s"] for unit in units if unit.get("said", {}).get("examples/s")]
        seconds = seen / speeds[0] if speeds else sum(unit["seconds"] for unit in units) if units else None
        return Training(seen, seconds, (body["started"], body["seconds"]) if "started" in body else None)

    def _provenance(self, artifact: Artifact) -> Mapping[str, Json]:
        """Of where it was built, which is another root where it was taken over; empty where it is gone."""
        data = read_if_there(artifact.storage, artifact.path(PROVENANCE_NAME))
        body: Mapping[str, Json] = {} if data is None else json.loads(data)
        return body


def speed_of(trainings: Sequence[Training]) -> float | None:
    """Examples/s of one training after the other; None where one of them noted no time."""
    seconds = [training.seconds for training in trainings]
    if not seconds or None in seconds:
        return None
    return sum(training.examples_seen for training in trainings) / max(sum(each for each in seconds if each), 1e-9)


def wall_clock(trainings: Iterable[Training]) -> float | None:
    """Seconds in which at least one of them was at work; None where none says when."""
    spans = [training.span for training in trainings if training.span is not None]
    return busy_seconds(spans) if spans else None


def distinct_names(places: Sequence[str]) -> list[str]:
    """What tells paths apart, as short as can be: `runs/a`, `runs/b` -> `a`, `b`; `a/runs/x`, `b/runs/x` -> `a`, `b`."""
    split = [place.rstrip("/").split("/") for place in places]
    while len(split) > 1 and min(map(len, split)) > 1 and len({parts[-1] for parts in split}) == 1:
        split = [parts[:-1] for parts in split]
    for length in range(1, max(map(len, split)) + 1):
        names = ["/".join(parts[-length:]) for parts in split]
        if len(set(names)) == len(names):
            return names
    return list(places)
