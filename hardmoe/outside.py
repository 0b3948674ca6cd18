"""What a recipe names outside its root, by content: digests of files, or what a finished artifact records where they are gone.

Rejected: paths and times of change, by which a collection that was moved would be another one.
"""

import hashlib

from hardmoe.artifacts.names import TRANSFER
from hardmoe.artifacts.store import Artifact, ArtifactStore
from hardmoe.data.config import DatasetConfig
from hardmoe.data.inventory import Inventory, cache_of, take_inventory
from hardmoe.data.places import read_place
from hardmoe.data.sources.registry import open_source
from hardmoe.errors import DataError, DriftError
from hardmoe.features.files import features_inventory
from hardmoe.recipe import Recipe
from hardmoe.storage import open_storage


def source_digest(recipe: Recipe, store: ArtifactStore) -> str:
    """The identity of the source's files; as a finished dataset, here or in a root to reuse, records it where they are gone."""
    return _source_digest(recipe.dataset, "dataset", recipe, store)


def second_source_digest(recipe: Recipe, store: ArtifactStore) -> str | None:
    """The same of the second dataset; None where the recipe names none."""
    transfer = recipe.evaluation.transfer
    return None if transfer is None else _source_digest(transfer.dataset(), f"{TRANSFER}dataset", recipe, store)


def _source_digest(config: DatasetConfig, name: str, recipe: Recipe, store: ArtifactStore) -> str:
    dataset = store.find(name)
    try:
        found = take_inventory(open_source(config).files(), store.storage, cache_of(name))
    except DataError as error:
        elsewhere = (ArtifactStore(open_storage(root)).find(name) for root in recipe.reuse)
        known = dataset or next((there for there in elsewhere if there is not None and _same_source(config, there)), None)
        if known is None and name != "dataset":
            raise DataError(f"evaluation.transfer: {error}") from error
        if known is None:
            raise
        return _recorded_digest(known)
    if dataset is not None and found.digest() != _recorded_digest(dataset) and _same_source(config, dataset):
        raise DriftError(_changed_files(store, dataset, found))
    return found.digest()


def _recorded_digest(dataset: Artifact) -> str:
    digest: str = dataset.record.config["source"]["sha256"]
    return digest


def _same_source(config: DatasetConfig, dataset: Artifact) -> bool:
    """Whether only the files are others; with another source or other columns, the recipe's differences tell more."""
    return bool(dataset.record.config["dataset"] == config.identity())


def _changed_files(store: ArtifactStore, dataset: Artifact, found: Inventory) -> str:
    from hardmoe.data.source_files import read_source_table

    changes = found.changes_since(read_source_table(dataset))
    return (
        f"{store.storage.where(dataset.name)} was built from other files ({changes}; source.sha256: "
        f"{_recorded_digest(dataset)[:12]}… -> {found.digest()[:12]}…); either put the files back, or give a new "
        "'root' to build from those there are now"
    )


def hashtags_digests(recipe: Recipe, store: ArtifactStore) -> dict[str, str | None]:
    """The digests of the files of hashtags; of the finished vocabulary's own record where a file is gone.

    Until the vocabulary is finished they are read as well: a contradiction in them must not come up after the ingestion.
    """
    vocabulary = store.find("vocabulary")
    places = {key: getattr(recipe.hashtags, key) for key in ("aliases", "allow", "deny")}
    contents: dict[str, bytes | None] = {}
    recorded: dict[str, str | None] = {}
    for key, place in places.items():
        try:
            what = "the aliases" if key == "aliases" else "the list"
            contents[key] = None if place is None else read_place(place, what, f"hashtags.{key}")
        except DataError:
            known = None if vocabulary is None else vocabulary.record.config.get(key, {}).get("sha256")
            if known is None:
                raise
            recorded[key] = known
    if vocabulary is None and any(places.values()):
        from hardmoe.data.aliases import parse_rules

        parse_rules(contents, places)
    digests = {key: None if content is None else hashlib.sha256(content).hexdigest() for key, content in contents.items()}
    return {**digests, **recorded}


def features_digest(recipe: Recipe, store: ArtifactStore) -> str | None:
    """The identity of features computed elsewhere; of the finished artifact's own record where the files are gone."""
    if not recipe.features.path:
        return None
    try:
        return features_inventory(recipe.features, store.storage).digest()
    except DataError:
        features = store.find("features")
        if features is None or "external" not in features.record.config:
            raise
        recorded: str = features.record.config["external"]["sha256"]
        return recorded
