"""Declarations of the data stages: `dataset` and `vocabulary`. Pure data; the code is in `ingest` and `labelling`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hardmoe.data.config import DatasetConfig, HashtagsConfig
from hardmoe.stage import Stage

FOLLOWERS = "followers"
"""Where `Stage.operational` lists the artifacts that the same command builds on this one, so that what they would refuse after
hours of work is refused before this one's record exists, and the recipe can still be mended."""
_KINDS_THAT_LOOK_AHEAD = ("dataset", "vocabulary")
SOURCE = "source"
"""Where `Stage.operational` says how to open the source, for stages that may have to read images there."""
EXPECTED_PARTS = "experts"
"""Where the dataset's `Stage.operational` says how many parts `dataset.part_column` must give."""


def dataset_stage(config: DatasetConfig, source_sha256: str, experts: int | None = None) -> Stage:
    """The examples, deduplicated, split and sharded.

    Args:
        config: the recipe's section.
        source_sha256: the inventory's digest.
        experts: number of parts that the dataset's own column must give, so that a wrong one is refused before the images are
            copied and the trunk is trained; None if the column is of no use to the recipe.
    """
    return Stage(
        name="dataset",
        kind="dataset",
        version=5,
        config={"dataset": config.identity(), "source": {"sha256": source_sha256}},
        operational={"dataset": config.operational_values(), EXPECTED_PARTS: experts},
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
        version=4,
        config={"hashtags": config.identity(), **{name: {"sha256": sha256.get(name)} for name in ("aliases", "allow", "deny")}},
        operational={"hashtags": config.operational_values()},
        inputs={"dataset": "dataset"},
        work="hardmoe.data.labelling:VocabularyWork",
    )


def with_followers(stages: Sequence[Stage]) -> list[Stage]:
    """The stages, those of the data told which others are built; never part of their identity."""
    names = [stage.name for stage in stages]
    return [
        replace(stage, operational={**stage.operational, FOLLOWERS: names}) if stage.kind in _KINDS_THAT_LOOK_AHEAD else stage
        for stage in stages
    ]


def is_followed_by(stage: Stage, name: str) -> bool:
    """Whether the same command builds that artifact."""
    return name in stage.operational.get(FOLLOWERS, ())


def with_source(stage: Stage, config: DatasetConfig) -> Stage:
    """The stage, told where the source is, if it may have to read images there; never part of its identity."""
    if "dataset" not in stage.inputs.values():
        return stage
    return replace(stage, operational={**stage.operational, SOURCE: config.model_dump(mode="json")})
