"""Room for a stage's files, looked at before it is begun: hours of work must not end at a full disk that one could see coming.

What a stage will store comes from the plan's formulas, by the dataset and the trunk as far as they are finished by then. Where
the disk ends is asked of the file system, which counts a user's quota in; a bucket has no end. What the stage has written
already, before it was interrupted, is not asked for again. Rejected: room for the whole run at its beginning, which refuses a
run whose intermediate files its operator means to move away, and knows no sizes yet; and a margin on top, which would refuse
what just fits: what is refused cannot fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hardmoe.artifacts.names import TRANSFER
from hardmoe.artifacts.store import Artifact
from hardmoe.data.config import AUTO_COPY_BYTES
from hardmoe.data.inventory import known_bytes
from hardmoe.errors import StorageError
from hardmoe.execution.tracked import format_bytes
from hardmoe.planning.work import Network, Shape, volume_of
from hardmoe.recipe import Recipe
from hardmoe.stage import Stage
from hardmoe.storage import Storage

_WEIGHT_BYTES = 4
_CERTAIN = 0.7
"""Of what the formulas say: a shard of features may shrink to three quarters of them by compression."""
_AS_THEY_ARE = {"parquet", "folder", "webdataset"}


@dataclass(frozen=True)
class Room:
    """Called with every stage that is about to begin.

    Args:
        recipe: the run's.
        storage: its root.
        artifacts: what is finished, by name; grows while the run goes on.
    """

    recipe: Recipe
    storage: Storage
    artifacts: Mapping[str, Artifact]

    def __call__(self, stage: Stage) -> None:
        """Look whether the stage fits.

        Raises:
            StorageError: it does not; names what it needs, what there is, and where.
        """
        needed, free = self.needed_bytes(stage), self.storage.free_bytes()
        if needed is None or free is None or _CERTAIN * needed <= free:
            return
        needed -= sum(entry.size for entry in self.storage.entries(stage.name))
        if _CERTAIN * needed > free:
            there = f"{self.storage.where()}, where {format_bytes(free)} are free"
            raise StorageError(
                f"{stage.name} will store about {format_bytes(needed)} in {there}; free some, or take another root (--root)"
            )

    def needed_bytes(self, stage: Stage) -> float | None:
        """What the stage will store, as far as that can be known by now; of a second dataset nothing is."""
        if stage.name.startswith(TRANSFER):
            return None
        dataset = self.artifacts.get("dataset")
        if dataset is None:
            return self._copied_bytes() if stage.kind == "dataset" else None
        images = sum(dataset.payload["sizes"].values())
        stored = sum(entry.size for entry in dataset.record.files if entry.path.startswith("split="))
        shape = Shape.of_recipe(self.recipe, images)
        return volume_of(stage, self.recipe, shape, self._network(), stored / max(1, images)).stored

    def _copied_bytes(self) -> float | None:
        """Of a source whose images the dataset keeps as they are; None where drawings, resizing or references make it others."""
        config, source = self.recipe.dataset, known_bytes(self.storage)
        if source is None or config.source not in _AS_THEY_ARE or config.store_size is not None or config.store == "reference":
            return None
        return None if config.store == "auto" and source > AUTO_COPY_BYTES else float(source)

    def _network(self) -> Network:
        """As large as the trunk, once that is there; nothing before."""
        trunk = self.artifacts.get("trunk")
        if trunk is None:
            return Network(0.0, 0.0, 0)
        weights = sum(entry.size for entry in trunk.record.files if entry.path.endswith(".safetensors"))
        return Network(0.0, weights / _WEIGHT_BYTES, trunk.payload["num_features"])
