"""The files of features computed elsewhere: found, and identified by their content.

They are an external input like the dataset's own source, with digests remembered in the root; a light module, since planning
a run needs it. Rejected: the paths as identity, which a copy changes and an overwritten file does not.
"""

from hardmoe.data.inventory import Inventory, take_inventory
from hardmoe.data.sources.base import SourceFile
from hardmoe.data.sources.files import find_inputs
from hardmoe.features.config import FeaturesConfig
from hardmoe.storage import Storage

CACHE_PATH = "features/_progress/inventory.json"
_KEY = "features.path"


def features_files(config: FeaturesConfig) -> list[SourceFile]:
    """The files, sorted by name.

    Raises:
        DataError: a path or pattern names none.
    """
    return find_inputs(config.path, "parquet", "features/*.parquet", key=_KEY).source_files()


def features_inventory(config: FeaturesConfig, storage: Storage) -> Inventory:
    """The files with their digests.

    Raises:
        DataError: there are none, or one cannot be read.
    """
    return take_inventory(features_files(config), storage, CACHE_PATH, _KEY)
