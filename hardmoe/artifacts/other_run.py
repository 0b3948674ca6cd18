"""Another run's finished gate and networks, for this run's experts to start from; identified by their records.

Its dataset is not looked at: the images may be gone, or have changed since, which is why there is a new run. Rejected: the run's
recipe as its identity, which says what was asked for and not what came of it.
"""

from dataclasses import dataclass

from hardmoe.artifacts.fingerprint import digest
from hardmoe.artifacts.gate import has_features_from_elsewhere, has_random_parts
from hardmoe.artifacts.names import DENSE, expert_name
from hardmoe.artifacts.store import Artifact, ArtifactStore
from hardmoe.config import Json
from hardmoe.errors import DataError, MissingRecordError, RecipeError, StorageError
from hardmoe.storage import open_storage


@dataclass(frozen=True)
class OtherRun:
    """A run whose experts are finished."""

    root: str
    trunk: Artifact
    router: Artifact
    vocabulary: Artifact
    experts: tuple[Artifact, ...]
    dense: Artifact | None

    @classmethod
    def open(cls, root: str) -> "OtherRun":
        """Look at a run.

        Raises:
            RecipeError: it is not finished, or has no gate that could be asked about images.
            DataError: it cannot be read, or is not there.
        """
        try:
            store = ArtifactStore(open_storage(root))
            if not store.storage.exists("recipe.yaml"):
                raise DataError(f"there is no run in {root}; correct experts.init")
            return cls._open(store, root)
        except MissingRecordError as error:
            raise RecipeError(f"experts.init cannot start from the run {root}: {error}; finish it, or name another") from error
        except StorageError as error:
            raise DataError(f"the run {root} cannot be read ({error}); correct experts.init") from error

    @classmethod
    def _open(cls, store: ArtifactStore, root: str) -> "OtherRun":
        partition, features = store.get("partition"), store.find("features")
        reason = None
        if has_random_parts(partition):
            reason = "its parts are random"
        elif has_features_from_elsewhere(features):
            reason = "it goes by features that were computed elsewhere (features.path)"
        if reason is not None:
            raise RecipeError(
                f"experts.init cannot start from the run {root}: {reason}, so nothing says which of its experts an image belongs "
                "to; name another run"
            )
        experts = tuple(store.get(f"experts/{expert_name(expert)}") for expert in range(partition.payload["experts"]))
        return cls(root, store.get("trunk"), store.get("router"), store.get("vocabulary"), experts, store.find(DENSE))

    def identity(self) -> Json:
        """What the fingerprints of networks that start from its experts say of it."""
        return _digest(self.trunk, self.router, self.vocabulary, *self.experts)

    def dense_identity(self) -> Json:
        """What the fingerprint of a network that starts from its dense baseline says of it.

        Raises:
            RecipeError: it has none.
        """
        if self.dense is None:
            raise RecipeError(
                f"the run {self.root} has no dense baseline for this run's to start from; build it there with 'hardmoe "
                "evaluate', or set evaluation.dense_baseline: false"
            )
        return _digest(self.vocabulary, self.dense)

    @classmethod
    def open_same(cls, root: str, identity: Json) -> "OtherRun":
        """The run as it was when this one was planned.

        Raises:
            DataError: it is another by now.
        """
        run = cls.open(root)
        if identity != run.identity() and (run.dense is None or identity != run.dense_identity()):
            raise DataError(f"the run {root} was built anew since this one was begun; start again in a new root")
        return run


def _digest(*artifacts: Artifact) -> Json:
    return {"sha256": digest([artifact.record_digest for artifact in artifacts])}
