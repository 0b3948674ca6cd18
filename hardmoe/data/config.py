"""The recipe's `dataset` and `hashtags` sections.

Everything that decides which bytes, tags or split an example gets is identity; only the places to read from are
operational, because an external input is identified by its content and not by where it lies. Rejected: one section per
source, which would give the same key (`path`, `tags_column`) another place for every source; a source ignores the keys
that it has no use for.

No heavy import may enter this module: the command line reads it before anything else.
"""

from typing import Self

from pydantic import Field, model_validator

from hardmoe.config import Config, operational

PILLOW_MAX_PIXELS = 178_956_970
"""Images with more pixels are refused by Pillow itself, whatever the recipe says."""


class DatasetConfig(Config):
    """Which examples there are, and which of them are held out."""

    source: str = "parquet"
    """Where the examples come from: `parquet`, `icons`, or the name of an installed `hardmoe.sources` entry point."""

    path: str | list[str] | None = operational(None)
    """File, glob pattern or a list of them, relative to the current directory; for `icons` a folder of fonts in place of the
    packaged ones."""

    image_column: str = "image"
    """Column with the encoded bytes of the images: binary, or a struct with a binary field `bytes`."""

    tags_column: str = "hashtags"
    """Column with the hashtags: a list of strings, or one string that is split at spaces, commas and semicolons."""

    id_column: str | None = None
    """Column that names each example; without it an example is named by its content."""

    split_column: str | None = None
    """Column that says `train`, `validation` or `test`; without it the content's hash decides, by the two fractions."""

    test_fraction: float = Field(0.05, gt=0.0, lt=1.0)
    """Share of the examples held out for the final metrics."""

    validation_fraction: float = Field(0.05, ge=0.0, lt=1.0)
    """Share of the examples held out for choosing anything that is chosen."""

    icon_size: int = Field(32, ge=8, le=1024)
    """Side in pixels of the squares that the `icons` source draws."""

    shard_rows: int = Field(8192, ge=1)
    """Rows of one shard of the dataset; also how many rows of a Parquet file one unit reads, in whole row groups."""

    max_pixels: int = Field(100_000_000, ge=1, le=PILLOW_MAX_PIXELS)
    """Images with more pixels are refused as decompression bombs; above the upper bound Pillow itself refuses them."""

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> Self:
        total = self.test_fraction + self.validation_fraction
        if total >= 1.0:
            raise ValueError(
                f"test_fraction {self.test_fraction} + validation_fraction {self.validation_fraction} = {total:g} leaves "
                "nothing to train on; make their sum less than 1"
            )
        return self


class HashtagsConfig(Config):
    """Which hashtags the networks learn."""

    min_count: int = Field(20, ge=1)
    """Hashtags on fewer training examples are dropped."""

    max_tags: int = Field(2000, ge=1)
    """At most this many hashtags are kept, the commonest first."""

    aliases: str | None = operational(None)
    """CSV file with the columns `alias,tag`; its content, not its path, enters the vocabulary's fingerprint."""
