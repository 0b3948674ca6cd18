"""Whether a finished run has a gate, which sends any image to an expert; told by its records."""

from hardmoe.artifacts.store import Artifact


def has_random_parts(partition: Artifact) -> bool:
    """Whether chance divided the images, so that nothing says where another one belongs."""
    return bool(partition.record.config["partition"]["method"] == "random")


def has_features_from_elsewhere(features: Artifact | None) -> bool:
    """Whether the partition goes by features that the run's trunk did not compute (`features.path`)."""
    return features is not None and "external" in features.record.config
