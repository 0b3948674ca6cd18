"""Declarations of the data stages: `dataset` and `vocabulary`. Pure data; the code is in `ingest` and `labelling`."""

from collections.abc import Mapping
from dataclasses import replace

from hardmoe.data.config import DatasetConfig, HashtagsConfig
from hardmoe.stage import Stage

SOURCE = "source"
"""Where `Stage.operational` says how to open the source, for stages that may have to read images there."""


def dataset_stage(config: DatasetConfig, source_sha256: str) -> Stage:
    """The examples, deduplicated, split and sharded. `source_sha256` is the inventory's digest."""
    return Stage(
        name="dataset",
        kind="dataset",
        version=4,
        config={"dataset": config.identity(), "source": {"sha256": source_sha256}},
        operational={"dataset": config.operational_values()},
        work="hardmoe.data.ingest:DatasetWork",
    )


def vocabulary_stage(config: HashtagsConfig, sha256: Mapping[str, str | None]) -> Stage:
    """The canonical tags, and every example's as indices.

    Args:
        config: the recipe's section.
        sha256: digests of the files that its keys `aliases`, `allow` and `deny` name; None where there is no file.
    """
    return Stage(
        name="vocabulary",
        kind="vocabulary",
        version=2,
        config={"hashtags": config.identity(), **{name: {"sha256": sha256.get(name)} for name in ("aliases", "allow", "deny")}},
        operational={"hashtags": config.operational_values()},
        inputs={"dataset": "dataset"},
        work="hardmoe.data.labelling:VocabularyWork",
    )


def with_source(stage: Stage, config: DatasetConfig) -> Stage:
    """The stage, told where the source is, if it may have to read images there; never part of its identity."""
    if "dataset" not in stage.inputs.values():
        return stage
    return replace(stage, operational={**stage.operational, SOURCE: config.model_dump(mode="json")})
