"""What became of a source's rows, as a refusal or as the dataset's record tells it.

Rejected: sentences beside the phases that they are about, where they were a third of the module and hid its course.
"""

from collections import Counter
from collections.abc import Sequence

from hardmoe.config import Json
from hardmoe.data.config import DatasetConfig
from hardmoe.data.near_stage import NearResult
from hardmoe.data.schemas import SPLITS
from hardmoe.data.stages import is_followed_by
from hardmoe.errors import DataError
from hardmoe.stage import Completion, Stage

_LISTED = "'hardmoe logs dataset' lists them"
_REASONS = 20
"""At most so many kinds of reasons are told apart in the record; every row's own reason is in the quarantine tables."""


def check_ingested(stage: Stage, config: DatasetConfig, ingested: Sequence[Completion]) -> None:
    """Look at what all units of the ingestion found, before anything is regrouped or written.

    Raises:
        DataError: nothing can be used, too much cannot, or no image has a hashtag and a vocabulary is wanted.
    """
    good = sum(done.payload["rows"] for done in ingested)
    reasons = _reasons(ingested)
    bad = reasons.total()
    examples = "; ".join(f"{reason} ({count})" for reason, count in _commonest(reasons)[:2])
    if not good:
        found = f"{bad} rows, none with a usable image ({examples}; {_LISTED})" if bad else "no rows at all"
        raise DataError(
            f"the source '{config.source}' at {_listed(config.path or 'its packaged files')} has {found}; "
            "correct dataset.path and its columns" + (" or dataset.image_root" if "no such file" in reasons else "")
        )
    if is_followed_by(stage, "vocabulary") and not any(done.payload["tagged"] for done in ingested):
        raise DataError(_without_hashtags(config, good, examples))
    if bad > config.max_bad_fraction * (good + bad):
        raise DataError(
            f"{bad} of {good + bad} rows cannot be used, more than dataset.max_bad_fraction={config.max_bad_fraction:g} "
            f"({examples}; {_LISTED}); correct dataset.path and its columns, or raise max_bad_fraction"
        )


def _without_hashtags(config: DatasetConfig, num_images: int, reasons: str) -> str:
    """Why no image has a hashtag: known here, before anything is copied."""
    if config.source != "folder":
        return f"none of the {num_images} images has a hashtag; correct dataset.tags_column"
    if config.tags_path is None:
        return (
            f"none of the {num_images} images below {_listed(config.path)} lies in a folder whose name would be its hashtag; "
            "set dataset.tags_path to a table of hashtags"
        )
    told = f" ({reasons}; {_LISTED})" if reasons else ""
    return (
        f"no row of {config.tags_path} gives any of the {num_images} images below {_listed(config.path)} a hashtag{told}; its "
        "paths must be relative to dataset.path, and dataset.tags_column must name its column of hashtags"
    )


def _listed(path: str | list[str] | None) -> str:
    return ", ".join(path) if isinstance(path, list) else str(path)


def _reasons(ingested: Sequence[Completion]) -> Counter[str]:
    reasons: Counter[str] = Counter()
    for done in ingested:
        reasons.update(done.payload["reasons"])
    return reasons


def _commonest(reasons: Counter[str]) -> list[tuple[str, int]]:
    """The commonest reasons by number, equally common ones by name."""
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:_REASONS]


def dataset_summary(
    config: DatasetConfig,
    store: str,
    ingested: Sequence[Completion],
    merged: Sequence[Completion],
    written: Sequence[Completion],
    near: NearResult,
) -> dict[str, Json]:
    """What the dataset's record says of it.

    Raises:
        DataError: no example is left for training.
    """
    sizes = {split: sum(done.payload["sizes"][split] for done in written) for split in SPLITS}
    if not sizes["train"] and near.summary() and (removed := near.summary()["removed"]["train"]):
        raise DataError(
            f"no example is left for training, since all {removed} training images nearly equal others; "
            "set dataset.near_duplicates: none, or lower dataset.near_difference"
        )
    if not sizes["train"]:
        raise DataError(f"no example is left for training ({sizes}); lower dataset.test_fraction or correct dataset.split_column")
    reasons = _reasons(ingested)
    listed = dict(_commonest(reasons))
    others = reasons.total() - sum(listed.values())
    return {
        "source": config.source,
        "store": store,
        "sizes": sizes,
        "quarantined": reasons.total(),
        "quarantine_reasons": listed | ({"other reasons": others} if others else {}),
        "copies_merged": sum(done.payload["copies_merged"] for done in merged),
        "near_duplicates": near.summary(),
        "without_tags": sum(done.payload["without_tags"] for done in written),
    }
