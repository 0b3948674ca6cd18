"""The identity of what `experts.init` names outside the root; light, since planning a run needs it.

A file of weights counts by its content, whatever it is called and wherever it lies, and so does another run. Rejected: the path,
which an overwritten file does not change.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hardmoe.artifacts.names import DENSE, expert_name
from hardmoe.artifacts.other_run import OtherRun
from hardmoe.artifacts.store import ArtifactStore
from hardmoe.config import Json
from hardmoe.data.inventory import take_inventory
from hardmoe.data.sources.files import find_inputs
from hardmoe.errors import DataError
from hardmoe.experts.config import ExpertsConfig
from hardmoe.experts.stages import START

KEY = "experts.init"
_CACHE_PATH = "experts/_progress/inventory.json"


@dataclass(frozen=True)
class Origin:
    """What fingerprints say of the places that networks start from; None of those that start within the root."""

    experts: Json = None
    dense: Json = None
    """Of the dense baseline, which starts from another run's."""


def identify_origin(config: ExpertsConfig, num_experts: int, has_dense: bool, store: ArtifactStore) -> Origin:
    """Look at what `experts.init` names.

    Args:
        config: the recipe's section.
        num_experts: how many there are to be.
        has_dense: whether there is to be a dense baseline.
        store: the root's artifacts; a finished network's record says it where the file or the run is gone.

    Raises:
        DataError: it cannot be read.
        RecipeError: it is a run from which nothing can start.
    """
    if config.init_path is None and config.init_root is None:
        return Origin()
    try:
        if config.init_root is not None:
            run = OtherRun.open(config.init_root)
            return Origin(run.identity(), run.dense_identity() if has_dense else None)
        assert config.init_path is not None
        files = find_inputs(config.init_path, "weights", "weights.safetensors", key=KEY).source_files()
        ((_, sha256),) = take_inventory(files, store.storage, _CACHE_PATH, KEY).files.values()
        return Origin({"sha256": sha256}, {"sha256": sha256})
    except DataError:
        experts = _recorded(store, [f"experts/{expert_name(expert)}" for expert in range(num_experts)])
        dense = _recorded(store, [DENSE])
        if experts is None and dense is None:
            raise
        return Origin(experts, dense)


def _recorded(store: ArtifactStore, names: Sequence[str]) -> Json:
    """What the first that is finished says."""
    found = (store.find(name) for name in names)
    return next((each.record.config[START] for each in found if each is not None and START in each.record.config), None)
