"""The `features` section of the recipe."""

from hardmoe.config import Config, operational


class FeaturesConfig(Config):
    """What the partition goes by: the trunk's features, or features that were computed elsewhere."""

    path: str | list[str] | None = operational(None)
    """Parquet files of features computed elsewhere, with the columns `example_id` and `feature`, joined on the id; by content,
    not by path, part of the fingerprint. Null takes the trunk's."""

    num_threads: int = operational(1, ge=1)
    """CPU threads of one unit, for decoding beside the network."""
