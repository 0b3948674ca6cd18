"""The identity of what `experts.init` names outside the root; light, since planning a run needs it.

A file of weights counts by its content, whatever it is called and wherever it lies. Rejected: its path, which an overwritten file
does not change.
"""

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.config import Json
from hardmoe.data.inventory import take_inventory
from hardmoe.data.sources.files import find_inputs
from hardmoe.errors import DataError
from hardmoe.experts.config import ExpertsConfig
from hardmoe.experts.stages import START, expert_name

KEY = "experts.init"
_CACHE_PATH = "experts/_progress/inventory.json"


def start_identity(config: ExpertsConfig, num_experts: int, store: ArtifactStore) -> Json:
    """What the fingerprints of experts and dense baseline say of it; None where everything is in the root.

    Args:
        config: the recipe's section.
        num_experts: how many there are to be.
        store: the root's artifacts; a finished expert's record says it where the file is gone.

    Raises:
        DataError: it cannot be read.
    """
    if config.init_path is None:
        return None
    try:
        files = find_inputs(config.init_path, "weights", "weights.safetensors", key=KEY).source_files()
        ((_, found),) = take_inventory(files, store.storage, _CACHE_PATH, KEY).files.values()
    except DataError:
        finished = (store.find(f"experts/{expert_name(expert)}") for expert in range(num_experts))
        told = next((each.record.config[START] for each in finished if each and START in each.record.config), None)
        if told is None:
            raise
        return told
    return {"sha256": found}
