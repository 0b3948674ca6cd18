"""Declarations of the data stages: `dataset` and `vocabulary`. Pure data; the code is in `ingest` and `labelling`."""

from hardmoe.data.config import DatasetConfig, HashtagsConfig
from hardmoe.stage import Stage


def dataset_stage(config: DatasetConfig, source_sha256: str) -> Stage:
    """The examples, deduplicated, split and sharded. `source_sha256` is the inventory's digest."""
    return Stage(
        name="dataset",
        kind="dataset",
        version=1,
        config={"dataset": config.identity(), "source": {"sha256": source_sha256}},
        operational={"dataset": config.operational_values()},
        work="hardmoe.data.ingest:DatasetWork",
    )


def vocabulary_stage(config: HashtagsConfig, aliases_sha256: str | None) -> Stage:
    """The canonical tags, and every example's as indices."""
    return Stage(
        name="vocabulary",
        kind="vocabulary",
        version=1,
        config={"hashtags": config.identity(), "aliases": {"sha256": aliases_sha256}},
        operational={"hashtags": config.operational_values()},
        inputs={"dataset": "dataset"},
        work="hardmoe.data.labelling:VocabularyWork",
    )
